//! Labels of images: of which release or branch a build is, in the words of who built it.
//!
//! Storage of debug files elsewhere is kept by age alone, so the release that a customer still runs goes with the builds of last
//! week. A label says what a build is; which labels keep it is for whoever collects to say.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use windlass_schema::BuildId;

use super::{CatalogError, Writer};
use crate::namespace::Namespace;

/// Longest name in bytes.
const MAX_NAME_BYTES: usize = 63;
/// Longest value in bytes: names of branches come from issue titles.
const MAX_VALUE_BYTES: usize = 255;
/// Most labels of an image in one namespace: a file that no release changes gets one with each.
pub const MAX_LABELS: usize = 1000;

/// `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    name: String,
    value: String,
}

/// A text that is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no label, expected NAME=VALUE: as name 1 to {MAX_NAME_BYTES} of a-z, 0-9, `.`, `_` and `-`, as value 1 to \
     {MAX_VALUE_BYTES} bytes without control characters"
)]
pub struct LabelError(String);

impl Label {
    /// What kind of label.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which one.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        let fits = |text: &str, most: usize| (1..=most).contains(&text.len());
        match text.split_once('=') {
            Some((name, value))
                if fits(name, MAX_NAME_BYTES)
                    && name.bytes().all(is_name)
                    && fits(value, MAX_VALUE_BYTES)
                    && !value.contains(char::is_control) =>
            {
                Ok(Self { name: name.to_owned(), value: value.to_owned() })
            }
            _ => Err(LabelError(text.chars().take(MAX_VALUE_BYTES).collect())),
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

impl Serialize for Label {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A label on record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Labelled {
    /// In which namespace it was given.
    pub namespace: Namespace,
    /// The label.
    pub label: Label,
    /// When, in seconds since 1970.
    pub since_s: u64,
}

/// Labels to give to images and to take from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelChange {
    /// For which namespace.
    pub namespace: Namespace,
    /// To give.
    pub add: Vec<Label>,
    /// To take, before others are given.
    pub remove: Vec<Label>,
    /// When, in seconds since 1970.
    pub at_s: u64,
}

/// What became of a change to an image's labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelOutcome {
    /// It is made.
    Changed,
    /// Its labels were so already.
    Unchanged,
    /// Nothing is stored of the image in any namespace.
    Unknown,
    /// It would have more than [`MAX_LABELS`] in the namespace, and has what it had.
    TooMany,
}

/// The labels on record.
pub trait Labels {
    /// Labels of an image in all namespaces, in their order.
    fn labels(&self, id: BuildId) -> Result<Vec<Labelled>, CatalogError>;

    /// Changes the labels of images, and says for each what became of it. Changes are in the log as `writer`'s.
    fn change_labels(
        &self,
        ids: &[BuildId],
        change: &LabelChange,
        writer: &Writer,
    ) -> Result<Vec<LabelOutcome>, CatalogError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_a_name_and_a_value() {
        for good in ["release=1.2", "branch=fix/a=b", "x.y_z-0=ü ü"] {
            assert_eq!(good.parse::<Label>().expect(good).to_string(), good);
        }
        let long = format!("a={}", "x".repeat(256));
        for bad in ["", "release", "=1", "a=", "A=1", "a b=1", "a=b\nc", &long] {
            assert!(bad.parse::<Label>().is_err(), "{bad:?}");
        }
        let label: Label = "branch=a=b".parse().expect("a label");
        assert_eq!((label.name(), label.value()), ("branch", "a=b"));
    }
}
