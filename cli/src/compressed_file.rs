//! Compressed files, which are named by mistake: what they are, and how to get at what is in them.
//!
//! Distributions compress kernel modules and core dumps; an answer that such a file is no ELF file is right and
//! of no help. The library has no decompressor of xz, so the way out is the user's own.

/// A compression format of whole files: name, first bytes, and the program that undoes it.
struct Format {
    name: &'static str,
    magic: &'static [u8],
    program: &'static str,
}

/// RFC 1952; The .xz File Format 1.1, 2.1.1.1; RFC 8878, 3.1.1; bzip2's block sizes follow its letters; LZ4 Frame
/// Format 1.6.
const FORMATS: [Format; 5] = [
    Format { name: "gzip", magic: &[0x1f, 0x8b], program: "gzip -dk" },
    Format { name: "xz", magic: b"\xfd7zXZ\0", program: "xz -dk" },
    Format { name: "zstd", magic: &[0x28, 0xb5, 0x2f, 0xfd], program: "zstd -d" },
    Format { name: "bzip2", magic: b"BZh", program: "bzip2 -dk" },
    Format { name: "lz4", magic: &[0x04, 0x22, 0x4d, 0x18], program: "lz4 -d" },
];

/// Fails for a compressed file, naming what it is and what to do.
pub(crate) fn refuse(bytes: &[u8]) -> anyhow::Result<()> {
    match FORMATS.iter().find(|format| bytes.starts_with(format.magic)) {
        None => Ok(()),
        Some(Format { name, program, .. }) => {
            anyhow::bail!(
                "a file compressed by {name}: decompress it first (`{program} FILE`) and name the result"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_files_are_told_from_others() {
        let error = |bytes: &[u8]| refuse(bytes).unwrap_err().to_string();
        assert_eq!(
            error(b"\xfd7zXZ\0\0\x04"),
            "a file compressed by xz: decompress it first (`xz -dk FILE`) and name the result"
        );
        assert!(error(&[0x1f, 0x8b, 8]).starts_with("a file compressed by gzip"));
        assert!(error(&[0x28, 0xb5, 0x2f, 0xfd, 4]).contains("`zstd -d FILE`"));
        for other in [&b"\x7fELF"[..], b"", &[0x1f], b"WLUT"] {
            refuse(other).unwrap();
        }
    }
}
