//! Runs a suite: its command line, its report, and what has become worse since the last one.

use std::{
    fs,
    future::Future,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use rowcache::cli::{logs, report as report_error};

use crate::{
    machine::Machine,
    page,
    report::{Plot, Ratio, Report, Table},
};

/// All suites, in the order of the page. Each is a program in `benches/`.
pub const SUITES: [&str; 13] = [
    "hit", "miss", "change", "writers", "storm", "gap", "fence", "memory", "ratio", "service", "http", "tier", "scale",
];

/// A ratio that is worse by more than this is reported.
const TOLERANCE: f64 = 0.15;

/// How a suite is run. `cargo bench --bench SUITE -- OPTIONS`.
#[derive(Clone, Debug, Parser)]
pub struct Options {
    /// Measures little, to see that everything runs, and writes nothing
    #[arg(long)]
    pub short: bool,
    /// The directory of Postgres' programs. Default: what is found on this machine
    #[arg(long, value_name = "DIR")]
    pub bin: Option<PathBuf>,
    /// Public traces of cache accesses (`*.arc`, `*.lis`: ARC's format; `*.trc`: one block a line), for the suite `ratio`
    #[arg(long, value_name = "DIR")]
    pub traces: Option<PathBuf>,
    /// Where reports are kept; the page is written beside it
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/benchmarks"), hide_default_value = true)]
    pub reports: PathBuf,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
    /// What a suite passes to a process of its own
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    pub child: Vec<String>,
}

/// A run of a suite.
#[derive(Debug)]
pub struct Bench {
    pub options: Options,
    about: Vec<String>,
    servers: Vec<String>,
    ratios: Vec<Ratio>,
    tables: Vec<Table>,
    plots: Vec<Plot>,
}

impl Bench {
    /// So many, or a few if all that matters is that it runs.
    pub fn rounds(&self, full: usize) -> usize {
        if self.options.short { full.min(2) } else { full }
    }

    /// A size, or a much smaller one.
    pub fn size(&self, full: usize, short: usize) -> usize {
        if self.options.short { short } else { full }
    }

    /// A paragraph of what was done, and why it came out like this; Markdown.
    pub fn about(&mut self, paragraph: &str) {
        self.about.push(paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    }

    /// A server that took part: `PostgreSQL 18.4`.
    pub fn server(&mut self, version: String) {
        if !self.servers.contains(&version) {
            self.servers.push(version);
        }
    }

    pub fn ratio(&mut self, ratio: Ratio) {
        println!("{} / {}: {}", ratio.what, ratio.to, ratio.value);
        self.ratios.push(ratio);
    }

    pub fn table(&mut self, table: Table) {
        println!("\n{}\n{}", table.caption, page::markdown(&table));
        self.tables.push(table);
    }

    pub fn plot(&mut self, plot: Plot) {
        self.plots.push(plot);
    }
}

/// The whole program of a suite.
pub fn main<F: Future<Output = Result<Bench>>>(name: &str, title: &str, run: impl FnOnce(Bench) -> F) -> ExitCode {
    let options = Options::parse();
    logs::start("off");
    let bench = Bench {
        options,
        about: Vec::new(),
        servers: Vec::new(),
        ratios: Vec::new(),
        tables: Vec::new(),
        plots: Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.context("no runtime").and_then(|runtime| {
        println!("{name}: {title}\n");
        let began = Instant::now();
        let bench = runtime.block_on(run(bench))?;
        keep(name, title, bench, began.elapsed().as_secs())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}

fn keep(name: &str, title: &str, bench: Bench, seconds: u64) -> Result<()> {
    let directory = bench.options.reports.clone();
    let report = Report {
        name: name.to_owned(),
        title: title.to_owned(),
        about: bench.about,
        machine: Machine::here(&bench.servers),
        seconds,
        ratios: bench.ratios,
        tables: bench.tables,
        plots: bench.plots,
    };
    if report.ratios.is_empty() && report.tables.is_empty() || bench.options.short {
        return Ok(());
    }
    fs::create_dir_all(&directory).with_context(|| format!("{} cannot be made", directory.display()))?;
    let path = file(&directory, name);
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| format!("{} cannot be written", path.display()))?;
    page::write(&directory, &reports(&directory)?)
}

fn file(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.json"))
}

/// What is kept there, in the order of the page.
pub fn reports(directory: &Path) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for path in SUITES.iter().map(|name| file(directory, name)).filter(|path| path.exists()) {
        let text = fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        let report = serde_json::from_str(&text).with_context(|| format!("{} is not a report", path.display()))?;
        reports.push(report);
    }
    Ok(reports)
}

/// A line for each ratio that is worse than it was by more than [`TOLERANCE`]; and how many were compared.
pub fn worse(before: &[Report], now: &[Report]) -> (usize, Vec<String>) {
    let mut compared = 0;
    let mut lines = Vec::new();
    for now in now {
        let Some(before) = before.iter().find(|it| it.name == now.name && it.machine.is_like(&now.machine)) else {
            continue;
        };
        for ratio in &now.ratios {
            let same = |it: &&Ratio| (&it.what, &it.to) == (&ratio.what, &ratio.to);
            let Some(was) = before.ratios.iter().find(same) else { continue };
            compared += 1;
            let worse = ratio.worse_than(was);
            if worse > TOLERANCE {
                let overlap = ratio.value.low <= was.value.high && was.value.low <= ratio.value.high;
                lines.push(format!(
                    "{}: {} / {}: {}, and was {}: worse by {:.0} %{}",
                    now.name,
                    ratio.what,
                    ratio.to,
                    ratio.value,
                    was.value,
                    worse * 100.0,
                    if overlap { " (quartiles overlap)" } else { "" },
                ));
            }
        }
    }
    (compared, lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Spread;

    fn report(processors: usize, ratios: &[(&str, f64)]) -> Report {
        let mut machine = Machine::here(&[]);
        machine.processors = processors;
        let ratios = ratios.iter().map(|(what, value)| Ratio::cost(*what, "bare", Spread::exact(*value))).collect();
        Report {
            name: "hit".to_owned(),
            title: String::new(),
            about: Vec::new(),
            machine,
            seconds: 0,
            ratios,
            tables: Vec::new(),
            plots: Vec::new(),
        }
    }

    #[test]
    fn what_is_worse_by_more_than_the_tolerance_is_told() {
        let before = report(2, &[("get", 1.0), ("try_get", 1.0), ("gone", 1.0)]);
        let now = report(2, &[("get", 1.14), ("try_get", 1.16), ("new", 9.0)]);
        let (compared, lines) = worse(std::slice::from_ref(&before), &[now]);
        assert_eq!(compared, 2);
        assert_eq!(lines, ["hit: try_get / bare: 1.16, and was 1.00: worse by 16 %"]);
        let elsewhere = report(4, &[("get", 9.0)]);
        assert_eq!(worse(&[before], &[elsewhere]).0, 0, "another machine");
    }
}
