//! The scenarios that a debug build looks through within seconds.

use super::{
    run::run,
    scenarios::{Expect, SCENARIOS, Scenario},
    story,
};

/// More is for `rowcache-verify model`, in a release build.
fn is_tiny(scenario: &Scenario) -> bool {
    let of_loads = ["loads", "stale"].contains(&scenario.name);
    let broken = [
        "no-void",
        "finish-in-two",
        "join-void",
        "overlapping",
        "direct-leaves",
        "early-delivery",
        "unkept-leaves",
        "overflow-dropped",
        "fence-shared",
        "join-closed",
        "clock-stops",
        "log-by-number",
        "log-unnoticed-rotation",
    ];
    of_loads || broken.contains(&scenario.name)
}

#[test]
fn small_scenarios_come_out_as_expected() {
    for scenario in SCENARIOS.iter().filter(|scenario| is_tiny(scenario)) {
        let outcome = run(scenario, false, |_| {});
        let missing = &outcome.missing;
        assert!(outcome.good, "{}: {missing:?}\n{}", scenario.name, story::tell(scenario, &outcome));
    }
}

#[test]
fn a_scenario_that_holds_vacuously_fails() {
    let loads = SCENARIOS.iter().find(|scenario| scenario.name == "loads").expect("a scenario");
    let mut nothing_happens = *loads;
    nothing_happens.short.asks = 1;
    let outcome = run(&nothing_happens, false, |_| {});
    assert!(outcome.violated.is_none() && !outcome.missing.is_empty() && !outcome.good);
}

#[test]
fn an_unexpected_outcome_fails() {
    let broken = SCENARIOS.iter().find(|scenario| scenario.name == "no-void").expect("a scenario");
    let outcome = run(&Scenario { expect: Expect::Holds(&[]), ..*broken }, false, |_| {});
    assert!(!outcome.good, "a property is broken that was to hold");
    let outcome = run(&Scenario { off: &[], ..*broken }, false, |_| {});
    assert!(!outcome.good, "nothing is broken, and something was to be");
}

#[test]
fn a_counterexample_is_a_story() {
    let broken = SCENARIOS.iter().find(|scenario| scenario.name == "no-void").expect("a scenario");
    let story = story::tell(broken, &run(broken, false, |_| {}));
    assert!(story.contains("W1 writes a = v1") && story.contains("Row a is v1; the node holds v0."), "{story}");
}

#[test]
fn every_scenario_has_a_name_of_its_own() {
    for (n, scenario) in SCENARIOS.iter().enumerate() {
        assert!(SCENARIOS[..n].iter().all(|before| before.name != scenario.name), "{}", scenario.name);
    }
}
