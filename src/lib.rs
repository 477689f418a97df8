//! x
#![allow(missing_docs)]

#[cfg(feature = "cli")]
pub mod cli;

mod change;
mod clock;
mod coherence;
mod config;
mod error;
mod fill;
mod gate;
mod inbox;
mod keeper;
mod key;
mod load;
mod node;
mod postgres;
mod settings;
mod shared;
mod source;
mod stats;
mod status;
mod store;
mod sync;
mod table;
mod tables;
mod tls;

pub use change::{Change, RowKey, Rows};
pub use coherence::Reason;
pub use config::{Config, TableOptions};
pub use error::{Error, Result};
pub use key::{Key, KeyPart, KeyType};
pub use node::Node;
pub use postgres::{install, migrate};
pub use stats::Stats;
pub use status::{Event, Events, Status};
pub use store::Cached;
pub use table::{FromRow, Lookup, Table};
pub use tls::TlsConfig;
