//! Output: what goes to stdout. Invariant: a reader that leaves early (`| head`) ends the program quietly.

use std::io::{ErrorKind, Write};

use serde::Serialize;

/// Prints text as it is.
pub fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let result = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    if let Err(error) = result {
        // Nobody reads on: not this program's failure. Anything else is, and there is no better place to say so.
        let code = if error.kind() == ErrorKind::BrokenPipe { 0 } else { 1 };
        std::process::exit(code);
    }
}

/// Prints one line of JSON.
pub fn print_json(value: &impl Serialize) {
    let mut text = serde_json::to_string(value).expect("what is printed is plain data");
    text.push('\n');
    print(&text);
}
