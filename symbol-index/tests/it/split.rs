//! Skeleton units and the units they stand for find each other, in both versions of split DWARF.

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use windlass_symbol_index::{named_sources, split_unit_ids, split_units};

use crate::program::Workshop;

/// A program and its `.dwo` file, as the compiler of this machine makes them.
fn split(version: &str) -> (Vec<u8>, Vec<u8>) {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g", version, "-gsplit-dwarf"]);
    let program = std::fs::read(program).unwrap();
    let units = split_units(&program).unwrap();
    let unit = units.iter().find(|unit| unit.name.ends_with(".dwo")).unwrap();
    let dwo = std::fs::read(Path::new(&unit.compiled_in).join(&unit.name)).unwrap();
    (program, dwo)
}

#[test]
fn skeletons_name_the_file_that_has_their_unit() {
    for version in ["-gdwarf-4", "-gdwarf-5"] {
        let (program, dwo) = split(version);
        let ids: Vec<_> = split_units(&program).unwrap().iter().map(|unit| unit.id).collect();
        assert_eq!(split_unit_ids(&dwo).unwrap(), ids, "{version}");
        assert!(split_unit_ids(&program).unwrap().is_empty());
        let sources = named_sources(&program).unwrap();
        assert!(sources.iter().any(|source| source.path.ends_with("shapes.c")), "{sources:?}");
    }
}

static SPLIT: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| split("-gdwarf-5"));

proptest! {
    #[test]
    fn damage_is_an_error_or_an_answer(damage in prop::collection::vec((any::<u16>(), any::<u8>()), 1..20)) {
        for whole in [&SPLIT.0, &SPLIT.1] {
            let mut damaged = whole.clone();
            for &(at, byte) in &damage {
                let at = usize::from(at) % damaged.len();
                damaged[at] = byte;
            }
            let _ = (named_sources(&damaged), split_units(&damaged), split_unit_ids(&damaged));
        }
    }
}
