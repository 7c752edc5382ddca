//! Quantity: sizes and durations as operators write them, `32MiB` and `100us`. Invariant: a number without a unit is
//! taken only where it is exact (`4096` bytes); what does not fit is refused, never rounded.

use std::time::Duration;

use twinpoint_core::units::BLOCK_BYTES;

/// Sizes by their suffix.
const SIZES: [(&str, u64); 6] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("PiB", 1 << 50),
    ("B", 1),
];
/// Durations by their suffix, in nanoseconds.
const DURATIONS: [(&str, u64); 6] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("min", 60_000_000_000),
    ("s", 1_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a size in bytes: `4096`, `4KiB`, `1MiB`, `2GiB`.
///
/// # Errors
/// What a size looks like.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong =
        || "a size is a whole number with B, KiB, MiB, GiB or TiB, such as 512MiB".to_owned();
    let (digits, suffix) = split(text);
    let unit = if suffix.is_empty() { Some(1) } else { unit_of(&SIZES, suffix) };
    let bytes = unit.and_then(|unit| digits.parse::<u64>().ok()?.checked_mul(unit));
    bytes.ok_or_else(wrong)
}

/// As [`parse_bytes`], for what consists of whole blocks.
///
/// # Errors
/// What such a size looks like.
pub fn parse_blocks(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
        return Err("the size is a positive multiple of 4KiB, such as 1GiB".to_owned());
    }
    Ok(bytes)
}

/// Reads a duration: `100us`, `5ms`, `2s`, `1min`.
///
/// # Errors
/// What a duration looks like.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a duration is a whole number with us, ms, s or min, such as 500ms".to_owned();
    let (digits, suffix) = split(text);
    let unit = unit_of(&DURATIONS, suffix);
    let nanoseconds = unit.and_then(|unit| digits.parse::<u64>().ok()?.checked_mul(unit));
    nanoseconds.map(Duration::from_nanos).ok_or_else(wrong)
}

/// As [`parse_duration`]; a number alone means seconds.
///
/// # Errors
/// What a duration looks like.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).or_else(|_| parse_duration(text))
}

/// A size as an operator would write it: the largest unit that divides it.
#[must_use]
pub fn bytes_flag(bytes: u64) -> String {
    let fits = |(_, unit): &&(&str, u64)| bytes >= *unit && bytes.is_multiple_of(*unit);
    match SIZES[..5].iter().rev().find(fits) {
        Some((suffix, unit)) => format!("{}{suffix}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

fn split(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().take_while(u8::is_ascii_digit).count())
}

fn unit_of(units: &[(&str, u64)], suffix: &str) -> Option<u64> {
    units.iter().find(|(name, _)| *name == suffix).map(|(_, unit)| *unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [("0", 0), ("4096", 4096), ("7B", 7), ("4KiB", 4096), ("2GiB", 2 << 30)];
        for (text, bytes) in good {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "KiB", "4KB", "4k", "4 KiB", "-1", "1.5GiB", "99999999999999TiB", "1gib"] {
            assert!(parse_bytes(text).unwrap_err().contains("such as"), "{text}");
        }
        for text in ["0", "0GiB", "4097", "1KiB", "x"] {
            assert!(parse_blocks(text).unwrap_err().contains("such as"), "{text}");
        }
        assert_eq!(parse_blocks("8KiB"), Ok(8192));
        let flags = [(0, "0B"), (4095, "4095B"), (4096, "4KiB"), (3 << 30, "3GiB")];
        for (bytes, text) in flags {
            assert_eq!(bytes_flag(bytes), text);
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
    }

    #[test]
    fn durations() {
        let good = [("100us", 100_000), ("5ms", 5_000_000), ("2s", 2_000_000_000), ("0ms", 0)];
        for (text, nanoseconds) in good {
            assert_eq!(parse_duration(text), Ok(Duration::from_nanos(nanoseconds)), "{text}");
        }
        for text in ["", "5", "s", "5sec", "-5s", "1.5s", "99999999999999999h"] {
            assert!(parse_duration(text).unwrap_err().contains("such as"), "{text}");
        }
        assert_eq!(parse_seconds("3"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_seconds("3ms"), Ok(Duration::from_millis(3)));
    }
}
