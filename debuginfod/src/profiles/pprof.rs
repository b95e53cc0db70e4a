//! pprof profiles as files: gzipped protobuf.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use prost::Message;
use windlass_schema::pprof::Profile;

use super::decoded_size::{self, MAX_DECODED_BYTES};
use crate::error::ServiceError;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Decodes a profile, gzipped or not, of at most `limit` bytes uncompressed.
pub(crate) fn decode_pprof(bytes: &[u8], limit: u64) -> Result<Profile, ServiceError> {
    let malformed =
        |why: &dyn ToString| ServiceError::Malformed(format!("not a pprof profile: {}", why.to_string()));
    let mut plain = Vec::new();
    let bytes = if bytes.starts_with(&GZIP_MAGIC) {
        let mut decoder = MultiGzDecoder::new(bytes).take(limit + 1);
        decoder.read_to_end(&mut plain).map_err(|e| malformed(&e))?;
        if plain.len() as u64 > limit {
            return Err(ServiceError::TooLarge { limit });
        }
        &plain
    } else {
        bytes
    };
    decoded_size::check(bytes, &decoded_size::PPROF, MAX_DECODED_BYTES)?;
    Profile::decode(bytes).map_err(|e| malformed(&e))
}

/// Encodes and gzips a profile.
pub(crate) fn encode_pprof(profile: &Profile) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&profile.encode_to_vec())?;
    encoder.finish()
}
