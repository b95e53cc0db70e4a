//! What a file is said to bring.

use windlass_symbol_index::{Contents, describe};

use crate::program::Workshop;

#[test]
fn forms_of_a_program() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g"]);
    let form = |arguments: &[&str]| {
        let elf = workshop.objcopy(&program, arguments, "form");
        describe(&std::fs::read(elf).unwrap()).unwrap()
    };
    let stripped = Contents { dynsym: true, unwind: true, code: true, ..Contents::default() };
    let with_symbols = Contents { symtab: true, ..stripped };
    let debug_only = Contents { debug_info: true, line_table: true, symtab: true, ..Contents::default() };
    assert_eq!(form(&["--strip-all"]), stripped);
    assert_eq!(form(&["--strip-debug"]), with_symbols);
    assert_eq!(form(&["--only-keep-debug"]), debug_only);
    assert_eq!(form(&["-R", ".eh_frame", "--strip-all"]), Contents { unwind: false, ..stripped });
    assert_eq!(form(&[]), Contents { debug_info: true, line_table: true, ..with_symbols });

    let extra = workshop.path("extra");
    std::fs::write(&extra, b"xz").unwrap();
    let add = format!(".gnu_debugdata={}", extra.display());
    assert_eq!(form(&["--strip-all", "--add-section", &add]), Contents { gnu_debugdata: true, ..stripped });
}
