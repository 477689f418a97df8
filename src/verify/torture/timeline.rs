//! What excuses what: the eras that crashes and promotions begin, two primaries at a time, processes that were stopped.

use std::collections::HashMap;

use super::{
    super::history::{NodeId, Time, Version},
    wire::Attempt,
};

/// The eras of a run, and the incidents of an episode.
#[derive(Debug)]
pub(super) struct Timeline {
    /// On which server (by its port) a time belongs to which era, from when on.
    eras: Vec<(u16, Time, u32)>,
    /// The runs of servers that nodes may be coherent on, and their eras.
    incarnations: HashMap<u64, u32>,
    pub(super) incidents: Incidents,
}

/// What excuses what, in this episode.
#[derive(Debug, Default)]
pub(super) struct Incidents {
    /// There were two primaries: from when, until when, and the port of the new one. Nobody can know which one is right.
    pub(super) split: Option<(Time, Time, u16)>,
    /// This node was stopped, and went on at this time: its clock thread may come late.
    pub(super) stopped: Vec<(NodeId, Time, Time)>,
    /// What the fault itself wrote.
    pub(super) wrote: Vec<Attempt>,
}

impl Timeline {
    pub(super) fn new(port: u16) -> Self {
        Self { eras: vec![(port, 0, 0)], incarnations: HashMap::new(), incidents: Incidents::default() }
    }

    /// Commits may be lost; what is written on this server from then on is of another era.
    pub(super) fn begin_era(&mut self, port: u16, from: Time) {
        self.eras.push((port, from, self.era() + 1));
    }

    pub(super) fn era(&self) -> u32 {
        self.eras.iter().map(|(.., era)| *era).max().unwrap_or_default()
    }

    /// The server that is written to is this run of it.
    pub(super) fn is_now(&mut self, incarnation: u64) {
        self.incarnations.insert(incarnation, self.era());
    }

    pub(super) fn era_of(&self, incarnation: u64) -> Option<u32> {
        self.incarnations.get(&incarnation).copied()
    }

    /// The version that got this number on the server of this port.
    pub(super) fn version(&self, port: u16, number: u64) -> Version {
        let eras = self.eras.iter().filter(|(of, from, _)| *of == port && *from <= number);
        Version { era: eras.map(|(.., era)| *era).max().unwrap_or_default(), number }
    }
}
