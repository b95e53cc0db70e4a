//! Build-IDs: the name of an image, whoever holds it.

use core::fmt;
use core::str::FromStr;

/// Shortest build-ID in bytes. The debuginfod protocol allows one byte; a linker never writes fewer than two.
pub const MIN_BUILD_ID_BYTES: usize = 2;
/// Longest build-ID in bytes: what libdebuginfod sends at most.
pub const MAX_BUILD_ID_BYTES: usize = 64;

/// An image's identity, 2 to 64 bytes, printed as lower-case hex.
///
/// It is the descriptor of the GNU build-ID note, or, for an image without one, the 16-byte
/// OpenTelemetry `htlhash` file ID.
///
/// ```
/// # use windlass_schema::BuildId;
/// let id: BuildId = "6be6a8c1".parse()?;
/// assert_eq!(id.as_bytes(), [0x6b, 0xe6, 0xa8, 0xc1]);
/// assert_eq!(id.to_string(), "6be6a8c1");
/// assert!("6BE6".parse::<BuildId>().is_err(), "upper case is another spelling, not another id");
/// # Ok::<(), windlass_schema::BuildIdError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildId {
    // Bytes past `len` are zero, so that the derived comparisons hold.
    bytes: [u8; MAX_BUILD_ID_BYTES],
    len: u8,
}

/// Why a text or byte string is no build-ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildIdError {
    /// Length out of range, in bytes.
    #[error("build-ID of {0} bytes, expected {MIN_BUILD_ID_BYTES} to {MAX_BUILD_ID_BYTES}")]
    Length(usize),
    /// An odd number of hex digits.
    #[error("build-ID with an odd number of hex digits ({0})")]
    OddDigits(usize),
    /// Something else than `0-9a-f`.
    #[error("build-ID with {0:?} at digit {1}, expected lower-case hex")]
    Digit(char, usize),
}

impl BuildId {
    /// Checks the length of `bytes`.
    pub fn new(bytes: &[u8]) -> Result<Self, BuildIdError> {
        if !(MIN_BUILD_ID_BYTES..=MAX_BUILD_ID_BYTES).contains(&bytes.len()) {
            return Err(BuildIdError::Length(bytes.len()));
        }
        let mut id = Self { bytes: [0; MAX_BUILD_ID_BYTES], len: bytes.len() as u8 };
        id.bytes[..bytes.len()].copy_from_slice(bytes);
        Ok(id)
    }

    /// The raw bytes, 2 to 64 of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl FromStr for BuildId {
    type Err = BuildIdError;

    fn from_str(text: &str) -> Result<Self, BuildIdError> {
        let digit = |at: usize| match text.as_bytes()[at] {
            c @ b'0'..=b'9' => Ok(c - b'0'),
            c @ b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(BuildIdError::Digit(
                text.get(at..).and_then(|rest| rest.chars().next()).unwrap_or('\u{fffd}'),
                at,
            )),
        };
        for at in 0..text.len() {
            digit(at)?;
        }
        if !text.len().is_multiple_of(2) {
            return Err(BuildIdError::OddDigits(text.len()));
        }
        let len = text.len() / 2;
        if !(MIN_BUILD_ID_BYTES..=MAX_BUILD_ID_BYTES).contains(&len) {
            return Err(BuildIdError::Length(len));
        }
        let mut bytes = [0; MAX_BUILD_ID_BYTES];
        for (at, byte) in bytes[..len].iter_mut().enumerate() {
            *byte = digit(2 * at)? << 4 | digit(2 * at + 1)?;
        }
        Self::new(&bytes[..len])
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BuildId({self})")
    }
}

#[cfg(feature = "std")]
impl serde::Serialize for BuildId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "std")]
impl<'de> serde::Deserialize<'de> for BuildId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Result<usize, BuildIdError>) {
        assert_eq!(text.parse::<BuildId>().map(|id| id.as_bytes().len()), expect);
    }

    #[test]
    fn text_form() {
        check("abcd", Ok(2));
        check(&"0f".repeat(64), Ok(64));
        check(&"0f".repeat(65), Err(BuildIdError::Length(65)));
        check("ab", Err(BuildIdError::Length(1)));
        check("", Err(BuildIdError::Length(0)));
        check("abc", Err(BuildIdError::OddDigits(3)));
        check("abCd", Err(BuildIdError::Digit('C', 2)));
        check("abßd", Err(BuildIdError::Digit('ß', 2)));
    }
}
