//! Keeps a line that anybody can cause from filling the log.

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
}
