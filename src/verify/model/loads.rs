//! Loads: the three moments of one, and what `Store::start`, `Store::finish` and `Shared::whose` do in them.

use crate::{coherence::Reason, fill::Verdict};

use super::{
    node::{Context, Entry, Load, Put, Sight, State, incarnation, mark},
    protection::Protection,
    setup::Fact,
};

impl State {
    /// A runner takes the key: the word is noted, before the statement is sent.
    pub(super) fn start(&mut self, context: &Context<'_>, key: usize) {
        let word = self.node.flight_word(context, key);
        let node = &mut self.node;
        let flight = node.flights[key].as_mut().expect("a queued key has a flight");
        flight.start(word);
        let gaps = node.coherence.gaps();
        node.loads.push(Load { key, gaps, seen: None, torn: false, checked: None, aside: None });
    }

    /// The statement takes its snapshot on one of the servers that pooled connections reach.
    pub(super) fn read(&mut self, context: &Context<'_>, n: usize, server: usize) {
        let key = self.node.loads[n].key;
        self.node.loads[n].seen = Some(self.sight(context, key, server));
    }

    /// What a statement on this server sees now.
    fn sight(&self, context: &Context<'_>, key: usize, server: usize) -> Sight {
        let it = &self.world.servers[server];
        let has_tier = context.setup.puts > 0;
        let lsn = if context.setup.together || has_tier { it.lsn } else { 0 };
        let saw = has_tier.then(|| {
            let horizon = self.world.horizon(u8::try_from(server).expect("few servers"));
            mark(horizon).snapshot.sight()
        });
        Sight { version: it.rows[key], incarnation: it.incarnation, lsn, saw }
    }

    /// Another node has loaded the row, and puts it into the tier.
    pub(super) fn put(&mut self, context: &Context<'_>, key: usize, server: usize) {
        let put = Put { key, sight: self.sight(context, key, server) };
        if !self.tier.contains(&put) {
            self.tier.push(put);
        }
    }

    /// What of the tier a load may take in place of reading: any row of the key that is admitted, however old.
    pub(super) fn takes(&self, context: &Context<'_>, key: usize) -> Vec<usize> {
        let node = &self.node;
        let word = node.gate(context, key).word();
        let is_taken = |put: &Put| {
            let Sight { incarnation, lsn, saw, version } = put.sight;
            let sealed = incarnation == node.listens_to() || !context.rules.on(Protection::TierSeal);
            let saw = saw.expect("there is a tier");
            let taken = sealed && node.admission.admit(&0_i64, word, saw, u64::from(lsn)).is_some();
            if !taken && version != self.world.primary().rows[key] {
                (context.note)(Fact::Refused);
            }
            taken
        };
        (0..self.tier.len()).filter(|n| self.tier[*n].key == key && is_taken(&self.tier[*n])).collect()
    }

    /// The tier answers a load.
    pub(super) fn take(&mut self, context: &Context<'_>, n: usize, put: usize) {
        // It says of itself where it is from: without a seal that is whatever the node wants to hear.
        let incarnation = self.node.listens_to();
        self.node.loads[n].seen = Some(Sight { incarnation, ..self.tier[put].sight });
        (context.note)(Fact::Taken);
    }

    /// Without `OneFinish`: the verdict is given, and acted upon later.
    pub(super) fn check(&mut self, context: &Context<'_>, n: usize) {
        let key = self.node.loads[n].key;
        let word = self.node.flight_word(context, key);
        let flight = self.node.flights[key].as_ref().expect("a running load has a flight");
        self.node.loads[n].checked = Some(flight.verdict(word));
    }

    /// The load ends: its result is published if that is allowed, and goes to all who waited.
    pub(super) fn finish(&mut self, context: &Context<'_>, n: usize) {
        let rules = context.rules;
        let load = self.node.loads.remove(n);
        let (key, seen) = (load.key, load.seen.expect("it has read"));
        let node = &mut self.node;
        let ours = node.coherence.incarnation() == Some(incarnation(seen.incarnation))
            || !rules.on(Protection::LoadIncarnation);
        if !ours {
            (context.note)(Fact::Stranger);
            if node.is_up() && node.coherence.gaps() == load.gaps {
                self.gap(context, Reason::OtherServer);
            }
        }
        if let Some(saw) = seen.saw.filter(|_| rules.on(Protection::TierGiven)) {
            self.node.admission.given(&0_i64, Some(saw).filter(|_| ours));
        }
        let flight_word = self.node.flight_word(context, key);
        let node = &mut self.node;
        let aside = load.aside.is_some();
        let mut flight = load.aside.or_else(|| node.flights[key].take()).expect("a running load has a flight");
        let verdict = load.checked.unwrap_or_else(|| flight.verdict(flight_word));
        match verdict {
            Verdict::Publish => {}
            Verdict::Voided => (context.note)(Fact::Voided),
            Verdict::Uncached => (context.note)(Fact::Uncached),
        }
        if verdict == Verdict::Publish && ours && !load.torn {
            let word = node.gate(context, key).word();
            let Sight { version, incarnation, lsn, .. } = seen;
            node.entries[key] = Some(Entry { word, version, incarnation, lsn });
        } else if !aside && rules.on(Protection::UnkeptRemoves) {
            node.entries[key] = None;
        }
        let landing = flight.finish();
        if landing.again {
            (context.note)(Fact::Again);
        }
        if !aside && landing.again {
            node.flights[key] = Some(flight);
        }
        for caller in landing.waiting {
            self.answer(context, key, caller, (seen.version, seen.incarnation));
        }
    }
}
