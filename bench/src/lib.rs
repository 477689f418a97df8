//! What the suites share: how they measure, where, and how what they found is written down.
//!
//! | module | what it does |
//! | --- | --- |
//! | `suite` | runs a suite: its command line, its report, what has become worse |
//! | `measure` | turns, medians, the CPU time of a thread and of a server |
//! | `ground` | throw-away servers, and tables on them |
//! | `report` | what a suite has found, as data |
//! | `page` | all reports as `docs/benchmarks.md` |
//! | `plot` | pictures of them |
//! | `machine` | what it was measured on, and with which versions |
//!
//! A suite is a program in `benches/`, so that the alternatives are dependencies of benchmarks alone.

pub mod ground;
pub mod machine;
pub mod measure;
mod page;
mod plot;
pub mod report;
pub mod suite;
