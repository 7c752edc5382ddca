//! Word limit: which troubles are worth a line of the log.
//!
//! Set-ups are tried again every few seconds for as long as it takes, and strangers may call as often as they like.
//! Invariants: a trouble that stays the same is told once; one that comes and goes, once a minute at most; of
//! strangers, one line in ten seconds with the number of those left out.

use std::time::{Duration, Instant};

use super::trouble::TroubleKey;

/// A trouble that alternates with others is told again after this time.
const REPEAT_AFTER: Duration = Duration::from_secs(60);
/// A trouble that passes by itself is told when it lasts longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Strangers have one line in this time.
const STRANGER_EVERY: Duration = Duration::from_secs(10);

/// What was told of set-ups with those who hold the key.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    current: Option<(TroubleKey, Instant)>,
    told_last: Option<TroubleKey>,
    told_lately: Vec<(TroubleKey, Instant)>,
}

impl Refusals {
    /// Whether this trouble is to be told now. `passing`: it usually passes by itself.
    pub(super) fn is_news(&mut self, key: TroubleKey, passing: bool, now: Instant) -> bool {
        let since = match self.current {
            Some((same, since)) if same == key => since,
            _ => now,
        };
        self.current = Some((key, since));
        self.told_lately.retain(|(_, at)| now.duration_since(*at) < REPEAT_AFTER);
        let known =
            self.told_last == Some(key) || self.told_lately.iter().any(|(told, _)| *told == key);
        if known || (passing && now.duration_since(since) < PATIENCE) {
            return false;
        }
        self.told_last = Some(key);
        self.told_lately.push((key, now));
        true
    }

    /// A session came about.
    pub(super) fn session_began(&mut self) {
        self.current = None;
        self.told_last = None;
    }
}

/// What was told of those who do not hold the key.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    told: Option<Instant>,
    left_out: u64,
}

impl Strangers {
    /// Whether to tell now, and of how many others that were left out.
    pub(super) fn is_news(&mut self, now: Instant) -> Option<u64> {
        if self.told.is_some_and(|told| now.duration_since(told) < STRANGER_EVERY) {
            self.left_out += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::super::trouble::Trouble;
    use super::*;

    #[test]
    fn the_same_trouble_is_told_once_and_a_change_each_time() {
        let mut refusals = Refusals::default();
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let (a, b) = (Trouble::Timeout.key(), Trouble::Unexpected.key());
        assert!(refusals.is_news(a, false, at(0)));
        assert!((0..500).all(|second| !refusals.is_news(a, false, at(second))));
        assert!(refusals.is_news(b, false, at(500)));
        assert!(refusals.is_news(a, false, at(501)), "it was told long ago");
        assert!((502..550).all(|second| {
            let key = if second % 2 == 0 { a } else { b };
            !refusals.is_news(key, false, at(second))
        }));
        assert!(refusals.is_news(b, false, at(562)));
    }

    #[test]
    fn what_passes_by_itself_is_told_when_it_stays() {
        let mut refusals = Refusals::default();
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let key = Trouble::Superseded.key();
        assert!((0..5).all(|second| !refusals.is_news(key, true, at(second))));
        assert!(refusals.is_news(key, true, at(5)));
        assert!(!refusals.is_news(key, true, at(6)));
        refusals.session_began();
        assert!(!refusals.is_news(key, true, at(100)), "the time begins anew");
        assert!(refusals.is_news(key, true, at(105)));
    }

    #[test]
    fn strangers_have_one_line_in_ten_seconds() {
        let mut strangers = Strangers::default();
        let now = Instant::now();
        assert_eq!(strangers.is_news(now), Some(0));
        assert!((0..7).all(|_| strangers.is_news(now).is_none()));
        assert_eq!(strangers.is_news(now + STRANGER_EVERY), Some(7));
        assert_eq!(strangers.is_news(now + 2 * STRANGER_EVERY), Some(0));
    }
}
