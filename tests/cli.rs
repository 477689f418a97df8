//! The `rowcache` program as its users meet it: the real binary, a real Postgres, and what is printed line by line.

#[macro_use]
mod support;

#[path = "cli/commands.rs"]
mod commands;
#[path = "cli/demo.rs"]
mod demo;
#[path = "cli/doctor/mod.rs"]
mod doctor;
#[path = "cli/nodes.rs"]
mod nodes;
#[path = "cli/program.rs"]
mod program;
#[path = "cli/serve/mod.rs"]
mod serve;
#[path = "cli/watch.rs"]
mod watch;
