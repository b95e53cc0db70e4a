//! How much may a namespace take?
//!
//! A quota counts decoded bytes, each artefact for itself: what a build sends can be added up beforehand, and depends neither on
//! compression nor on what others have stored. An upload that does not fit is refused (413) with the quota's name and what
//! to do. Of what comes from upstream servers nothing is refused, since its reader did nothing wrong: the next
//! collection makes room.

use std::str::FromStr;

use crate::catalog::Usage;
use crate::error::ServiceError;
use crate::namespace::{Namespace, NamespaceError};
use crate::service::App;

/// What a namespace may take in decoded bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quota {
    /// `None` for each that no other quota is for, but for that of upstream servers.
    namespace: Option<Namespace>,
    bytes: u64,
}

/// A text that is no quota.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// No size.
    #[error(
        "{0:?} is no quota, expected NAMESPACE=SIZE or *=SIZE, SIZE in bytes or with K, M, G or T for powers of 1024"
    )]
    Pattern(String),
    /// No namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

impl FromStr for Quota {
    type Err = QuotaError;

    fn from_str(text: &str) -> Result<Self, QuotaError> {
        let malformed = || QuotaError::Pattern(text.chars().take(100).collect());
        let (name, size) = text.split_once('=').ok_or_else(malformed)?;
        let unit = size.bytes().last().and_then(|unit| b"KMGT".iter().position(|known| *known == unit));
        let (digits, power) = match unit {
            Some(unit) => (&size[..size.len() - 1], unit as u32 + 1),
            None => (size, 0),
        };
        let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1024_u64.pow(power)));
        let namespace = if name == "*" { None } else { Some(name.parse()?) };
        Ok(Self { namespace, bytes: bytes.ok_or_else(malformed)? })
    }
}

/// The quotas of a service.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quotas(Vec<Quota>);

impl Quotas {
    pub(crate) fn new(quotas: &[Quota]) -> Self {
        Self(quotas.to_vec())
    }

    /// What `namespace` may take in bytes, if that is limited.
    pub(crate) fn of(&self, namespace: &Namespace) -> Option<u64> {
        let own = self.0.iter().rfind(|quota| quota.namespace.as_ref() == Some(namespace));
        let others = || self.0.iter().rfind(|quota| quota.namespace.is_none());
        own.or_else(|| others().filter(|_| *namespace != Namespace::upstream())).map(|quota| quota.bytes)
    }

    /// [`Quotas::of`] for uploads.
    pub(crate) fn of_uploads(&self, namespace: &Namespace) -> Option<u64> {
        self.of(namespace).filter(|_| *namespace != Namespace::upstream())
    }
}

/// Refuses `more_bytes` if they do not fit beside what `namespace` has stored. Unfinished uploads count as long as they
/// are not finished by what comes: the `own_unfinished_bytes` are of the one that is going on.
pub(crate) async fn admit(
    app: &App,
    namespace: &Namespace,
    more_bytes: u64,
    own_unfinished_bytes: Option<u64>,
) -> Result<(), ServiceError> {
    let Some(quota_bytes) = app.quotas.of_uploads(namespace) else { return Ok(()) };
    let usage = app.catalog(|catalog| catalog.usage()).await?;
    let usage = usage.into_iter().find(|usage| usage.namespace == *namespace);
    let (stored, unfinished) =
        usage.map_or((0, 0), |Usage { bytes, unfinished_bytes, .. }| (bytes, unfinished_bytes));
    let unfinished = own_unfinished_bytes.map_or(0, |own| unfinished.saturating_sub(own));
    let used_bytes = stored.saturating_add(unfinished);
    match used_bytes.saturating_add(more_bytes) <= quota_bytes {
        true => Ok(()),
        false => {
            Err(ServiceError::Quota { namespace: namespace.clone(), used_bytes, quota_bytes, more_bytes })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_by_name_and_the_last_one_counts() {
        let quotas = ["try=5M", "*=2K", "main=7", "try=1T", "upstream=9"];
        let quotas = Quotas::new(&quotas.map(|text| text.parse().expect(text)));
        let of = |name: &str| quotas.of(&name.parse().expect("a name"));
        assert_eq!([of("try"), of("main"), of("other")], [Some(1 << 40), Some(7), Some(2048)]);
        assert_eq!(of("upstream"), Some(9));
        assert_eq!(quotas.of_uploads(&Namespace::upstream()), None);
        let others = Quotas::new(&["*=1".parse().expect("a quota")]);
        assert_eq!(others.of(&Namespace::upstream()), None);
        for bad in ["", "try", "try=", "try=K", "try=-1", "try=1X", "TRY=1", "try=99999999T", "*=1 G"] {
            assert!(bad.parse::<Quota>().is_err(), "{bad:?}");
        }
    }
}
