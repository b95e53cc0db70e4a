//! Which images may go, and why?
//!
//! Others keep all for good (Pyroscope), or 90 days after the last use, releases or not (Sentry). Here an image goes when
//!
//! - nothing that a namespace has of it was used for longer than `--unused-days`, and no label keeps it; or
//! - its namespace takes more than nine tenths of its quota, and it is the one that was used longest ago among those that no label
//!   keeps and that nobody used for a day.
//!
//! Without `--unused-days` and quotas none goes.

use std::collections::BTreeMap;
use std::str::FromStr;

use windlass_schema::BuildId;

use crate::catalog::{Image, Label, Labelled};
use crate::uses::USE_INTERVAL_S;

/// Uses of this long before now, in seconds, may not be on record yet: the interval at which they are, and ten minutes for whatever
/// holds a write up.
const UNRECORDED_S: u64 = USE_INTERVAL_S + 600;
/// What was used within this time stays in a namespace beyond its quota, in seconds: somebody works with it.
const IN_USE_S: u64 = 24 * 3600;
const DAY_S: u64 = 24 * 3600;

/// Which labels keep an image: `NAME`, `NAME=VALUE`, or `NAME=PREFIX*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keep {
    name: String,
    value: Option<String>,
}

impl FromStr for Keep {
    type Err = crate::catalog::LabelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A name alone is checked as that of a label.
        let label: Label = if text.contains('=') { text.parse()? } else { format!("{text}=x").parse()? };
        let value = text.contains('=').then(|| label.value().to_owned());
        Ok(Self { name: label.name().to_owned(), value })
    }
}

impl Keep {
    fn keeps(&self, label: &Label) -> bool {
        let fits = |wanted: &String| match wanted.strip_suffix('*') {
            Some(prefix) => label.value().starts_with(prefix),
            None => label.value() == wanted,
        };
        label.name() == self.name && self.value.as_ref().is_none_or(fits)
    }
}

/// What is kept for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// For how long images stay that nobody uses, in days; for good if `None`.
    pub unused_days: Option<u64>,
    /// Labels that keep an image whatever its age.
    pub keep: Vec<Keep>,
    /// For how long profiles stay, in days; for good if `None`.
    pub profile_days: Option<u64>,
}

impl Default for Retention {
    fn default() -> Self {
        let keep = ["release", "pin"].map(|name| Keep { name: name.to_owned(), value: None });
        Self { unused_days: None, keep: keep.to_vec(), profile_days: None }
    }
}

impl Retention {
    /// Since when an image must have been unused to go for its age, in seconds since 1970.
    pub(crate) fn unused_since_s(&self, now_s: u64) -> Option<u64> {
        let unused_s = self.unused_days?.saturating_mul(DAY_S).saturating_add(UNRECORDED_S);
        Some(now_s.saturating_sub(unused_s))
    }

    /// Before when profiles must have ended to go, in nanoseconds since 1970.
    pub(crate) fn profiles_before_ns(&self, now_s: u64) -> Option<u64> {
        let kept_s = self.profile_days?.saturating_mul(DAY_S);
        Some(now_s.saturating_sub(kept_s).saturating_mul(1_000_000_000))
    }

    /// The label that keeps an image.
    pub(crate) fn kept_by<'a>(&self, labels: &'a [Labelled]) -> Option<&'a Label> {
        let mut labels = labels.iter().map(|labelled| &labelled.label);
        labels.find(|label| self.keep.iter().any(|keep| keep.keeps(label)))
    }
}

/// Images of one namespace to go for its quota: those that were used longest ago, as many as it takes and no more.
#[derive(Debug)]
pub(crate) struct Excess {
    bytes: u64,
    unused_since_s: u64,
    /// By last use.
    oldest: BTreeMap<(u64, BuildId), Image>,
    gathered: u64,
}

