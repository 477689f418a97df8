//! What the fuzz targets do with their input, and what must hold. How to run them: `fuzz/run`.

#![cfg(fuzzing)]

pub mod change;
pub mod key;
pub mod message;
pub mod relay;
pub mod store;
pub mod token;
