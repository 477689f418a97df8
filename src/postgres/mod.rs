//! Everything that talks to Postgres.

pub mod install;
pub mod migrate;
