//! The scenarios that a debug build looks through within seconds.

use super::{
    report,
    run::{Size, run},
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

const SHORT: Size = Size { deep: false, generated_max: 24_000_000 };

#[test]
fn small_scenarios_come_out_as_expected() {
    for scenario in SCENARIOS.iter().filter(|scenario| is_tiny(scenario)) {
        let outcome = run(scenario, SHORT, |_| {});
        let missing = &outcome.missing;
        assert!(outcome.good, "{}: {missing:?}\n{}", scenario.name, story::tell(scenario, &outcome));
    }
}

#[test]
fn a_scenario_that_holds_vacuously_fails() {
    let loads = SCENARIOS.iter().find(|scenario| scenario.name == "loads").expect("a scenario");
    let mut nothing_happens = *loads;
    nothing_happens.short.asks = 1;
    let outcome = run(&nothing_happens, SHORT, |_| {});
    assert!(outcome.violated.is_none() && !outcome.missing.is_empty() && !outcome.good);
}

#[test]
fn an_unexpected_outcome_fails() {
    let broken = SCENARIOS.iter().find(|scenario| scenario.name == "no-void").expect("a scenario");
    let outcome = run(&Scenario { expect: Expect::Holds(&[]), ..*broken }, SHORT, |_| {});
    assert!(!outcome.good, "a property is broken that was to hold");
    let outcome = run(&Scenario { off: &[], ..*broken }, SHORT, |_| {});
    assert!(!outcome.good, "nothing is broken, and something was to be");
}

#[test]
fn a_counterexample_is_a_story() {
    let broken = SCENARIOS.iter().find(|scenario| scenario.name == "no-void").expect("a scenario");
    let story = story::tell(broken, &run(broken, SHORT, |_| {}));
    assert!(story.contains("W1 writes a = v1") && story.contains("Row a is v1; the node holds v0."), "{story}");
}

#[test]
fn every_scenario_has_a_name_of_its_own() {
    for (n, scenario) in SCENARIOS.iter().enumerate() {
        assert!(SCENARIOS[..n].iter().all(|before| before.name != scenario.name), "{}", scenario.name);
    }
}

#[test]
fn a_run_that_is_given_up_does_not_pass_for_a_whole_one() {
    let all = SCENARIOS.iter().find(|scenario| scenario.name == "loads").expect("there is one");
    for (deep, text) in [(false, "holds so far (EXPECTED: holds)"), (true, "holds so far")] {
        let outcome = run(all, Size { deep, generated_max: 1000 }, |_| {});
        assert!(outcome.stopped && outcome.good == deep && outcome.states < 10_000);
        assert_eq!(report::came_out(all, &outcome), text);
    }
}
