//! What only the `rowcache` program and this crate's own tests need.

mod account;
mod programs;
pub mod temp_server;
