//! A broken rule is a panic: here it is caught and becomes words, a place, and a rule to compare with others.
//!
//! Invariant: panics of threads that play no history look as they always do.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

/// A panic that was caught.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Caught {
    /// What it said.
    pub text: String,
    /// The file and line.
    pub place: String,
}

thread_local! {
    /// Where this thread's history broke; none while no history is played.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

static HOOK: Once = Once::new();

/// Runs `work`; a panic in it prints nothing.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, Caught> {
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            let place = info.location().map(|at| format!("{}:{}", at.file(), at.line()));
            let is_ours = PLACE.with_borrow_mut(|known| {
                known.as_mut().map(|known| *known = place.unwrap_or_default()).is_some()
            });
            if !is_ours {
                before(info);
            }
        }));
    });
    let outer = PLACE.replace(Some(String::new()));
    let result = catch_unwind(AssertUnwindSafe(work));
    let place = PLACE.replace(outer).unwrap_or_default();
    result.map_err(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Caught { text: text.unwrap_or_else(|| "a panic without words".to_owned()), place }
    })
}

impl Caught {
    /// What two failures of the same rule have in common: the place, and the words up to the first value.
    pub fn rule(&self) -> String {
        let words = self.text.split(['{', '[', '(']).next().unwrap_or_default();
        let mut rule = format!("{}: ", self.place);
        let mut in_number = false;
        for character in words.trim().chars() {
            let is_digit = character.is_ascii_digit();
            match (is_digit, in_number) {
                (true, true) => {}
                (true, false) => rule.push('#'),
                _ => rule.push(character),
            }
            in_number = is_digit;
        }
        rule
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_rule_without_its_numbers() {
        let caught = |n: u64| {
            catch(|| panic!("CP {n} is lost on node 1: {:?}", [n])).expect_err("it panics")
        };
        let (one, other) = (caught(7), caught(1_234));
        assert_eq!(one.text, "CP 7 is lost on node 1: [7]");
        assert_eq!(one.rule(), other.rule());
        assert!(one.rule().ends_with(": CP # is lost on node #:"), "{}", one.rule());
        assert!(one.place.contains("panics.rs:"), "{}", one.place);
        assert_eq!(catch(|| 5), Ok(5));
    }
}
