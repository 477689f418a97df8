//! Keeps a line from filling the log: one that anybody can cause, or one that an endless loop would repeat.

use std::time::Duration;

use crate::{
    coherence::Boot,
    sync::{Mutex, lock},
};

/// Lets one line through per [`PAUSE`], with the number of those that it held back.
#[derive(Default)]
pub(crate) struct Throttle(Mutex<State>);

#[derive(Default)]
struct State {
    last: Option<Boot>,
    held_back: u64,
}

const PAUSE: Duration = Duration::from_secs(1);

impl Throttle {
    /// Whether a line may be written now: then how many were held back since the last one.
    pub(crate) fn pass(&self, now: Boot) -> Option<u64> {
        let mut state = lock(&self.0);
        if state.last.is_some_and(|last| now < last + PAUSE) {
            state.held_back += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.held_back))
    }
}

/// Tells why what is tried again and again fails: at once if the reason is another one, and once a minute if it stays the same.
#[derive(Default)]
pub(crate) struct Complaint(Option<(String, Boot)>);

const REMINDER: Duration = Duration::from_mins(1);

impl Complaint {
    /// Whether this is to be told now.
    pub(crate) fn is_news(&mut self, why: &str, now: Boot) -> bool {
        if self.0.as_ref().is_some_and(|(told, at)| told == why && now < *at + REMINDER) {
            return false;
        }
        self.0 = Some((why.to_owned(), now));
        true
    }

    /// It has succeeded: what comes next is news.
    pub(crate) fn is_settled(&mut self) {
        self.0 = None;
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_which_counts_the_others() {
        let throttle = Throttle::default();
        let at = Duration::from_millis;
        assert_eq!(throttle.pass(at(5000)), Some(0));
        assert_eq!((throttle.pass(at(5001)), throttle.pass(at(5999))), (None, None));
        assert_eq!(throttle.pass(at(6000)), Some(2));
        assert_eq!(throttle.pass(at(60_000)), Some(0));
    }

    #[test]
    fn the_same_failure_is_told_once_a_minute() {
        let mut complaint = Complaint::default();
        let at = Duration::from_secs;
        assert!(complaint.is_news("refused", at(1)) && !complaint.is_news("refused", at(2)));
        assert!(complaint.is_news("no answer", at(3)) && complaint.is_news("refused", at(4)));
        assert!(!complaint.is_news("refused", at(63)) && complaint.is_news("refused", at(64)));
        complaint.is_settled();
        assert!(complaint.is_news("refused", at(65)));
    }
}
