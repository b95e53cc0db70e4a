//! How much memory may a skeleton take?
//!
//! Anyone can run a file of which a skeleton has hundreds of megabytes, and the packages give the agent 256 MiB. So a skeleton
//! is never held as a whole: it is compressed while it is read, and what that comes to is bounded. What does not fit is
//! tried without its symbols, which no table is made of; what does not fit then is refused.

use std::io::{self, Write};

use sha2::{Digest as _, Sha256};

use crate::compression::ZSTD_LEVEL;
use crate::image_file::CopyBytes;
use crate::skeleton::{Extent, Skeleton, SkeletonError};

/// Most bytes of a skeleton that is compressed. The largest known, of a Go program of 700 MB, has 32 million; unstripped
/// compilers and browsers have ten to thirty.
pub const MAX_PACKED_BYTES: usize = 40 * 1024 * 1024;

/// A skeleton, as it is sent.
pub struct PackedSkeleton {
    /// Of what it is unpacked, in hex.
    pub sha256: String,
    /// zstd (RFC 8878).
    pub zstd: Vec<u8>,
}

/// The skeleton of the image `elf`, with all its code if `with_code`; its symbols are in it if there is room.
pub(crate) fn packed_skeleton<'data, R: CopyBytes<'data>>(
    elf: R,
    with_code: bool,
) -> Result<PackedSkeleton, SkeletonError> {
    within(elf, with_code, MAX_PACKED_BYTES)
}

fn within<'data, R: CopyBytes<'data>>(
    elf: R,
    code: bool,
    limit: usize,
) -> Result<PackedSkeleton, SkeletonError> {
    match pack(elf, Extent { code, symbols: true }, limit) {
        Err(error) if error.is_of_size() => pack(elf, Extent { code, symbols: false }, limit),
        packed => packed,
    }
}

fn pack<'data, R: CopyBytes<'data>>(
    elf: R,
    extent: Extent,
    limit: usize,
) -> Result<PackedSkeleton, SkeletonError> {
    let skeleton = Skeleton::new(elf, extent)?;
    let bytes = skeleton.bytes();
    let too_large = SkeletonError::Packed { bytes, limit };
    let mut packer = Packer::new(bytes, limit).map_err(|_| too_large.clone())?;
    match skeleton.write(&mut packer) {
        Err(_) if packer.encoder.get_ref().is_full => Err(too_large),
        Err(error) => Err(error),
        Ok(()) => packer.finish().map_err(|_| too_large),
    }
}

/// What goes in is hashed and compressed.
struct Packer {
    hash: Sha256,
    encoder: zstd::Encoder<'static, Bounded>,
}

impl Packer {
    fn new(bytes: u64, limit: usize) -> io::Result<Self> {
        let mut encoder =
            zstd::Encoder::new(Bounded { bytes: Vec::new(), limit, is_full: false }, ZSTD_LEVEL)?;
        encoder.set_pledged_src_size(Some(bytes))?;
        Ok(Self { hash: Sha256::new(), encoder })
    }

    fn finish(self) -> io::Result<PackedSkeleton> {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(PackedSkeleton { sha256, zstd: self.encoder.finish()?.bytes })
    }
}

impl Write for Packer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.encoder.write_all(bytes)?;
        self.hash.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.flush()
    }
}

/// Bytes up to a limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
    is_full: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.limit - self.bytes.len();
        if bytes.len() > room {
            self.is_full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // As much as the limit at most, which doubling might go beyond.
        if bytes.len() > self.bytes.capacity() - self.bytes.len() {
            self.bytes.reserve_exact(self.bytes.capacity().clamp(bytes.len(), room));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use object::{Object as _, ObjectSection as _};

    use super::*;
    use crate::skeleton::skeleton;

    fn own() -> Vec<u8> {
        let path = std::env::current_exe().expect("it runs");
        std::fs::read(path).expect("it is there")
    }

    fn unpacked(packed: &PackedSkeleton) -> Vec<u8> {
        zstd::decode_all(&packed.zstd[..]).expect("it is compressed")
    }

    #[test]
    fn what_is_packed_is_the_skeleton() {
        let image = own();
        let packed = packed_skeleton(&image[..], false).expect("it is small");
        let expect = skeleton(&image[..]).expect("it is small");
        assert_eq!(unpacked(&packed), expect);
        let hash = Sha256::digest(&expect);
        assert_eq!(packed.sha256, hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    }

    #[test]
    fn symbols_are_left_out_before_a_skeleton_is_refused() {
        let image = own();
        let whole = packed_skeleton(&image[..], false).expect("it is small").zstd.len();
        let without = within(&image[..], false, whole - 1).expect("it fits without symbols");
        assert!(without.zstd.len() < whole);
        let skeleton = unpacked(&without);
        let skeleton = object::File::parse(&skeleton[..]).expect("it is an ELF file");
        let bytes = |name| {
            let section = skeleton.section_by_name(name).expect("every section has its header");
            section.data().expect("it is inside").len()
        };
        assert_eq!((bytes(".symtab"), bytes(".strtab")), (0, 0));
        assert!(bytes(".eh_frame") > 0);
        assert!(skeleton.build_id().is_ok_and(|id| id.is_some()));
        let limit = without.zstd.len() - 1;
        let refused = within(&image[..], false, limit).err().expect("it does not fit");
        assert!(
            matches!(refused, SkeletonError::Packed { limit: stated, .. } if stated == limit),
            "{refused}"
        );
        assert!(within(&image[..], false, 0).is_err());
    }
}
