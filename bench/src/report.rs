//! What a suite has found.

use serde::{Deserialize, Serialize};

use crate::{machine::Machine, measure::Spread};

/// All that one run of a suite has found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The suite's name, also of its files.
    pub name: String,
    pub title: String,
    /// What was done, and why it came out like this; Markdown.
    pub about: Vec<String>,
    pub machine: Machine,
    pub seconds: u64,
    pub ratios: Vec<Ratio>,
    pub tables: Vec<Table>,
    pub plots: Vec<Plot>,
}

/// A cost or a gain as a multiple of another one of the same run: what is compared from run to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ratio {
    pub what: String,
    pub to: String,
    pub value: Spread,
    pub better: Better,
    pub target: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Better {
    Less,
    More,
}

impl Ratio {
    /// A cost: the less, the better.
    pub fn cost(what: impl Into<String>, to: impl Into<String>, value: Spread) -> Self {
        Self { what: what.into(), to: to.into(), value, better: Better::Less, target: None }
    }

    /// A gain: the more, the better.
    pub fn gain(what: impl Into<String>, to: impl Into<String>, value: Spread) -> Self {
        Self { better: Better::More, ..Self::cost(what, to, value) }
    }

    /// At most this, for a cost; at least this, for a gain.
    #[must_use]
    pub fn target(self, target: f64) -> Self {
        Self { target: Some(target), ..self }
    }

    /// Whether the target is met, if there is one.
    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| match self.better {
            Better::Less => self.value.median <= target,
            Better::More => self.value.median >= target,
        })
    }

    /// How much worse this is than the same ratio of an earlier run: 0.2 is a fifth.
    pub fn worse_than(&self, before: &Self) -> f64 {
        let (now, before) = (self.value.median, before.value.median);
        match self.better {
            Better::Less => now / before - 1.0,
            Better::More => before / now - 1.0,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Table {
    pub caption: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(caption: impl Into<String>, head: &[&str]) -> Self {
        Self { caption: caption.into(), head: head.iter().map(|&cell| cell.to_owned()).collect(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.head.len(), "{cells:?} beside {:?}", self.head);
        self.rows.push(cells);
    }
}

/// A picture.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plot {
    /// Names the file, after the suite's name.
    pub name: String,
    pub title: String,
    /// What `y` counts, or how long bars are.
    pub unit: String,
    /// Whether `y` is drawn in powers of ten.
    pub log: bool,
    pub shape: Shape,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Shape {
    /// A bar for each name.
    Bars(Vec<(String, f64)>),
    /// Lines over one axis.
    Lines { x: String, log_x: bool, lines: Vec<(String, Vec<(f64, f64)>)> },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_is_more_of_a_cost_and_less_of_a_gain() {
        let cost = |value| Ratio::cost("hit", "bare", Spread::exact(value));
        let gain = |value| Ratio::gain("rows/s", "bare", Spread::exact(value));
        assert!((cost(1.2).worse_than(&cost(1.0)) - 0.2).abs() < 1e-9);
        assert!((gain(5.0).worse_than(&gain(6.0)) - 0.2).abs() < 1e-9);
        assert!(cost(1.0).worse_than(&cost(1.2)) < 0.0);
        assert_eq!((cost(1.2).target(1.1).met(), gain(1.2).target(1.1).met()), (Some(false), Some(true)));
    }
}
