//! Tells a counterexample.

use super::{run::Outcome, scenarios::Scenario};

/// The counterexample, or that there is none.
pub(super) fn tell(scenario: &Scenario, outcome: &Outcome) -> String {
    let Some((property, path)) = &outcome.violated else { return format!("{}: no counterexample", scenario.name) };
    let mut text = String::new();
    for (n, (_, step)) in path.iter().enumerate() {
        if let Some(step) = step { text += &format!("{n}. {step:?}\n"); }
    }
    text + property.wrong()
}
