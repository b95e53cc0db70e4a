//! Whose artefact goes in front of whose: namespaces, in the order in which they are trusted.
//!
//! Other servers keep one file for each build-ID, and whoever uploads first or last decides for all. Here each
//! namespace has its own, and readers get that of the most trusted one. So a build of a pull request can never stand
//! in the way of a release, before it or after it.
//!
//! The order: those that the service was started with, as they were listed; then all others as equals, of which the first upload
//! stays in front; at last [`Namespace::upstream`], which is what other servers had.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use windlass_schema::http::ArtefactKind;

use crate::catalog::Artefact;
use crate::content_hash::ContentHash;

/// The namespace of what was not said to belong to another.
pub const RELEASE: &str = "release";
/// The namespace of what came from upstream servers.
const UPSTREAM: &str = "upstream";
/// Longest name in bytes: that of a DNS label, so that names of branches' hosts and of Kubernetes objects fit.
pub const MAX_NAME_BYTES: usize = 63;

/// Name of a namespace: 1 to 63 of `a-z`, `0-9`, `.`, `_` and `-`, of which the first is a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace(String);

/// A text that names no namespace, or one that is not for uploads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    /// Against the pattern.
    #[error(
        "{0:?} is no name of a namespace: 1 to {MAX_NAME_BYTES} of a-z, 0-9, `.`, `_` and `-`, the first a letter or digit"
    )]
    Pattern(String),
    /// Nobody uploads to it.
    #[error("the namespace {UPSTREAM:?} is for what comes from upstream servers")]
    Reserved,
    /// Twice in the order.
    #[error("the namespace {0:?} is listed twice")]
    Twice(Namespace),
    /// The order names none.
    #[error("no namespace is listed")]
    None,
}

impl Namespace {
    /// That of releases.
    pub fn release() -> Self {
        Self(RELEASE.to_owned())
    }

    /// That of what other servers had.
    pub fn upstream() -> Self {
        Self(UPSTREAM.to_owned())
    }

