//! Names: as the linker knows them, and as people read them.
//!
//! Demangling a C++ name costs more than every other step of a lookup together, so it happens when the
//! index is built. DWARF's names travel through the SymCache, which holds one string for a function:
//! a name that demangling changes is stored there as `DEMANGLED NUL MANGLED`. Neither part can hold a
//! NUL, because both come from NUL-terminated strings.

use std::collections::HashMap;

use symbolic::common::{Language, Name, NameMangling};
use symbolic::demangle::{Demangle, DemangleOptions};
use symbolic::symcache::transform;

const SEPARATOR: char = '\0';

/// The demangled form with its arguments, if `linkage_name` is mangled.
pub(crate) fn demangle(linkage_name: &str) -> Option<String> {
    if !is_mangled(linkage_name) {
        return None;
    }
    Name::new(linkage_name, NameMangling::Unknown, Language::Unknown)
        .demangle(DemangleOptions::complete())
        .filter(|demangled| demangled != linkage_name && !demangled.contains(SEPARATOR))
}

/// Whether a name is in the mangled form of C++ or Rust.
pub(crate) fn is_mangled(name: &str) -> bool {
    name.starts_with("_Z") || name.starts_with("_R")
}

/// A mangled name without what tells a compiler's clone (`.cold`, `.part.0`, `.llvm.123`) from the function
/// it was made of.
pub(crate) fn without_clone_suffix(linkage_name: &str) -> &str {
    // Rust's legacy mangling has dots inside, and what is before the first of them is no name.
    let cut = linkage_name.split('.').next().filter(|cut| demangle(cut).is_some());
    cut.unwrap_or(linkage_name)
}

/// Takes apart what [`Demangler`] stored: the name to show, and the linkage name if it differs.
pub(crate) fn split(stored: &str) -> (&str, Option<&str>) {
    match stored.split_once(SEPARATOR) {
        Some((demangled, linkage_name)) => (demangled, Some(linkage_name)),
        None => (stored, None),
    }
}

/// Demangles the functions of a SymCache as they are written, each name once.
#[derive(Default)]
pub(crate) struct Demangler {
    stored: HashMap<String, String>,
}

impl transform::Transformer for Demangler {
    fn transform_function<'f>(
        &'f mut self,
        mut function: transform::Function<'f>,
    ) -> transform::Function<'f> {
        if !is_mangled(&function.name) {
            return function;
        }
        if !self.stored.contains_key(&*function.name) {
            let linkage_name = function.name.to_string();
            let stored = match demangle(&linkage_name) {
                Some(demangled) => format!("{demangled}{SEPARATOR}{linkage_name}"),
                None => linkage_name.clone(),
            };
            self.stored.insert(linkage_name, stored);
        }
        if let Some(stored) = self.stored.get(&*function.name) {
            function.name = stored.as_str().into();
        }
        function
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mangled_names() {
        assert_eq!(demangle("_ZN3foo3barEi").as_deref(), Some("foo::bar(int)"));
        assert_eq!(demangle("_ZN4core3ptr4swap17h0123456789abcdefE").as_deref(), Some("core::ptr::swap"));
        assert_eq!(demangle("_RNvC6_123foo3bar").as_deref(), Some("123foo::bar"));
        assert_eq!(without_clone_suffix("_ZN3foo3barEi.part.0"), "_ZN3foo3barEi");
        let dots = "_ZN42_$LT$$RF$T$u20$as$u20$core..fmt..Debug$GT$3fmt17h0123456789abcdefE";
        assert_eq!(without_clone_suffix(dots), dots);
        for plain in ["main", "_Zebra", "_RNotMangled", ""] {
            assert_eq!(demangle(plain), None, "{plain}");
        }
    }
}
