//! A model of the protocol, and every state that it can reach within stated bounds.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `world` | the database: rows, transactions that commit step by step, the queue |
//! | `node` | the node: the production's own state machines, and what surrounds them |
//! | `loads`, `lines`, `readers` | what happens to a node: loads, messages and fences, reads |
//! | `steps` | what can happen next; the model as stateright sees it |
//! | `properties` | what must hold |
//! | `protection`, `setup`, `scenarios` | what can be switched off, bounds, and what must come out |
//! | `run`, `report`, `story` | runs a scenario, prints the table, tells a counterexample |
//!
//! The transitions of `fill`, `gate`, `coherence`, `relay` and `snapshot` are the ones that services run. `docs/model.md` says what is modelled, and what is not.

mod lines;
mod loads;
mod node;
mod properties;
mod protection;
mod readers;
mod report;
mod run;
mod scenarios;
mod setup;
mod steps;
mod story;
mod world;

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use run::Size;
use scenarios::{SCENARIOS, Scenario};

const HELP: &str = "\
A scenario that `holds` was looked at in every state that its bounds allow, and has reached what it is about. One that is
`violated` has a protection switched off, and must be: a model that cannot fail shows nothing.

Examples:
  rowcache-verify model                        all scenarios, in about a minute
  rowcache-verify model --scenario overlapping one of them
  rowcache-verify model --show overlapping     its counterexample, as a story
  rowcache-verify model --deep                 larger bounds: half an hour, up to 14 GB of memory

Exit code: 0 if all came out as they should, 1 if not.";

/// Looks at every state of the protocol within bounds, with its protections, and with each of them switched off.
#[derive(Args)]
#[command(after_help = HELP)]
pub(super) struct Model {
    /// Runs this scenario only. May be given more than once.
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Tells the counterexample of this scenario, step by step.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["scenario", "markdown"])]
    show: Option<String>,
    /// Small bounds. The default.
    #[arg(long, conflicts_with = "deep")]
    short: bool,
    /// Larger bounds.
    #[arg(long)]
    deep: bool,
    /// Gives a scenario up when it has generated so many states: with `--deep` its row says so, without it has failed. A million
    /// takes about half a gigabyte.
    #[arg(long, value_name = "STATES", default_value_t = 24_000_000)]
    generated_max: usize,
    /// Prints the table for docs/model.md.
    #[arg(long)]
    markdown: bool,
}

impl Model {
    /// Runs the scenarios. To be called where it may block.
    pub(super) fn run(&self) -> Result<ExitCode> {
        let size = Size { deep: self.deep, generated_max: self.generated_max };
        if let Some(name) = &self.show {
            let scenario = find(name)?;
            let outcome = run::run(scenario, size, |_| {});
            println!("{}", story::tell(scenario, &outcome));
            return Ok(code(outcome.good));
        }
        let chosen: Vec<&Scenario> = match &self.scenario[..] {
            [] => SCENARIOS.iter().collect(),
            names => names.iter().map(|name| find(name)).collect::<Result<_>>()?,
        };
        Ok(code(report::table(&chosen, size, self.markdown)))
    }
}

fn code(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn find(name: &str) -> Result<&'static Scenario> {
    let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == name) else {
        let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        bail!("there is no scenario `{name}`; there are: {}", names.join(", "));
    };
    Ok(scenario)
}
