//! In which coding do profiles travel, and lie in the spool?
//!
//! zstd makes the smallest batches in the least time, and the service takes it; of OTLP receivers in general only
//! gzip is asked (OTLP specification, OTLP/HTTP).

use std::io::{self, Write as _};

/// zstd level of what is sent: the default, a good ratio at some 200 MB/s.
pub(crate) const ZSTD_LEVEL: i32 = 3;

/// A coding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// zstd (RFC 8878).
    #[default]
    Zstd,
    /// gzip (RFC 1952).
    Gzip,
}

impl Compression {
    /// Each.
    pub const ALL: [Self; 2] = [Self::Zstd, Self::Gzip];

    /// Its name as `Content-Encoding`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }

    /// How names of files end that hold it.
    pub const fn ending(self) -> &'static str {
        match self {
            Self::Zstd => "zst",
            Self::Gzip => "gz",
        }
    }

    /// `content` in this coding.
    pub fn compress(self, content: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Zstd => zstd::bulk::compress(content, ZSTD_LEVEL),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(content)?;
                encoder.finish()
            }
        }
    }
}
