//! All reports as one page.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    measure::number,
    plot,
    report::{Better, Ratio, Report, Table},
};

/// Writes `benchmarks.md` beside the reports' directory, and the plots into it.
pub(crate) fn write(directory: &Path, reports: &[Report]) -> Result<()> {
    let mut page = include_str!("head.md").to_owned();
    page.push_str(&targets(reports));
    for report in reports {
        for plot in &report.plots {
            let path = directory.join(format!("{}-{}.svg", report.name, plot.name));
            fs::write(&path, plot::svg(plot)?).with_context(|| format!("{} cannot be written", path.display()))?;
        }
        page.push_str(&section(report));
    }
    let path = directory.with_extension("md");
    fs::write(&path, page).with_context(|| format!("{} cannot be written", path.display()))
}

/// A row for each target. What is measured in several settings is named by what comes before the first comma.
fn targets(reports: &[Report]) -> String {
    let mut table = Table::new("", &["", "as a multiple of", "target", "measured", ""]);
    for report in reports {
        let with_target = || report.ratios.iter().filter(|ratio| ratio.target.is_some());
        let is_like = |one: &Ratio, other: &Ratio| {
            headline(one) == headline(other) && one.to == other.to && one.target == other.target
        };
        for (n, first) in with_target().enumerate() {
            if with_target().take(n).any(|before| is_like(before, first)) {
                continue;
            }
            let all: Vec<&Ratio> = with_target().filter(|ratio| is_like(ratio, first)).collect();
            let met = all.iter().filter(|ratio| ratio.met() == Some(true)).count();
            let (what, measured, verdict) = if let [only] = all[..] {
                (only.what.as_str(), only.value.to_string(), if met == 1 { "met" } else { "**missed**" }.to_owned())
            } else {
                let medians = all.iter().map(|ratio| ratio.value.median);
                let (low, high) = medians.fold((f64::MAX, f64::MIN), |(low, high), it| (low.min(it), high.max(it)));
                let verdict = match all.len() - met {
                    0 => "met".to_owned(),
                    missed => format!("**missed** in {missed} of {}", all.len()),
                };
                (headline(first), format!("{} to {}, {} settings", number(low), number(high), all.len()), verdict)
            };
            table.row([
                format!("[{}](#{}): {what}", report.name, anchor(&report.title)),
                first.to.clone(),
                target(first),
                measured,
                verdict,
            ]);
        }
    }
    format!("\n## Targets\n{}", markdown(&table))
}

fn headline(ratio: &Ratio) -> &str {
    ratio.what.split_once(", ").map_or(&ratio.what, |(headline, _)| headline)
}

fn target(ratio: &Ratio) -> String {
    let sign = match ratio.better {
        Better::Less => "≤",
        Better::More => "≥",
    };
    ratio.target.map_or_else(String::new, |target| format!("{sign} {}", number(target)))
}

/// What GitHub makes of a heading.
fn anchor(title: &str) -> String {
    let kept = title.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn section(report: &Report) -> String {
    let mut text = format!("\n## {}\n", report.title);
    for paragraph in &report.about {
        text.push_str(&format!("\n{paragraph}\n"));
    }
    text.push_str(&ratios(&report.ratios));
    for table in &report.tables {
        text.push_str(&format!("\n{}\n{}", table.caption, markdown(table)));
    }
    for plot in &report.plots {
        text.push_str(&format!("\n![{}](benchmarks/{}-{}.svg)\n", plot.title, report.name, plot.name));
    }
    let machine = &report.machine;
    text.push_str(&format!(
        "\n{}, {} processors, {} GiB, {}; {}. It took {} s: `cargo run --release --manifest-path bench/Cargo.toml -- {}`.\n",
        machine.processor,
        machine.processors,
        machine.memory_gib,
        machine.kernel,
        machine.versions.join(", "),
        report.seconds,
        report.name,
    ));
    text
}

/// All ratios of a suite, as a table.
pub(crate) fn ratios(ratios: &[Ratio]) -> String {
    let mut table = Table::new("", &["", "as a multiple of", "median (quartiles)", "target"]);
    for ratio in ratios {
        let verdict = match ratio.met() {
            None => String::new(),
            Some(true) => target(ratio),
            Some(false) => format!("{}: **missed**", target(ratio)),
        };
        table.row([ratio.what.clone(), ratio.to.clone(), ratio.value.to_string(), verdict]);
    }
    if ratios.is_empty() { String::new() } else { markdown(&table) }
}

pub(crate) fn markdown(table: &Table) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule: Vec<String> = table.head.iter().map(|_| "---".to_owned()).collect();
    format!("\n{}{}{}", line(&table.head), line(&rule), table.rows.iter().map(|row| line(row)).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_is_what_a_page_makes_of_a_heading() {
        assert_eq!(anchor("What it is for: a service, and HTTP"), "what-it-is-for-a-service-and-http");
    }
}
