//! Outline: a tree of named values in a fixed order, shown as indented text or as JSON.
//!
//! Invariant: both forms hold the same values under the same names.

use std::fmt::{Display, Write as _};

use serde::ser::{Serialize, SerializeMap, Serializer};

/// A value, a list, or named parts.
#[derive(Clone, PartialEq, Debug)]
pub enum Outline {
    /// A word or a line.
    Text(String),
    /// A number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
    /// Nothing there.
    Absent,
    /// Several of a kind.
    List(Vec<Outline>),
    /// Named parts, in this order.
    Fields(Vec<(&'static str, Outline)>),
}

impl Outline {
    /// Anything that is shown as it prints itself.
    pub fn text(value: impl Display) -> Outline {
        Outline::Text(value.to_string())
    }

    /// A number, or nothing.
    pub fn optional(value: Option<u64>) -> Outline {
        value.map_or(Outline::Absent, Outline::Number)
    }

    /// A list.
    pub fn list(parts: impl IntoIterator<Item = Outline>) -> Outline {
        Outline::List(parts.into_iter().collect())
    }

    /// The text form of a part with its name.
    #[must_use]
    pub fn render(&self, name: &str) -> String {
        let mut text = String::new();
        self.write(&mut text, name, 0);
        text
    }

    fn write(&self, text: &mut String, name: &str, depth: usize) {
        let indent = "  ".repeat(depth);
        // Writing to a string cannot fail.
        match self {
            Outline::Fields(fields) => {
                let _ = writeln!(text, "{indent}{name}");
                fields.iter().for_each(|(name, part)| part.write(text, name, depth + 1));
            }
            Outline::List(parts) if !parts.is_empty() => {
                let _ = writeln!(text, "{indent}{name} ({})", parts.len());
                for (index, part) in parts.iter().enumerate() {
                    match part.line() {
                        Some(line) => drop(writeln!(text, "{indent}  {line}")),
                        None => part.write(text, &format!("{name} {index}"), depth + 1),
                    }
                }
            }
            value => {
                let width = 22_usize.saturating_sub(indent.len());
                let _ = writeln!(text, "{indent}{name:<width$} {}", value.scalar());
            }
        }
    }

    /// The part on one line, if it has no parts of parts.
    fn line(&self) -> Option<String> {
        let Outline::Fields(fields) = self else { return self.is_scalar().then(|| self.scalar()) };
        if !fields.iter().all(|(_, part)| part.is_scalar()) {
            return None;
        }
        let pair = |(name, part): &(&str, Outline)| format!("{name}={}", part.scalar());
        Some(fields.iter().map(pair).collect::<Vec<_>>().join(" "))
    }

    fn is_scalar(&self) -> bool {
        !matches!(self, Outline::Fields(_) | Outline::List(_))
    }

    fn scalar(&self) -> String {
        match self {
            Outline::Text(text) => text.clone(),
            Outline::Number(number) => number.to_string(),
            Outline::Flag(true) => "yes".to_owned(),
            Outline::Flag(false) => "no".to_owned(),
            Outline::Absent | Outline::List(_) => "none".to_owned(),
            Outline::Fields(_) => String::new(),
        }
    }
}

impl Serialize for Outline {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Outline::Text(text) => serializer.serialize_str(text),
            Outline::Number(number) => serializer.serialize_u64(*number),
            Outline::Flag(flag) => serializer.serialize_bool(*flag),
            Outline::Absent => serializer.serialize_none(),
            Outline::List(parts) => serializer.collect_seq(parts),
            Outline::Fields(fields) => {
                let mut map = serializer.serialize_map(Some(fields.len()))?;
                for (name, part) in fields {
                    map.serialize_entry(name, part)?;
                }
                map.end()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_show_the_same() {
        let part =
            |cp| Outline::Fields(vec![("cp", Outline::Number(cp)), ("name", Outline::Absent)]);
        let outline = Outline::Fields(vec![
            ("state", Outline::text("valid")),
            ("clean", Outline::Flag(true)),
            ("records", Outline::list([part(1), part(2)])),
            ("volumes", Outline::list([])),
        ]);
        let text = outline.render("header");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "header");
        assert_eq!(lines[1], "  state                valid");
        assert_eq!(
            lines[3..],
            [
                "  records (2)",
                "    cp=1 name=none",
                "    cp=2 name=none",
                "  volumes              none",
            ]
        );
        let json = serde_json::to_string(&outline).unwrap();
        let records = r#"[{"cp":1,"name":null},{"cp":2,"name":null}]"#;
        let whole = format!(r#"{{"state":"valid","clean":true,"records":{records},"volumes":[]}}"#);
        assert_eq!(json, whole);
    }
}
