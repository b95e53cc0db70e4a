//! Does the page say what the table is?

use super::table;

const PAGE: &str = include_str!("../../docs/walks.md");

#[test]
fn every_program_is_on_the_page() {
    let missing: Vec<_> =
        table::rows().map(|row| row.name).filter(|name| !PAGE.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/walks.md does not name {missing:?}");
}
