//! Who may write.

use axum::http::{HeaderMap, header};

use crate::content_hash::ContentHash;
use crate::error::ServiceError;

/// The rule for writes. The token itself is not kept, only its hash.
pub(crate) struct Access {
    token: Option<ContentHash>,
}

impl Access {
    /// With a token, each write must send it; without, everyone may write.
    pub(crate) fn new(token: Option<&str>) -> Self {
        Self { token: token.map(|token| ContentHash::of(token.trim().as_bytes())) }
    }

    /// Whether a request with these headers may write.
    pub(crate) fn check_write(&self, headers: &HeaderMap) -> Result<(), ServiceError> {
        let Some(expected) = &self.token else {
            return Ok(());
        };
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
            .map(|token| ContentHash::of(token.trim_ascii()));
        // Every byte of the hashes is compared, so the time taken says nothing about the token.
        let differing = given.map(|given| {
            given.as_bytes().iter().zip(expected.as_bytes()).fold(0, |bits, (a, b)| bits | (a ^ b))
        });
        if differing == Some(0) { Ok(()) } else { Err(ServiceError::Unauthorized) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens() {
        let access = Access::new(Some("secret\n"));
        for (value, expect) in [
            (Some("Bearer secret"), true),
            (Some("Bearer secre"), false),
            (Some("Bearer "), false),
            (Some("secret"), false),
            (Some("Basic secret"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            assert_eq!(access.check_write(&headers).is_ok(), expect, "{value:?}");
        }
        assert!(Access::new(None).check_write(&HeaderMap::new()).is_ok());
    }
}
