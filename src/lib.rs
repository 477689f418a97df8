//! x

#[cfg(feature = "cli")]
pub mod cli;
