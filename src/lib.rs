//! x

#[cfg(feature = "cli")]
pub mod cli;
pub mod postgres;