    /// One that uploads may name.
    pub fn for_uploads(text: &str) -> Result<Self, NamespaceError> {
        match text.parse::<Self>()? {
            Self(name) if name == UPSTREAM => Err(NamespaceError::Reserved),
            namespace => Ok(namespace),
        }
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Namespace {
    type Err = NamespaceError;

    fn from_str(text: &str) -> Result<Self, NamespaceError> {
        let is_inner =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        let is_first = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let fits = text.len() <= MAX_NAME_BYTES
            && text.as_bytes().first().is_some_and(is_first)
            && text.bytes().all(is_inner);
        match fits {
            true => Ok(Self(text.to_owned())),
            false => Err(NamespaceError::Pattern(text.chars().take(MAX_NAME_BYTES + 1).collect())),
        }
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Namespace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// The order of trust.
#[derive(Clone, Debug)]
pub(crate) struct Namespaces {
    listed: Vec<Namespace>,
}

impl Namespaces {
    /// Most trusted first.
    pub(crate) fn new(names: &[String]) -> Result<Self, NamespaceError> {
        let mut listed = Vec::new();
        for name in names {
            let namespace = Namespace::for_uploads(name)?;
            if listed.contains(&namespace) {
                return Err(NamespaceError::Twice(namespace));
            }
            listed.push(namespace);
        }
        if listed.is_empty() { Err(NamespaceError::None) } else { Ok(Self { listed }) }
    }

    /// Where an upload goes whose sender may choose and does not.
    pub(crate) fn first(&self) -> &Namespace {
        &self.listed[0]
    }

    /// Whether nothing can go in front of it.
    pub(crate) fn is_first(&self, namespace: &Namespace) -> bool {
        self.first() == namespace
    }

    /// 0 is trusted most.
    fn rank(&self, namespace: &Namespace) -> usize {
        let listed = self.listed.iter().position(|listed| listed == namespace);
        listed.unwrap_or(self.listed.len() + usize::from(namespace.as_str() == UPSTREAM))
    }

    /// What readers of `path` get, of all that is stored under it or a path that resolves to the same. Trust goes before the
    /// spelling of a path. A damaged artefact of a trusted namespace is not replaced by a less trusted one: it is for its
    /// own uploader to mend.
    pub(crate) fn most_trusted(&self, versions: Vec<Artefact>, path: &str) -> Option<Artefact> {
        versions.into_iter().min_by(|a, b| {
            let key = |artefact: &Artefact| {
                (self.rank(&artefact.namespace), Reverse(artefact.path == path), artefact.stored_s)
            };
            key(a).cmp(&key(b)).then_with(|| (&a.namespace, &a.path).cmp(&(&b.namespace, &b.path)))
        })
    }

    /// Which of the artefacts of one name decides what becomes of an upload of `offered` to `namespace`, if any does: the same
    /// content where it is trusted at least as much, else what the namespace has itself, else, of kinds that are as good from any
    /// host, what is trusted more. Damaged ones decide nothing.
    pub(crate) fn decisive(
        &self,
        versions: Vec<Artefact>,
        namespace: &Namespace,
        offered: Option<ContentHash>,
    ) -> Option<Artefact> {
        let rank = self.rank(namespace);
        let same = |artefact: &Artefact| Some(artefact.blob.hash) == offered;
        let versions = versions.into_iter().filter(|artefact| !artefact.damaged);
        let above = versions.filter(|artefact| self.rank(&artefact.namespace) <= rank);
        above
            .filter(|artefact| {
                artefact.namespace == *namespace
                    || same(artefact)
                    || offered.is_none()
                    || matches!(artefact.kind, ArtefactKind::Skeleton | ArtefactKind::Kallsyms)
            })
            .min_by_key(|artefact| (!same(artefact), artefact.namespace != *namespace, artefact.stored_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::Blob;

    fn namespace(text: &str) -> Namespace {
        text.parse().unwrap()
    }

    fn artefact(name: &str, stored_s: u64, path: &str) -> Artefact {
        let content = format!("{name} {stored_s}");
        Artefact {
            build_id: "aabb".parse().unwrap(),
            kind: ArtefactKind::Source,
            path: path.to_owned(),
            namespace: namespace(name),
            blob: Blob { hash: ContentHash::of(content.as_bytes()), size: 1, stored_size: 1, write: 1 },
            file_name: String::new(),
            modified_s: 0,
            stored_s,
            used_s: stored_s,
            facts: Default::default(),
            damaged: false,
        }
    }

    fn order() -> Namespaces {
        Namespaces::new(&["release".to_owned(), "main".to_owned()]).unwrap()
    }

    #[test]
    fn names_have_a_pattern_and_a_length() {
        for good in ["a", "release", "7.x_y-z", &"a".repeat(63)] {
            assert_eq!(Namespace::for_uploads(good).unwrap().as_str(), good);
        }
        for bad in ["", "A", "-a", ".", "a/b", "a b", "é", "a\0", &"a".repeat(64)] {
            assert!(matches!(Namespace::for_uploads(bad), Err(NamespaceError::Pattern(_))), "{bad:?}");
        }
        assert_eq!(Namespace::for_uploads("upstream"), Err(NamespaceError::Reserved));
        let list = |names: &[&str]| {
            Namespaces::new(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).err()
        };
        assert_eq!(list(&[]), Some(NamespaceError::None));
        assert_eq!(list(&["a", "b", "a"]), Some(NamespaceError::Twice(namespace("a"))));
        assert_eq!(list(&["a", "upstream"]), Some(NamespaceError::Reserved));
    }

    #[test]
    fn trust_goes_before_spelling_and_spelling_before_age() {
        let best = |versions: &[Artefact]| {
            let found = order().most_trusted(versions.to_vec(), "/a/b").unwrap();
            let mut turned = versions.to_vec();
            turned.reverse();
            assert_eq!(
                order().most_trusted(turned, "/a/b"),
                Some(found.clone()),
                "whatever the database's order"
            );
            (found.namespace.to_string(), found.stored_s)
        };
        let expect = |name: &str, stored_s| (name.to_owned(), stored_s);
        let all = [
            artefact("upstream", 1, "/a/b"),
            artefact("zebra", 2, "/a/b"),
            artefact("ant", 3, "/a/b"),
            artefact("main", 4, "/a//b"),
            artefact("main", 5, "/a/b"),
            artefact("release", 6, "/a/./b"),
        ];
        assert_eq!(best(&all), expect("release", 6));
        assert_eq!(best(&all[..5]), expect("main", 5));
        assert_eq!(best(&all[..4]), expect("main", 4));
        assert_eq!(best(&all[..3]), expect("zebra", 2), "the first of equals");
        assert_eq!(best(&all[..1]), expect("upstream", 1));
        assert_eq!(order().most_trusted(Vec::new(), ""), None);
    }

    #[test]
    fn an_upload_meets_its_own_namespace_and_the_same_content_above() {
        let (release, main) = (artefact("release", 1, "/a"), artefact("main", 2, "/a"));
        let both = vec![release.clone(), main.clone()];
        let decides = |name: &str, offered: ContentHash| {
            order()
                .decisive(both.clone(), &namespace(name), Some(offered))
                .map(|found| found.namespace.to_string())
        };
        let other = ContentHash::of(b"other");
        assert_eq!(decides("main", other).as_deref(), Some("main"), "a conflict of its own");
        assert_eq!(decides("main", release.blob.hash).as_deref(), Some("release"), "already there");
        assert_eq!(decides("try", other), None, "it may stand below");
        assert_eq!(decides("try", main.blob.hash).as_deref(), Some("main"));
        assert_eq!(
            decides("release", main.blob.hash).as_deref(),
            Some("release"),
            "what is below has no say"
        );
        let damaged = vec![Artefact { damaged: true, ..release }];
        assert_eq!(order().decisive(damaged, &namespace("release"), Some(other)), None);
        let kernel = Artefact { kind: ArtefactKind::Kallsyms, ..main };
        assert!(order().decisive(vec![kernel.clone()], &namespace("try"), Some(other)).is_some());
        assert_eq!(order().decisive(vec![kernel], &namespace("release"), Some(other)), None);
    }
}
