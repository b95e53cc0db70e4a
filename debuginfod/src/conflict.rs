//! Which of two contents stays, when both claim the same build-ID and kind?
//!
//! Sentry keeps both and picks at query time, Parca keeps the first, which a stripped file by mistake may be, and elfutils
//! serves the newest. Here it is a rule, and the uploader is told which part of it decided:
//!
//! | kind | stays |
//! |---|---|
//! | skeleton, kernel symbols | the first: both are cut from the same image, on different hosts. What is uploaded of the image itself goes before it ([`crate::unwind`]) |
//! | executable, debuginfo | the one that brings more ([`Brings`]); the first, if both bring as much or the other would take away code or unwind sections |
//! | source, perf map, split DWARF | the first: nobody can say which is better |

use windlass_schema::http::{ArtefactKind, Brings};

use crate::elf::Facts;

/// What becomes of content that is offered where sound other content is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// The stored one is as good.
    Interchangeable,
    /// The offered one takes its place.
    Replaces,
    /// The stored one stays, and the offer is refused.
    Refused(Stays),
}

/// Why what is stored stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stays {
    /// Not a kind in which one is better.
    #[error("a {0} is never replaced")]
    First(ArtefactKind),
    /// It has as much.
    #[error("both bring {0}, and the first stays")]
    AsRich(Brings),
    /// It has more.
    #[error("the stored one brings {stored}, the upload {offered}: nothing is shadowed by less")]
    Richer {
        /// In the store.
        stored: Brings,
        /// In the upload.
        offered: Brings,
    },
    /// The upload has more names, but less of something else.
    #[error("the upload brings more, but no {0}, which the stored one has")]
    WouldLose(&'static str),
}

/// Whether facts decide between two contents of this kind.
pub(crate) fn depends_on_facts(kind: ArtefactKind) -> bool {
    matches!(kind, ArtefactKind::Executable | ArtefactKind::Debuginfo)
}

/// Whether nothing that is offered can take the place of sound content with these facts.
pub(crate) fn is_final(kind: ArtefactKind, stored: &Facts) -> bool {
    !depends_on_facts(kind) || stored.brings() == Brings::DebugInfo
}

/// Applies the rule of the module.
pub(crate) fn settle(kind: ArtefactKind, stored: &Facts, offered: &Facts) -> Settled {
    match kind {
        ArtefactKind::Skeleton | ArtefactKind::Kallsyms => Settled::Interchangeable,
        ArtefactKind::Source | ArtefactKind::PerfMap | ArtefactKind::Dwp | ArtefactKind::Dwo => {
            Settled::Refused(Stays::First(kind))
        }
        ArtefactKind::Executable | ArtefactKind::Debuginfo => {
            let (there, here) = (stored.brings(), offered.brings());
            if there == here {
                Settled::Refused(Stays::AsRich(there))
            } else if there > here {
                Settled::Refused(Stays::Richer { stored: there, offered: here })
            } else if stored.code && !offered.code {
                Settled::Refused(Stays::WouldLose("code"))
            } else if stored.unwind && !offered.unwind {
                Settled::Refused(Stays::WouldLose("unwind section"))
            } else {
                Settled::Replaces
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::Section;

    /// Facts of a file with these sections, in the words that `elf` has for them.
    fn facts(sections: &[&str]) -> Facts {
        let has = |name| sections.contains(&name);
        Facts {
            dwarf: has(".debug_info"),
            symtab: has(".symtab"),
            unwind: has(".eh_frame"),
            code: has(".text"),
            sections: sections
                .iter()
                .map(|name| Section { name: (*name).to_owned(), offset: 64, size: 1, nobits: false })
                .collect(),
        }
    }

    #[test]
    fn the_richer_replaces_the_poorer_and_never_the_other_way() {
        let ladder: [&[&str]; 5] =
            [&[], &[".dynsym"], &[".dynsym", ".symtab"], &[".debug_line"], &[".debug_info", ".debug_line"]];
        let brings = [Brings::Nothing, Brings::Dynsym, Brings::Symtab, Brings::LineTable, Brings::DebugInfo];
        for kind in [ArtefactKind::Executable, ArtefactKind::Debuginfo] {
            for (stored, poor) in ladder.iter().enumerate() {
                for (offered, rich) in ladder.iter().enumerate() {
                    let expect = match offered.cmp(&stored) {
                        std::cmp::Ordering::Greater => Settled::Replaces,
                        std::cmp::Ordering::Equal => Settled::Refused(Stays::AsRich(brings[stored])),
                        std::cmp::Ordering::Less => Settled::Refused(Stays::Richer {
                            stored: brings[stored],
                            offered: brings[offered],
                        }),
                    };
                    assert_eq!(settle(kind, &facts(poor), &facts(rich)), expect, "{poor:?} {rich:?}");
                    assert!(expect != Settled::Replaces || !is_final(kind, &facts(poor)), "{poor:?}");
                }
            }
        }
    }

    #[test]
    fn whoever_has_debug_information_is_final() {
        for kind in [ArtefactKind::Executable, ArtefactKind::Debuginfo] {
            assert!(is_final(kind, &facts(&[".debug_info"])));
            assert!(!is_final(kind, &facts(&[".symtab"])));
        }
    }

    #[test]
    fn nothing_to_run_or_unwind_by_is_lost() {
        let stored = facts(&[".text", ".eh_frame", ".symtab"]);
        let settle = |offered: &[&str]| settle(ArtefactKind::Debuginfo, &stored, &facts(offered));
        assert_eq!(settle(&[".debug_info", ".eh_frame"]), Settled::Refused(Stays::WouldLose("code")));
        assert_eq!(settle(&[".debug_info", ".text"]), Settled::Refused(Stays::WouldLose("unwind section")));
        assert_eq!(settle(&[".debug_info", ".text", ".eh_frame"]), Settled::Replaces);
    }

    #[test]
    fn of_other_kinds_the_first_stays() {
        let (poor, rich) = (facts(&[]), facts(&[".debug_info"]));
        for kind in [ArtefactKind::Skeleton, ArtefactKind::Kallsyms] {
            assert_eq!(settle(kind, &poor, &rich), Settled::Interchangeable);
        }
        for kind in [ArtefactKind::Source, ArtefactKind::PerfMap, ArtefactKind::Dwp, ArtefactKind::Dwo] {
            assert_eq!(settle(kind, &poor, &rich), Settled::Refused(Stays::First(kind)));
            assert!(is_final(kind, &poor));
        }
    }

    #[test]
    fn a_section_without_bytes_brings_nothing() {
        let mut facts = facts(&[".dynsym"]);
        facts.sections[0].nobits = true;
        assert_eq!(facts.brings(), Brings::Nothing);
    }
}
