use super::run::{Size, run};

const SMALL: Size = Size { nodes: 3, steps: 6000, traced: false };

#[test]
fn a_few_seeds_violate_nothing() {
    for seed in 1..=12 {
        let outcome = run(seed, SMALL);
        assert!(outcome.violations.is_empty(), "seed {seed}: {}", outcome.violations[0]);
        assert!(outcome.report.reads > 100, "seed {seed} read almost nothing");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [1, 7, 4711] {
        let (one, other) = (run(seed, SMALL), run(seed, SMALL));
        assert_eq!((one.fingerprint, one.steps, one.counts), (other.fingerprint, other.steps, other.counts));
        assert_ne!(one.fingerprint, run(seed + 1, SMALL).fingerprint);
    }
}