impl Excess {
    /// What to free of a namespace that takes `used_bytes`, so that a tenth of its quota is free. `None`: it is.
    pub(crate) fn new(used_bytes: u64, quota_bytes: u64, now_s: u64) -> Option<Self> {
        let bytes = used_bytes.checked_sub(quota_bytes - quota_bytes / 10).filter(|bytes| *bytes > 0)?;
        let unused_since_s = now_s.saturating_sub(IN_USE_S + UNRECORDED_S);
        Some(Self { bytes, unused_since_s, oldest: Default::default(), gathered: 0 })
    }

    /// Whether `image` would be among those that go, labels aside.
    pub(crate) fn wants(&self, image: &Image) -> bool {
        let is_older = || self.oldest.last_key_value().is_none_or(|((used_s, _), _)| image.used_s < *used_s);
        image.used_s < self.unused_since_s && (self.gathered < self.bytes || is_older())
    }

    /// Adds an image that [`Excess::wants`], and lets go of later ones that are not needed with it.
    pub(crate) fn add(&mut self, image: Image) {
        self.gathered += image.bytes;
        self.oldest.insert((image.used_s, image.build_id), image);
        while let Some((last, bytes)) = self.oldest.last_key_value().map(|(last, image)| (*last, image.bytes))
            && self.gathered - bytes >= self.bytes
        {
            self.oldest.remove(&last);
            self.gathered -= bytes;
        }
    }

    /// Those that go, in the order of their last use.
    pub(crate) fn into_images(self) -> Vec<Image> {
        self.oldest.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::Namespace;

    fn labelled(text: &str) -> Labelled {
        Labelled { namespace: Namespace::release(), label: text.parse().expect("a label"), since_s: 0 }
    }

    #[test]
    fn labels_keep_by_name_value_or_beginning() {
        let keep = ["release", "branch=main", "tag=v1.*"].map(|text| text.parse().expect(text));
        let retention = Retention { keep: keep.to_vec(), ..Retention::default() };
        for (label, expect) in [
            ("release=7", true),
            ("releases=7", false),
            ("branch=main", true),
            ("branch=main2", false),
            ("tag=v1.2", true),
            ("tag=v2", false),
        ] {
            let labels = [labelled("other=1"), labelled(label)];
            assert_eq!(retention.kept_by(&labels).is_some(), expect, "{label}");
        }
        for bad in ["", "=x", "A", "a b"] {
            assert!(bad.parse::<Keep>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_use_that_may_not_be_on_record_counts() {
        let retention = Retention { unused_days: Some(2), ..Retention::default() };
        assert_eq!(retention.unused_since_s(1_000_000), Some(1_000_000 - 2 * DAY_S - 4200));
        assert_eq!(Retention::default().unused_since_s(1_000_000), None);
    }

    #[test]
    fn a_quota_takes_the_oldest_and_no_more_than_it_must() {
        const NOW_S: u64 = 10_000_000;
        let image = |number: u8, days: u64, bytes: u64| Image {
            build_id: BuildId::new(&[number; 4]).expect("an ID"),
            namespace: Namespace::release(),
            file_name: String::new(),
            artefacts: 1,
            bytes,
            stored_s: 0,
            used_s: NOW_S - days * DAY_S,
        };
        let images = [image(1, 9, 50), image(2, 5, 100), image(3, 1, 900), image(4, 7, 30), image(5, 8, 20)];
        let going = |used, quota| {
            let mut excess = Excess::new(used, quota, NOW_S)?;
            for image in &images {
                if excess.wants(image) {
                    excess.add(image.clone());
                }
            }
            Some(excess.into_images().iter().map(|image| image.build_id.as_bytes()[0]).collect::<Vec<_>>())
        };
        assert_eq!(going(900, 1000), None);
        assert_eq!(going(901, 1000), Some(vec![1]));
        assert_eq!(going(970, 1000), Some(vec![1, 5]));
        assert_eq!(going(971, 1000), Some(vec![1, 5, 4]));
        assert_eq!(going(5000, 1000), Some(vec![1, 5, 4, 2]), "what is in use stays");
    }
}
