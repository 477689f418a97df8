//! The table of scenarios, and how each came out.

use std::{cell::Cell, io::Write as _, time::Instant};

use super::{
    run::{Outcome, Size, run},
    scenarios::{Expect, Scenario},
};

/// Runs the scenarios, and prints a row for each as it ends. Returns whether all came out as expected.
pub(super) fn table(scenarios: &[&Scenario], size: Size, markdown: bool) -> bool {
    let mut out = std::io::stdout();
    // Who reads our output may have seen enough.
    let mut say = |line: &str| drop(writeln!(out, "{line}").and_then(|()| out.flush()));
    if markdown {
        say("| scenario | of | shows | bounds | states | generated | depth | outcome |");
        say("| --- | --- | --- | --- | ---: | ---: | ---: | --- |");
    } else {
        say(&format!(
            "{:<24}{:>11}{:>12}{:>7}{:>9}  {:<24} {}",
            "SCENARIO", "STATES", "GENERATED", "DEPTH", "TIME", "OUTCOME", "BOUNDS"
        ));
    }
    let began = Instant::now();
    let (mut states, mut generated, mut stopped, mut bad) = (0, 0, 0, Vec::new());
    for scenario in scenarios {
        let said = Cell::new(Instant::now());
        let outcome = run(scenario, size, |states| {
            if size.deep && said.get().elapsed().as_secs() >= 10 {
                eprintln!("{}: {} states", scenario.name, grouped(states));
                said.set(Instant::now());
            }
        });
        say(&if markdown { markdown_row(scenario, &outcome) } else { row(scenario, &outcome) });
        (states, generated) = (states + outcome.states, generated + outcome.generated);
        stopped += usize::from(outcome.stopped);
        if !outcome.good {
            bad.push(scenario.name);
        }
    }
    if markdown {
        say("");
    }
    say(&format!(
        "{} scenarios, {} distinct states, {} generated{}",
        scenarios.len(),
        grouped(states),
        grouped(generated),
        if markdown { ".".into() } else { format!(", {:.1} s", began.elapsed().as_secs_f64()) }
    ));
    if stopped > 0 {
        say(&format!(
            "{stopped} of them given up at {} generated states: what they show, they show so far (`--generated-max`)",
            grouped(size.generated_max)
        ));
    }
    if !bad.is_empty() {
        say(&format!("NOT AS EXPECTED: {} (`--show NAME` tells how)", bad.join(", ")));
    }
    bad.is_empty()
}

fn row(scenario: &Scenario, outcome: &Outcome) -> String {
    let Outcome { states, generated, depth, time, .. } = outcome;
    let came_out = came_out(scenario, outcome);
    format!(
        "{:<24}{:>11}{:>12}{depth:>7}{:>7.1} s  {came_out:<24} {}",
        scenario.name,
        grouped(*states),
        grouped(*generated),
        time.as_secs_f64(),
        outcome.setup.describe(),
    )
}

fn markdown_row(scenario: &Scenario, outcome: &Outcome) -> String {
    format!(
        "| `{}` | {} | {} | {} | {} | {} | {} | {} |",
        scenario.name,
        scenario.of,
        what(scenario),
        outcome.setup.describe().replace('*', "\\*"),
        grouped(outcome.states),
        grouped(outcome.generated),
        outcome.depth,
        came_out(scenario, outcome),
    )
}

/// What a scenario shows; of one that must be violated, what is done in place of the rule.
pub(super) fn what(scenario: &Scenario) -> String {
    let instead: Vec<&str> = scenario.off.iter().map(|protection| protection.instead()).collect();
    if scenario.shows.is_empty() {
        format!("*without the rule:* {}", instead.join("; "))
    } else {
        scenario.shows.into()
    }
}

/// `holds`, or what was violated; and what was expected, if that is something else.
pub(super) fn came_out(scenario: &Scenario, outcome: &Outcome) -> String {
    let text = match &outcome.violated {
        None if outcome.stopped => "holds so far".into(),
        None if outcome.missing.is_empty() => "holds".into(),
        None => format!("HOLDS VACUOUSLY: never {:?}", outcome.missing),
        Some((property, _)) => format!("violated: {}", property.name()),
    };
    match (outcome.good, scenario.expect) {
        (true, _) => text,
        (false, Expect::Holds(_)) => format!("{text} (EXPECTED: holds)"),
        (false, Expect::Violates(property)) => format!("{text} (EXPECTED: violated: {})", property.name()),
    }
}

/// With a comma between thousands.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
