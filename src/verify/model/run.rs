//! Runs one scenario with stateright, and says whether it came out as expected.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use stateright::{Checker as _, HasDiscoveries, Model as _};

use super::{
    node::State,
    scenarios::{Expect, Scenario},
    setup::{Fact, Property, Rules, Setup},
    steps::{Protocol, Step},
};

/// The states from the start on, each with the step that left it.
pub(super) type Way = Vec<(State, Option<Step>)>;

/// How a scenario came out.
pub(super) struct Outcome {
    pub(super) setup: Setup,
    /// Distinct ones.
    pub(super) states: usize,
    /// States that steps led to, known or not.
    pub(super) generated: usize,
    /// The longest way from the start, in steps.
    pub(super) depth: usize,
    pub(super) time: Duration,
    /// What did not hold, and how it came to that.
    pub(super) violated: Option<(Property, Way)>,
    /// Given up before all was looked at.
    pub(super) stopped: bool,
    /// What was to be reached and was not.
    pub(super) missing: Vec<Fact>,
    /// As expected, as far as it was looked at.
    pub(super) good: bool,
}

/// How large a run may become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// The larger ones of a scenario's bounds.
    pub(super) deep: bool,
    /// States that are generated before it is given up.
    pub(super) generated_max: usize,
}

/// Looks at all states within the bounds; or until one is found that breaks a property, or it becomes too large.
pub(super) fn run(scenario: &Scenario, size: Size, progress: impl Fn(usize)) -> Outcome {
    let setup = if size.deep { scenario.deep } else { scenario.short };
    let watched = match scenario.expect {
        Expect::Violates(property) => Some(property),
        Expect::Holds(_) => None,
    };
    let facts = Arc::new(AtomicU32::new(0));
    let protocol = Protocol { setup, rules: Rules(scenario.off), watched, facts: Arc::clone(&facts) };
    let start = Instant::now();
    let search = protocol.checker().finish_when(HasDiscoveries::AnyFailures);
    let mut checker = search.target_state_count(size.generated_max).spawn_bfs();
    for handle in checker.handles() {
        while !handle.is_finished() {
            std::thread::park_timeout(Duration::from_millis(5));
            progress(checker.unique_state_count());
        }
        handle.join().expect("the checker does not panic");
    }
    let shortest = checker.discoveries().into_iter().map(|(name, path)| (name, path.into_vec()));
    let violated = shortest.min_by_key(|(_, path)| path.len()).map(|(name, path)| {
        let property = Property::ALL.into_iter().find(|property| property.name() == name);
        (property.expect("every property has a name"), path)
    });
    let facts = facts.load(Ordering::Relaxed);
    let missing = match scenario.expect {
        Expect::Holds(wanted) => wanted.iter().copied().filter(|fact| facts >> *fact as u32 & 1 == 0).collect(),
        Expect::Violates(_) => Vec::new(),
    };
    let stopped = violated.is_none() && checker.state_count() >= size.generated_max;
    let good = match scenario.expect {
        // The short bounds are looked through, or show nothing.
        Expect::Holds(_) => violated.is_none() && if stopped { size.deep } else { missing.is_empty() },
        Expect::Violates(property) => violated.as_ref().is_some_and(|(found, _)| *found == property),
    };
    Outcome {
        setup,
        states: checker.unique_state_count(),
        generated: checker.state_count(),
        depth: checker.max_depth().saturating_sub(1),
        time: start.elapsed(),
        violated,
        stopped,
        missing,
        good,
    }
}
