//! Which code of libc says that a coroutine ends there?
//!
//! `makecontext` gives a new stack the address of `__start_context` to return to, and no call is in front of that: a walk looks
//! it up one byte before, in padding, so that CFI does not help though there is some. What compiles tables knows that byte by
//! the code of both functions; so a skeleton has those, and the padding. No name says where the second one is, only the first
//! one's instructions.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{SectionHeader as _, Sym as _};
use object::read::{ReadRef, StringTable};
use windlass_schema::coroutines::{LIBC, MAKECONTEXT, MAX_MAKECONTEXT_BYTES};

use crate::image::SectionHeader;

/// Bytes of `lea` of an address relative to rip.
const RELATIVE_LEA_BYTES: usize = 7;
/// Most bytes of what a coroutine's function returns to, and of functions that are kept for being that perhaps: glibc's have
/// 26, and 61 with shadow stacks.
const MAX_COROUTINE_END_BYTES: u64 = 128;
/// Most bytes of padding in front of it.
const MAX_PADDING_BYTES: u64 = 64;

/// Strings of the section at `index`.
fn strings<'data, R: ReadRef<'data>>(
    sections: &[SectionHeader],
    index: usize,
    image: R,
) -> Option<StringTable<'data, R>> {
    let section = sections.get(index)?;
    let start = section.sh_offset(LE);
    Some(StringTable::new(image, start, start.checked_add(section.sh_size(LE))?))
}

/// Whether the image is glibc's libc: the first of its versions is for itself.
fn is_libc<'data, R: ReadRef<'data>>(sections: &[SectionHeader], image: R) -> Option<bool> {
    let mut found = sections.iter().filter_map(|section| section.gnu_verdef(LE, image).ok()?);
    let (mut versions, names) = found.next()?;
    let (base, mut own) = versions.next().ok()??;
    let name = own.next().ok()??.name(LE, strings(sections, names.0, image)?).ok()?;
    Some(base.vd_flags.get(LE).contains(elf::VER_FLG_BASE) && name == LIBC)
}

/// The code of `makecontext`, if the image is the libc that defines it.
pub(crate) fn makecontext<'data, R: ReadRef<'data>>(
    sections: &[SectionHeader],
    image: R,
) -> Option<Range<u64>> {
    is_libc(sections, image).filter(|is_libc| *is_libc)?;
    let table = sections.iter().find(|section| section.sh_type(LE) == elf::SHT_DYNSYM)?;
    let symbols = table.data_as_array::<elf::Sym64<LE>, _>(LE, image).ok()?;
    let names = strings(sections, table.sh_link(LE) as usize, image)?;
    let symbol = symbols.iter().find(|symbol| {
        symbol.st_type() == elf::STT_FUNC
            && symbol.st_shndx.get(LE) != elf::SHN_UNDEF
            && symbol.name(LE, names) == Ok(MAKECONTEXT)
    })?;
    let (start, bytes) = (symbol.st_value(LE), symbol.st_size(LE));
    (bytes <= MAX_MAKECONTEXT_BYTES).then_some(start..start.checked_add(bytes)?)
}

/// Code that may be what coroutines' functions return to, with the padding in front of it, given the `code` of
/// `makecontext`, at `start`. `functions` are sorted.
pub(crate) fn ends(code: &[u8], start: u64, functions: &[Range<u64>]) -> Vec<Range<u64>> {
    let addresses = code.windows(RELATIVE_LEA_BYTES).zip(start + RELATIVE_LEA_BYTES as u64..);
    let targets = addresses.filter_map(|(lea, next)| match *lea {
        [0x48 | 0x4c, 0x8d, modrm, a, b, c, d] if modrm & 0xc7 == 5 => {
            Some(next.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into()))
        }
        _ => None,
    });
    let with_padding = targets.filter_map(|target| {
        let number = functions.binary_search_by_key(&target, |function| function.start).ok()?;
        let end = functions[number].end;
        let before = functions.get(number.checked_sub(1)?)?.end;
        let is_like = end - target <= MAX_COROUTINE_END_BYTES
            && before < target
            && target - before <= MAX_PADDING_BYTES;
        is_like.then_some(before..end)
    });
    with_padding.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_that_makecontext_takes_the_address_of() {
        // lea rdi, [rip + 0x100]; lea rsi, [rip + 0x200]; lea eax, [rip]
        let mut code = vec![0x48, 0x8d, 0x3d, 0, 1, 0, 0, 0x48, 0x8d, 0x35, 0, 2, 0, 0];
        code.extend([0x8d, 0x05, 0, 0, 0, 0]);
        let (first, second) = (0x1107, 0x120e);
        let functions = |end| [0x1000..0x1014, 0x1080..first - 3, first..end, second - 0x10..second + 0x10];
        assert_eq!(ends(&code, 0x1000, &functions(first + 26)), vec![first - 3..first + 26]);
        assert!(ends(&code, 0x1000, &functions(first + 129)).is_empty());
        assert!(ends(&code, 0x1000, &[first..first + 26, second..second + 26]).is_empty());
        assert!(ends(&code[..6], 0x1000, &functions(first + 26)).is_empty());
    }
}
