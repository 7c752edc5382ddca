//! Virtual times as people read and write them.
//!
//! Invariant: what is printed can be read back, to the nanosecond.

use std::time::Duration;

/// Units, from the smallest, in nanoseconds.
const UNITS: [(&str, u64); 4] = [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];

/// A virtual time, such as `1.5s` or `20ms`.
///
/// # Errors
/// A text that is no number with a unit.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = UNITS.iter().find(|(name, _)| *name == &text[digits.len()..]);
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    // Parsing a number would take a sign too.
    let is_plain = [whole, part].iter().all(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let nanoseconds = unit.filter(|_| is_plain).and_then(|(_, unit)| {
        let whole = whole.parse::<u64>().ok()?.checked_mul(*unit)?;
        let digits = u32::try_from(part.len()).ok().filter(|digits| *digits <= 9)?;
        let part = if part.is_empty() { 0 } else { part.parse::<u64>().ok()? };
        whole.checked_add(part * unit / 10u64.pow(digits))
    });
    let error = || format!("{text:?} is no time: give a number and one of ns, us, ms, s");
    nanoseconds.map(Duration::from_nanos).ok_or_else(error)
}

/// A time in the largest unit that needs no fraction.
pub(crate) fn duration_text(time: Duration) -> String {
    let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let fits = |(_, unit): &&(&str, u64)| nanoseconds.is_multiple_of(*unit);
    let (name, unit) = UNITS.iter().rfind(fits).expect("nanoseconds fit");
    format!("{}{name}", nanoseconds / unit)
}

/// Seconds with all nine digits, for columns.
pub(crate) fn seconds_text(nanoseconds: u64) -> String {
    format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        for (text, nanoseconds) in [
            ("0s", 0),
            ("7ns", 7),
            ("1500us", 1_500_000),
            ("20ms", 20_000_000),
            ("3s", 3_000_000_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_nanos(nanoseconds)));
            assert_eq!(duration_text(Duration::from_nanos(nanoseconds)), text);
        }
        assert_eq!(parse_duration("1.25s"), Ok(Duration::from_millis(1_250)));
        assert_eq!(seconds_text(1_250_000_007), "1.250000007");
    }

    #[test]
    fn what_is_no_time_is_refused() {
        let texts = ["", "s", "5", "1.s5", "-1s", "+1s", "1.+5s", "1h", "99999999999999999s", "é"];
        for text in texts.into_iter().chain(["1.0000000001s"]) {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
