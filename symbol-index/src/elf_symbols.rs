//! Functions by name, from `.symtab` and `.dynsym`.

use object::elf::{STB_GLOBAL, STB_GNU_UNIQUE, STB_WEAK, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE};
use object::{Architecture, Object, ObjectSymbol, SymbolFlags};
use windlass_schema::http::Provenance;

use crate::elf::Image;
use crate::range::Range;
use crate::symbol::{Binding, Symbol};

/// The functions in both symbol tables of `image`.
pub(crate) fn symbols<'a>(image: &Image<'a>) -> Vec<Symbol<'a>> {
    let file = &image.file;
    let code = code_ranges(image);
    let tables = file
        .symbols()
        .map(|symbol| (symbol, Provenance::Symtab))
        .chain(file.dynamic_symbols().map(|symbol| (symbol, Provenance::Dynsym)));
    tables.filter_map(|(symbol, provenance)| function(&symbol, &code, image, provenance)).collect()
}

/// The code range of each section, by section index.
fn code_ranges(image: &Image<'_>) -> Vec<Option<Range>> {
    let mut ranges = Vec::new();
    for (index, range) in image.placement.code(&image.file) {
        if index.0 >= ranges.len() {
            ranges.resize(index.0 + 1, None);
        }
        ranges[index.0] = Some(range);
    }
    ranges
}

fn function<'a>(
    symbol: &object::Symbol<'a, '_>,
    code: &[Option<Range>],
    image: &Image<'_>,
    provenance: Provenance,
) -> Option<Symbol<'a>> {
    let SymbolFlags::Elf { st_info, .. } = symbol.flags() else { return None };
    let is_function = matches!(st_info.st_type(), STT_FUNC | STT_GNU_IFUNC);
    if !is_function && st_info.st_type() != STT_NOTYPE {
        return None;
    }
    let section = symbol.section_index()?;
    let (section_start, section_end) = (*code.get(section.0)?)?;
    let start = symbol.address().checked_add(image.placement.bias(section)?)?;
    if start < section_start || start >= section_end {
        return None;
    }
    let name = base_name(symbol.name().ok()?);
    let is_mapping_symbol = image.file.architecture() == Architecture::Aarch64 && name.starts_with('$');
    if name.is_empty() || is_mapping_symbol {
        return None;
    }
    Some(Symbol {
        start,
        end: start.saturating_add(symbol.size()).min(section_end),
        limit: section_end,
        is_function,
        binding: match st_info.st_bind() {
            STB_GLOBAL | STB_GNU_UNIQUE => Binding::Global,
            STB_WEAK => Binding::Weak,
            _ => Binding::Local,
        },
        name,
        provenance,
    })
}

/// The name without its version: linkers write `memcpy@@GLIBC_2.14` into `.symtab`.
fn base_name(name: &str) -> &str {
    match name.find('@') {
        Some(0) | None => name,
        Some(at) => &name[..at],
    }
}
