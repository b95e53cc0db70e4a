//! Where the code of a kernel module is among its image addresses.
//!
//! A module is a relocatable file (`ET_REL`), whose sections have no addresses. The kernel gives them some when it loads
//! it, code apart from data and what is only needed at first apart from the rest (kernel/module/main.c,
//! `layout_sections`), with sections of its own making between. What everyone knows of a section is its name: the
//! kernel shows it in `/sys/module/MODULE/sections`, the file has it in its headers. So here the name
//! says where a section is:
//!
//! ```text
//! image address = MODULE_TEXT + n * SECTION_SPAN + offset in the section      for the n-th name of the list
//!
//! .text            0x0000_1000        .text.startup      0x7000_1000
//! .text.unlikely   0x1000_1000        .sched.text        0x8000_1000
//! .noinstr.text    0x2000_1000        .kprobes.text      0x9000_1000
//! .init.text       0x3000_1000        .cpuidle.text      0xa000_1000
//! .exit.text       0x4000_1000        .irqentry.text     0xb000_1000
//! .static_call.text 0x5000_1000       .softirqentry.text 0xc000_1000
//! .text.hot        0x6000_1000        .ref.text          0xd000_1000
//! ```
//! Those are the sections with functions that modules have, of what scripts/mod/modpost.c calls text (`TEXT_SECTIONS`,
//! `OTHER_TEXT_SECTIONS`); linking a module joins none of them (scripts/module.lds.S). Code in others has no image
//! address: it is not run where it lies (`.altinstr_replacement`), has no functions (`.plt`), or is in a section that is
//! named by its function, as compilers make them when they are asked to.

/// The image address of the start of `.text`. Not 0, which in lists of kernel symbols says that an address is
/// hidden.
pub const MODULE_TEXT: u64 = 0x1000;
/// Most bytes of a section that has a place: the largest modules of all, graphics drivers, have a tenth of it.
pub const SECTION_SPAN: u64 = 1 << 28;
/// The sections that have a place, in its order. Positions are part of stored lists: new names go to the end.
const SECTIONS: [&str; 14] = [
    ".text",
    ".text.unlikely",
    ".noinstr.text",
    ".init.text",
    ".exit.text",
    ".static_call.text",
    ".text.hot",
    ".text.startup",
    ".sched.text",
    ".kprobes.text",
    ".cpuidle.text",
    ".irqentry.text",
    ".softirqentry.text",
    ".ref.text",
];
// What a symbol index reaches from its first address.
const _: () = assert!(MODULE_TEXT + SECTIONS.len() as u64 * SECTION_SPAN <= u32::MAX as u64);

/// The image address of the first byte of a section, if it has a place.
///
/// ```
/// use windlass_schema::kernel_module::{MODULE_TEXT, section_start};
///
/// assert_eq!(section_start(".text"), Some(MODULE_TEXT));
/// assert_eq!(section_start(".exit.text"), Some(0x4000_1000));
/// assert_eq!(section_start(".kprobes.text"), Some(0x9000_1000));
/// assert_eq!(section_start(".data"), None);
/// ```
pub fn section_start(name: &str) -> Option<u64> {
    let place = SECTIONS.iter().position(|section| *section == name)?;
    Some(MODULE_TEXT + place as u64 * SECTION_SPAN)
}
