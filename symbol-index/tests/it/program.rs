//! Programs compiled for a test: the same small sources in many forms.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object, ObjectSymbol, SymbolKind};

/// A folder that goes when the test ends, and what is compiled into it.
pub(crate) struct Workshop {
    folder: tempfile::TempDir,
}

impl Workshop {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Compiles `source`, a file of `programs/`, with the compiler for its extension.
    pub(crate) fn compile(&self, source: &str, arguments: &[&str]) -> PathBuf {
        let (compiler, language_arguments): (&str, &[&str]) =
            match Path::new(source).extension().and_then(OsStr::to_str) {
                Some("c") => ("cc", &["-O2"]),
                Some("cpp") => ("g++", &["-O2"]),
                Some("rs") => ("rustc", &["-O", "--edition=2024"]),
                other => panic!("no compiler for {other:?}"),
            };
        let input = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/programs").join(source);
        let output = self.path("program");
        let mut command = Command::new(compiler);
        run(command.args(language_arguments).args(arguments).arg(input).arg("-o").arg(&output));
        output
    }

    /// What objcopy makes of `input`.
    pub(crate) fn objcopy(&self, input: &Path, arguments: &[&str], name: &str) -> PathBuf {
        let output = self.path(name);
        run(Command::new("objcopy").args(arguments).arg(input).arg(&output));
        output
    }
}

/// Runs a command that has to succeed; its standard output.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// For every function of `.symtab` with a size: its first address and up to `inner` more, evenly spread.
pub(crate) fn function_addresses(elf: &[u8], inner: u64) -> Vec<u64> {
    let file = object::File::parse(elf).unwrap();
    let mut addresses: Vec<u64> = file
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0)
        .flat_map(|symbol| {
            let (start, size) = (symbol.address(), symbol.size());
            let step = size.div_ceil(inner + 1) as usize;
            (start..start + size).step_by(step)
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}
