//! What every engine of the catalog has to do, whatever database it is on.
//!
//! An engine runs the suite with `conformance_suite!(path::to::run)`, which makes a test of each case. `run` is given
//! a case, sets up an empty database and hands the case the way to open it. A case that opens it twice is about two
//! processes on one catalog.

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::{Artefact, Catalog, Writer};
use crate::blob::Blob;
use crate::content_hash::ContentHash;
use crate::namespace::Namespace;

pub(crate) mod artefact;
pub(crate) mod audit;
pub(crate) mod change;
pub(crate) mod collection;
pub(crate) mod content;
pub(crate) mod derived;
pub(crate) mod inventory;
pub(crate) mod label;
pub(crate) mod profile;
pub(crate) mod provenance;
pub(crate) mod token;
pub(crate) mod unfinished;

/// Opens the database under test, as each replica does.
pub(crate) type Open<'a> = &'a dyn Fn() -> Box<dyn Catalog>;

/// Makes a test of each case: by group of tables, as the modules are.
macro_rules! conformance_suite {
    ($run:path) => {
        conformance_suite! { $run;
            artefact: a_name_is_taken_once_in_each_namespace a_poorer_content_makes_room a_damaged_content_gives_up_its_name
                a_source_is_found_by_its_resolved_path metadata_is_asked_by_file_pattern_and_build_id
                the_latest_use_is_on_record facts_are_corrected_of_the_content_they_are_of;
            audit: what_is_stored_is_in_the_log_and_nothing_else the_log_comes_in_pages_latest_first
                the_log_ends_by_age_and_by_number;
            change: every_change_is_listed_for_everyone a_list_that_was_not_read_in_time_has_an_end;
            collection: what_is_named_again_stays whatever_names_a_content_keeps_it
                rows_without_images_and_old_profiles_go;
            content: damage_lasts_until_the_content_is_stored_again contents_come_in_pages;
            derived: better_inputs_are_another_key;
            inventory: images_come_in_pages what_was_used_stays_and_what_goes_takes_all_with_it quotas_are_exact;
            label: labels_are_given_and_taken_in_a_namespace labels_have_a_limit;
            profile: batches_are_found_by_time_and_counted_once;
            provenance: the_first_server_that_a_content_came_from_counts;
            token: a_token_is_found_by_its_secret a_revoked_token_stays_on_record_with_its_name
                a_use_is_recorded_once_in_a_while;
            unfinished: parts_follow_one_another uploads_age_by_their_last_part only_a_stale_upload_is_forgotten;
        }
    };
    ($run:path; $($group:ident: $($case:ident)+;)+) => {
        $(mod $group {
            $(#[test]
            fn $case() {
                $run($crate::catalog::conformance::$group::$case);
            })+
        })+
    };
}
pub(crate) use conformance_suite;

fn build_id(byte: u8) -> BuildId {
    BuildId::new(&[byte; 20]).expect("20 bytes are a build-ID")
}

fn blob(text: &str) -> Blob {
    Blob {
        hash: ContentHash::of(text.as_bytes()),
        size: text.len() as u64,
        stored_size: text.len() as u64 + 1,
        write: 7,
    }
}

fn debuginfo(id: u8, content: &str) -> Artefact {
    Artefact {
        build_id: build_id(id),
        kind: ArtefactKind::Debuginfo,
        path: String::new(),
        namespace: Namespace::release(),
        blob: blob(content),
        file_name: "ls".to_owned(),
        modified_s: 1_700_000_000,
        stored_s: 1_700_000_001,
        used_s: 1_700_000_001,
        facts: Default::default(),
        damaged: false,
    }
}

fn source(id: u8, path: &str, content: &str) -> Artefact {
    Artefact {
        kind: ArtefactKind::Source,
        path: path.to_owned(),
        file_name: path.rsplit('/').next().unwrap_or_default().to_owned(),
        ..debuginfo(id, content)
    }
}

fn artefact_in(namespace: &str, artefact: Artefact) -> Artefact {
    Artefact { namespace: namespace.parse().expect("a name"), ..artefact }
}

fn writer() -> Writer {
    Writer { token: "ci".to_owned(), peer: "192.0.2.1".to_owned() }
}
