//! Turns and what they cost. Variants take turns in one process, and the order moves by one each round: a neighbour who needs the
//! machine meets all of them.

use std::{
    fs,
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A median, and the quartiles around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        let at = |part: f64| quantile(&values, part);
        Self { median: at(0.5), low: at(0.25), high: at(0.75) }
    }

    /// Of something that comes out the same each time.
    pub fn exact(value: f64) -> Self {
        Self { median: value, low: value, high: value }
    }

    #[must_use]
    pub fn map(self, convert: impl Fn(f64) -> f64) -> Self {
        let (one, other) = (convert(self.low), convert(self.high));
        Self { median: convert(self.median), low: one.min(other), high: one.max(other) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, low, high] = [self.median, self.low, self.high].map(number);
        if low == high { f.write_str(&median) } else { write!(f, "{median} ({low} to {high})") }
    }
}

/// The value below which this part of the sorted values is.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted[((last as f64 * part).round() as usize).min(last)]
}

/// Three digits that mean something.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => return "0".to_owned(),
        ..0.01 => 4,
        ..0.1 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => return thousands(value.round() as i64),
    };
    format!("{value:.digits$}")
}

/// `1,234,567`.
pub fn thousands(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).expect("digits")).collect();
    format!("{}{}", if value < 0 { "-" } else { "" }, groups.join(","))
}

/// What each turn of each variant has cost, by variant and round.
#[derive(Clone, Debug)]
pub struct Turns(Vec<Vec<f64>>);

impl Turns {
    /// Has each of so many variants take a turn in each round, after one that does not count. A turn returns what it cost.
    pub fn take(rounds: usize, variants: usize, mut turn: impl FnMut(usize) -> f64) -> Self {
        let mut costs = vec![Vec::new(); variants];
        for round in 0..=rounds {
            for n in 0..variants {
                let variant = (n + round) % variants;
                let cost = turn(variant);
                if round > 0 {
                    costs[variant].push(cost);
                }
            }
        }
        Self(costs)
    }

    /// As [`take`](Self::take), with turns that wait.
    pub async fn wait<F: Future<Output = Result<f64>>>(
        rounds: usize,
        variants: usize,
        mut turn: impl FnMut(usize) -> F,
    ) -> Result<Self> {
        let mut costs = vec![Vec::new(); variants];
        for round in 0..=rounds {
            for n in 0..variants {
                let variant = (n + round) % variants;
                let cost = turn(variant).await?;
                if round > 0 {
                    costs[variant].push(cost);
                }
            }
        }
        Ok(Self(costs))
    }

    pub fn of(&self, variant: usize) -> Spread {
        Spread::of(self.0[variant].iter().copied())
    }

    /// What one variant costs as a multiple of another's cost in the same round.
    pub fn ratio(&self, of: usize, to: usize) -> Spread {
        Spread::of(self.0[of].iter().zip(&self.0[to]).map(|(of, to)| of / to))
    }
}

/// The CPU time that this thread takes for something.
pub fn cpu_of<R>(what: impl FnOnce() -> R) -> (R, Duration) {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock"));
    let began = now();
    let result = what();
    (result, now().saturating_sub(began))
}

/// How long something takes.
pub async fn time_of<R>(what: impl Future<Output = R>) -> (R, Duration) {
    let began = Instant::now();
    let result = what.await;
    (result, began.elapsed())
}

/// The CPU time that the processes of a server have taken so far, by the process that is parent of all others.
pub fn cpu_of_server(parent: u32) -> Result<Duration> {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").context("this machine has no /proc")? {
        let Ok(stat) = fs::read_to_string(entry?.path().join("stat")) else { continue };
        // The name, in parentheses, may contain anything.
        let Some(((pid, _), (_, rest))) = stat.split_once(" (").zip(stat.rsplit_once(") ")) else { continue };
        let fields: Vec<&str> = rest.split(' ').collect();
        let field = |n: usize| fields[n].parse::<u64>().unwrap_or(0);
        // Fields 4 (parent), 14 to 17 (user, system; of children that have ended) of proc(5).
        if pid == parent.to_string() {
            ticks += field(11) + field(12) + field(13) + field(14);
        } else if field(1) == u64::from(parent) {
            ticks += field(11) + field(12);
        }
    }
    // 100 a second, on every Linux.
    Ok(Duration::from_millis(ticks * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_median_and_the_quartiles() {
        let spread = Spread::of([5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!(spread, Spread { median: 3.0, low: 2.0, high: 4.0 });
        assert_eq!(spread.to_string(), "3.00 (2.00 to 4.00)");
    }

    #[test]
    fn numbers_have_three_digits_that_mean_something() {
        let texts = [0.0, 0.001_25, 0.0456, 1.234, 45.67, 456.7, 1_234_567.0].map(number);
        assert_eq!(texts, ["0", "0.0013", "0.046", "1.23", "45.7", "457", "1,234,567"]);
    }

    #[test]
    fn ratios_are_those_of_one_round() {
        // A machine that is slower each time; the second variant costs twice as much as the first one.
        let mut slower = 0.0;
        let turns = Turns::take(4, 2, |variant| {
            slower += 1.0;
            [1.0, 2.0][variant] * f64::floor(100.0 + slower / 2.0)
        });
        let ratio = turns.ratio(1, 0);
        assert!((1.97..=2.03).contains(&ratio.median), "{turns:?}");
    }
}
