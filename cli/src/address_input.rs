//! Addresses as people and scripts write them: hex, with or without `0x`, as arguments or line by
//! line on stdin.

use std::io::BufRead;

use windlass_schema::ImageAddress;

/// Parses a hex address; the error names it.
pub(crate) fn parse(text: &str) -> Result<ImageAddress, String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    // `from_str_radix` would take a sign.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("{text:?} is no address (expected hex, such as 0x1139)"));
    }
    u64::from_str_radix(digits, 16)
        .map(ImageAddress::new)
        .map_err(|_| format!("address {text:?} does not fit into 64 bits"))
}

/// Reads `input` to its end: one address a line, blank lines ignored.
pub(crate) fn read_lines(input: impl BufRead) -> anyhow::Result<Vec<ImageAddress>> {
    let mut addresses = Vec::new();
    for (number, line) in input.lines().enumerate() {
        let line = line?;
        if !line.trim().is_empty() {
            let address = parse(line.trim())
                .map_err(|error| anyhow::anyhow!("line {} of stdin: {error}", number + 1))?;
            addresses.push(address);
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Option<u64>) {
        assert_eq!(parse(text).ok().map(ImageAddress::get), expect, "{text:?}");
    }

    #[test]
    fn addresses_are_hex() {
        check("0x1139", Some(0x1139));
        check("1139", Some(0x1139));
        check("0XfF", Some(0xff));
        check("ffffffffffffffff", Some(u64::MAX));
        check("10000000000000000", None);
        check("", None);
        check("0x", None);
        check("+1", None);
        check("main", None);
        check("é", None);
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = read_lines("0x1\n\nzz\n".as_bytes()).unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains("zz"), "{error}");
        assert_eq!(read_lines("1\n 2 \n".as_bytes()).unwrap().len(), 2);
    }
}
