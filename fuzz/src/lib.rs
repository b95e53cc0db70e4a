//! The targets' bodies, which the tests crate shares: taken by path, so that a fuzzer need not build
//! the service and all else that tests depend on.

#[path = "../../tests/src/fuzz_targets.rs"]
pub mod fuzz_targets;
