//! Locks and atomics: the standard library's; or the model checker's under `--cfg shuttle`; or, in tests under `cfg(loom_core)`, the
//! atomics alone of the one that knows their orderings (not `cfg(loom)`: dependencies have their own idea of that).
//!
//! A poisoned lock is ignored: each critical section leaves its data whole at every point where it could panic.

#[cfg(all(test, loom_core))]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(any(shuttle, all(test, loom_core))))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(shuttle))]
pub(crate) use std::sync::{Arc, Mutex, MutexGuard};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// Locks, whatever happened to the last holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
