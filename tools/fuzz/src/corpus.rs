//! Stored inputs: one text file for each target, one input on each line, in hexadecimal digits.
//!
//! Invariants: the inputs ascend by length, then by content; none is there twice. So a difference between two
//! versions of a file is what a reviewer wants to see.

use std::fmt::Write;

/// Reads a file of inputs; `None` if it is not one.
#[must_use]
pub fn parse(text: &str) -> Option<Vec<Vec<u8>>> {
    text.lines().map(parse_line).collect()
}

/// Writes inputs as a file.
#[must_use]
pub fn render(mut inputs: Vec<Vec<u8>>) -> String {
    inputs.sort_by(|one, other| one.len().cmp(&other.len()).then_with(|| one.cmp(other)));
    inputs.dedup();
    let mut text = String::new();
    for input in inputs {
        for byte in input {
            let _infallible = write!(text, "{byte:02x}");
        }
        text.push('\n');
    }
    text
}

fn parse_line(line: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = line.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8; 2]| Some((digit(pair[0])? * 16 + digit(pair[1])?) as u8);
    rest.is_empty().then_some(())?;
    pairs.iter().map(byte).collect()
}
