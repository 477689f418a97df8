//! Which stripe of a striped counter a thread counts in.
//!
//! A thread owns a stripe while it lives, if one is free when it first counts something; then it is the only one that writes there, and needs no
//! locked instruction for it. The others share a few.

use std::{
    cell::Cell,
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// What a model checker schedules is no thread: all of that would be taken for the same owner. Nor has it a thread's stack.
const IS_MODEL: bool = cfg!(any(shuttle, all(test, loom_core)));

/// How many stripes a thread can own.
pub(super) const OWNED: usize = if IS_MODEL { 0 } else { 32 };

/// How many are shared by the threads that own none.
const SHARED: usize = if IS_MODEL { 1 } else { 16 };

pub(super) const COUNT: usize = OWNED + SHARED;

/// Of a thread that has not counted anything.
const NONE: usize = usize::MAX;

thread_local! {
    static STRIPE: Cell<usize> = const { Cell::new(NONE) };
    static OWNER: Cell<Option<Owner>> = const { Cell::new(None) };
}

/// The stripe that this thread owns, if less than [`OWNED`]; else what [`dealt`] makes one of.
#[inline]
pub(super) fn current() -> usize {
    STRIPE.get()
}

/// The stripe of a thread for which [`current`] has shown `stripe`, and that owned none. To be written to as one that others write to as well.
pub(super) fn dealt(stripe: usize) -> usize {
    if stripe != NONE {
        return stripe;
    }
    let stripe = match Owner::claim() {
        Some(owner) => {
            let stripe = owner.0;
            // A thread that is about to end keeps none.
            let is_kept = OWNER.try_with(|kept| kept.set(Some(owner))).is_ok();
            if is_kept { stripe } else { shared() }
        }
        None => shared(),
    };
    STRIPE.set(stripe);
    stripe
}

/// Dealt out in turn.
fn shared() -> usize {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    OWNED + NEXT.fetch_add(1, Relaxed) % SHARED
}

/// A bit for each stripe that somebody owns.
static TAKEN: AtomicU32 = AtomicU32::new(0);

/// Owns this stripe until it is dropped, with the thread.
struct Owner(usize);

impl Owner {
    fn claim() -> Option<Self> {
        let mut taken = TAKEN.load(Relaxed);
        loop {
            let free = taken.trailing_ones() as usize;
            if free >= OWNED {
                return None;
            }
            // (1) The thread that owned it before adds to a counter. (2) It gives the stripe back. (3) We take it, and (4) add to that counter:
            // we see (1), since (3) acquires what (2) released.
            match TAKEN.compare_exchange_weak(taken, taken | 1 << free, Acquire, Relaxed) {
                Ok(_) => return Some(Self(free)),
                Err(now) => taken = now,
            }
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // What this thread still counts while it ends, it counts where all may.
        STRIPE.set(shared());
        TAKEN.fetch_and(!(1 << self.0), Release);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::{collections::HashSet, sync::Barrier};

    use super::*;

    #[test]
    fn no_two_threads_own_the_same_stripe_and_who_ends_gives_his_back() {
        for _ in 0..20 {
            let all_there = Barrier::new(COUNT);
            let stripes: Vec<usize> = std::thread::scope(|scope| {
                let run = || {
                    let stripe = dealt(current());
                    assert_eq!(dealt(current()), stripe, "it keeps it");
                    all_there.wait();
                    stripe
                };
                let threads: Vec<_> = (0..COUNT).map(|_| scope.spawn(run)).collect();
                threads.into_iter().map(|thread| thread.join().expect("ends")).collect()
            });
            let owned: Vec<usize> = stripes.into_iter().filter(|stripe| *stripe < OWNED).collect();
            // Other tests run beside this one.
            assert!(owned.len() > OWNED / 2, "{owned:?}");
            assert_eq!(owned.iter().collect::<HashSet<_>>().len(), owned.len(), "{owned:?}");
        }
    }
}
