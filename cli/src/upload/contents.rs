//! What a file brings, what it lacks, and how a build would add it: the words of reports and of `--require`.

use windlass_symbol_index::Contents;

/// Something that `--require` can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Requirement {
    /// A GNU build-ID note
    BuildId,
    /// DWARF: functions and inlined calls
    DebugInfo,
    /// DWARF: files and lines
    LineTable,
    /// A symbol table
    Symtab,
    /// Unwind sections
    Unwind,
}

/// Something that a file does not bring, and how a build would add it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub(crate) struct Lack {
    pub(crate) what: &'static str,
    pub(crate) remedy: &'static str,
}

const NO_BUILD_ID: Lack = Lack {
    what: "build_id",
    remedy: "link with -Wl,--build-id (rustc: -C link-arg=-Wl,--build-id; Go: -ldflags=-B=gobuildid; zig: --build-id=sha1)",
};
const NO_UNWIND: Lack = Lack {
    what: "unwind",
    remedy: "compile with -fasynchronous-unwind-tables (rustc: -C force-unwind-tables=yes)",
};
const NO_DEBUG_INFO: Lack =
    Lack { what: "debug_info", remedy: "compile with -g (Cargo: debug = true) and upload before strip" };
const NO_LINE_TABLE: Lack = Lack {
    what: "line_table",
    remedy: "compile with -g or at least -gline-tables-only, and upload before strip",
};
const NO_SYMTAB: Lack = Lack { what: "symtab", remedy: "upload before strip; link without -s" };
const NO_SPLIT_UNITS: Lack = Lack {
    what: "split_units",
    remedy: "upload where the .dwo files of the build are, or pack them into FILE.dwp, or compile with -gno-split-dwarf",
};
const NO_SUPPLEMENTARY: Lack = Lack {
    what: "supplementary",
    remedy: "upload where the file of .gnu_debugaltlink is (install the distribution's debug package), or do not run dwz",
};

/// What is known of one image: of all files with its build-ID together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) contents: Contents,
    /// Whether its ID is the one of a note.
    pub(crate) has_note: bool,
    /// Units whose `.dwo` file was not found.
    pub(crate) absent_units: bool,
    /// A supplementary file was named and not found.
    pub(crate) absent_supplementary: bool,
}

impl Image {
    /// Adds what another file of the same image brings.
    pub(crate) fn add(&mut self, other: &Contents, has_note: bool) {
        let own = &mut self.contents;
        self.has_note |= has_note;
        own.debug_info |= other.debug_info;
        own.line_table |= other.line_table;
        own.symtab |= other.symtab;
        own.dynsym |= other.dynsym;
        own.unwind |= other.unwind;
        own.gnu_debugdata |= other.gnu_debugdata;
        own.code |= other.code;
    }

    /// What it lacks for unwinding and naming.
    pub(crate) fn lacks(&self) -> Vec<Lack> {
        let Contents { debug_info, line_table, symtab, unwind, code, .. } = self.contents;
        [
            (!self.has_note, NO_BUILD_ID),
            (code && !unwind, NO_UNWIND),
            (!debug_info, NO_DEBUG_INFO),
            (debug_info && !line_table, NO_LINE_TABLE),
            (!debug_info && !symtab, NO_SYMTAB),
            (self.absent_units, NO_SPLIT_UNITS),
            (self.absent_supplementary, NO_SUPPLEMENTARY),
        ]
        .into_iter()
        .filter_map(|(lacks, lack)| lacks.then_some(lack))
        .collect()
    }

    /// What lacks for `requirement`. Debug information whose larger part is in files that were not found is none.
    pub(crate) fn misses(&self, requirement: Requirement) -> Option<Lack> {
        let Contents { debug_info, line_table, symtab, unwind, code, .. } = self.contents;
        match requirement {
            Requirement::BuildId => (!self.has_note).then_some(NO_BUILD_ID),
            Requirement::DebugInfo if !debug_info => Some(NO_DEBUG_INFO),
            Requirement::DebugInfo if self.absent_units => Some(NO_SPLIT_UNITS),
            Requirement::DebugInfo => self.absent_supplementary.then_some(NO_SUPPLEMENTARY),
            Requirement::LineTable => (!line_table).then_some(NO_LINE_TABLE),
            Requirement::Symtab => (!symtab).then_some(NO_SYMTAB),
            // A debug file alone says nothing of the code it belongs to.
            Requirement::Unwind => (code && !unwind).then_some(NO_UNWIND),
        }
    }
}

/// What `contents` brings, as in JSON.
pub(crate) fn brings(contents: &Contents) -> Vec<&'static str> {
    [
        (contents.code, "code"),
        (contents.unwind, "unwind"),
        (contents.debug_info, "debug_info"),
        (contents.line_table, "line_table"),
        (contents.symtab, "symtab"),
        (contents.dynsym, "dynsym"),
        (contents.gnu_debugdata, "mini_debuginfo"),
    ]
    .into_iter()
    .filter_map(|(present, name)| present.then_some(name))
    .collect()
}

/// The name of JSON, for a reader.
pub(crate) fn in_words(name: &str) -> &str {
    match name {
        "build_id" => "GNU build-ID",
        "unwind" => "unwind sections",
        "debug_info" => "DWARF",
        "line_table" => "lines",
        "symtab" => ".symtab",
        "dynsym" => ".dynsym",
        "mini_debuginfo" => "MiniDebugInfo",
        "split_dwarf" => "split DWARF",
        "split_units" => "some .dwo files",
        "supplementary" => "its dwz file",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_lacks(contents: Contents, has_note: bool, expect: &[&str]) {
        let image = Image { contents, has_note, ..Image::default() };
        let lacks: Vec<_> = image.lacks().iter().map(|lack| lack.what).collect();
        assert_eq!(lacks, expect);
    }

    fn full() -> Contents {
        Contents {
            code: true,
            unwind: true,
            debug_info: true,
            line_table: true,
            symtab: true,
            ..Contents::default()
        }
    }

    #[test]
    fn what_lacks_is_named_once() {
        check_lacks(full(), true, &[]);
        check_lacks(full(), false, &["build_id"]);
        check_lacks(Contents { line_table: false, ..full() }, true, &["line_table"]);
        let code = Contents { code: true, ..Contents::default() };
        check_lacks(code, true, &["unwind", "debug_info", "symtab"]);
        check_lacks(Contents { debug_info: true, line_table: true, ..Contents::default() }, true, &[]);
    }

    #[test]
    fn files_of_one_image_meet_requirements_together() {
        let mut image = Image::default();
        image.add(&Contents { code: true, unwind: true, ..Contents::default() }, true);
        let missed = |image: &Image| {
            let all = <Requirement as clap::ValueEnum>::value_variants().iter();
            all.filter_map(|requirement| image.misses(*requirement)).map(|lack| lack.what).collect::<Vec<_>>()
        };
        assert_eq!(missed(&image), ["debug_info", "line_table", "symtab"]);
        let debug = Contents { debug_info: true, line_table: true, symtab: true, ..Contents::default() };
        image.add(&debug, true);
        assert_eq!(missed(&image), Vec::<&str>::new());
        image.absent_units = true;
        assert_eq!(missed(&image), ["split_units"]);
    }
}
