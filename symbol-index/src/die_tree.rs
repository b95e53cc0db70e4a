//! Whether the tree of DIEs in DWARF is one that can be read with recursion.
//!
//! `symbolic` calls itself for each nested function or inlined call, and for each reference from a DIE
//! without a name to the one that has it. A file of a kilobyte can nest or refer without end, and a
//! stack that overflows takes the whole process with it. So the tree is walked once before, without
//! recursion, over the bytes that `symbolic` will read.

use std::collections::HashSet;

use gimli::{Attribute, AttributeValue, DebugInfoOffset, UnitOffset, constants};

use crate::dwarf::Reader;

/// Deepest nesting of DIEs: ten times what Rust's standard library has (41), and a third of what was
/// seen to fit into the 2 MiB of a thread's stack (1200).
pub(crate) const MAX_DEPTH: isize = 400;
/// Most references from a DIE to the one that has the name. Compilers make two: to the abstract instance,
/// and from there to the declaration in a class.
const MAX_REFERENCES: usize = 16;

type Unit<'d> = gimli::Unit<Reader<'d>>;

/// Whether nesting and references stay within the limits. A unit that cannot be read counts up to where it
/// breaks.
pub(crate) fn is_bounded(dwarf: &gimli::Dwarf<Reader<'_>>) -> bool {
    let mut units = Vec::new();
    let mut headers = dwarf.units();
    while let Ok(Some(header)) = headers.next() {
        units.extend(dwarf.unit(header));
    }
    let mut names = Names { units: &units, found_from: HashSet::new() };
    units.iter().all(|unit| is_unit_bounded(unit, &mut names).unwrap_or(true))
}

fn is_unit_bounded<'a, 'd>(unit: &'a Unit<'d>, names: &mut Names<'a, 'd>) -> gimli::Result<bool> {
    let mut entries = unit.entries_raw(None)?;
    while !entries.is_empty() {
        if entries.next_depth() > MAX_DEPTH {
            return Ok(false);
        }
        let Some(abbreviation) = entries.read_abbreviation()? else { continue };
        let is_function =
            matches!(abbreviation.tag(), constants::DW_TAG_subprogram | constants::DW_TAG_inlined_subroutine);
        if !is_function {
            entries.skip_attributes(abbreviation.attributes())?;
            continue;
        }
        let mut link = Link::default();
        for attribute in abbreviation.attributes() {
            link.add(&entries.read_attribute(*attribute)?);
        }
        if !names.is_found(unit, link) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where a DIE has its name from.
#[derive(Default)]
struct Link<'d> {
    is_named: bool,
    reference: Option<AttributeValue<Reader<'d>>>,
}

impl<'d> Link<'d> {
    fn add(&mut self, attribute: &Attribute<Reader<'d>>) {
        match attribute.name() {
            constants::DW_AT_linkage_name | constants::DW_AT_MIPS_linkage_name | constants::DW_AT_name => {
                self.is_named = true;
            }
            constants::DW_AT_abstract_origin | constants::DW_AT_specification => {
                self.reference = Some(attribute.value());
            }
            _ => {}
        }
    }
}

/// The search for names along references.
struct Names<'a, 'd> {
    /// Ascending by offset.
    units: &'a [Unit<'d>],
    /// DIEs from which the search is known to come to an end.
    found_from: HashSet<DebugInfoOffset>,
}

impl<'a, 'd> Names<'a, 'd> {
    /// Whether the search comes to an end that starts with `link` of a DIE in `unit`.
    fn is_found(&mut self, mut unit: &'a Unit<'d>, mut link: Link<'d>) -> bool {
        let units = self.units;
        let mut first = None;
        for _ in 0..MAX_REFERENCES {
            let target = if link.is_named { None } else { follow(units, unit, link.reference) };
            let next = target.and_then(|(unit, offset)| {
                let start = offset.to_debug_info_offset(unit)?;
                Some((start, unit, unit.entry(offset).ok()?))
            });
            let Some((start, next_unit, entry)) = next.filter(|(start, ..)| !self.found_from.contains(start))
            else {
                self.found_from.extend(first);
                return true;
            };
            first.get_or_insert(start);
            link = Link::default();
            entry.attrs().iter().for_each(|attribute| link.add(attribute));
            unit = next_unit;
        }
        false
    }
}

/// The DIE that a reference in `unit` is to.
fn follow<'a, 'd>(
    units: &'a [Unit<'d>],
    unit: &'a Unit<'d>,
    reference: Option<AttributeValue<Reader<'d>>>,
) -> Option<(&'a Unit<'d>, UnitOffset)> {
    match reference? {
        AttributeValue::UnitRef(offset) => Some((unit, offset)),
        AttributeValue::DebugInfoRef(offset) => {
            let behind = units.partition_point(|unit| unit.debug_info_offset() <= Some(offset));
            let unit = units.get(behind.checked_sub(1)?)?;
            Some((unit, offset.to_unit_offset(unit)?))
        }
        _ => None,
    }
}
