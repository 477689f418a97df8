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

fn targets(reports: &[Report]) -> String {
    let mut table = Table::new("", &["", "as a multiple of", "target", "measured", ""]);
    for report in reports {
        for ratio in &report.ratios {
            let Some(met) = ratio.met() else { continue };
            table.row([
                format!("[{}](#{}): {}", report.name, anchor(&report.title), ratio.what),
                ratio.to.clone(),
                target(ratio),
                ratio.value.to_string(),
                if met { "met" } else { "**missed**" }.to_owned(),
            ]);
        }
    }
    format!("\n## Targets\n{}", markdown(&table))
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
