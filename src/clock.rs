//! The clock that leases are counted by.

use std::time::{Duration, Instant};

use crate::coherence::Boot;

/// Time since boot. It goes on while the machine is suspended, as `Instant` does not on Linux (X19).
pub(crate) fn now() -> Boot {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
    // Source: macOS clock_gettime(3): CLOCK_MONOTONIC goes on while the system is asleep.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;
    let time = rustix::time::clock_gettime(CLOCK);
    Duration::new(
        time.tv_sec.try_into().expect("time since boot is positive"),
        time.tv_nsec.try_into().expect("below one thousand million"),
    )
}

/// A moment of this clock, as near as can be told, on the clock of the standard library.
pub(crate) fn instant(at: Boot) -> Instant {
    let ago = now().saturating_sub(at);
    Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
}
