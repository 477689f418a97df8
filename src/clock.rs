//! The clock that leases are counted by.

use std::time::{Duration, Instant};

use nix::time::ClockId;

use crate::coherence::Boot;

/// Time since boot. It goes on while the machine is suspended, as `Instant` does not on Linux (X19).
pub(crate) fn now() -> Boot {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
    // Source: macOS clock_gettime(3): CLOCK_MONOTONIC goes on while the system is asleep.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;
    Duration::from(CLOCK.now().expect("the system has this clock"))
}

/// A moment of this clock, as near as can be told, on the clock of the standard library.
pub(crate) fn instant(at: Boot) -> Instant {
    let ago = now().saturating_sub(at);
    Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
}
