//! x
#![allow(dead_code, missing_docs)]
mod change;
mod coherence;
mod error;
mod fill;
mod gate;
mod key;
mod stats;
mod store;
mod sync;
mod tables;
pub use error::{Error, Result};
pub use key::{Key, KeyPart, KeyType};
pub struct Table;
impl Table {
    pub fn try_get() {}
}
