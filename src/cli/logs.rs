//! The program's own log: stderr, by `RUST_LOG`. While a screen is up, lines are kept back until it is gone.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use tracing_subscriber::EnvFilter;

/// What is kept back at most, in lines; older ones are lost.
const KEPT_MAX: usize = 200;

/// Lines kept back; `None`: they go to stderr.
static KEPT: Mutex<Option<VecDeque<Vec<u8>>>> = Mutex::new(None);

/// Starts logging at `RUST_LOG`, or else at `level`. Once per process.
pub fn start(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter(level)));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Out).init();
}

/// What is logged at this level. Not that a statement took long: whoever runs a command sees that, and a busy server is no fault of his.
pub(crate) fn filter(level: &str) -> String {
    format!("{level},sqlx::query=error")
}

/// Keeps lines back until what it returns is dropped; then they are written.
#[must_use]
pub(crate) fn keep_back() -> KeptBack {
    *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = Some(VecDeque::new());
    KeptBack
}

pub(crate) struct KeptBack;

impl Drop for KeptBack {
    fn drop(&mut self) {
        let lines = KEPT.lock().unwrap_or_else(PoisonError::into_inner).take();
        for line in lines.into_iter().flatten() {
            let _ = io::stderr().write_all(&line); // nobody left to tell
        }
    }
}

struct Out;

impl Write for Out {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(kept) => {
                if kept.len() == KEPT_MAX {
                    kept.pop_front();
                }
                kept.push_back(line.to_owned());
                Ok(line.len())
            }
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
