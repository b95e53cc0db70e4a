//! How a table travels. The one place that knows.

use anyhow::Result;
use windlass_schema::wire;

/// Level of zstd for what a peer sends: it is compressed once and fetched by a fleet.
pub(crate) const ZSTD_LEVEL: i32 = 19;

/// The bytes that travel for a table.
pub(crate) fn wire_form(table: &[u8]) -> Result<Vec<u8>> {
    Ok(wire::pack(table)?)
}

/// The table that arrives.
pub(crate) fn from_wire(wire: &[u8]) -> Result<Vec<u8>> {
    Ok(wire::unpack(wire)?)
}

/// What one sends without a format of one's own.
pub(crate) fn compress(bytes: &[u8]) -> Result<Vec<u8>> {
    Ok(zstd::bulk::compress(bytes, ZSTD_LEVEL)?)
}

/// The inverse of [`compress`].
pub(crate) fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
    Ok(zstd::stream::decode_all(bytes)?)
}
