//! One node: its channel, its caches, its loads, and who waits.

use std::collections::VecDeque;

use rowcache::{
    Rows,
    fuzzing::{self, Answer, Cache, Load, Mood, Tables, Wait},
};

use super::{
    Asks, Form, KEYS, Plan, Step,
    oracle::{Database, Moment},
};

const SECRET: &[u8] = b"secret";

pub struct World {
    database: Database,
    hashed: bool,
    tables: Tables,
    caches: [Cache; 2],
    capacities: [usize; 2],
    channel: VecDeque<Told>,
    listening: bool,
    /// A fence came back on this line, and there has been no gap since.
    up: bool,
    /// Changes with the triggers.
    fingerprint: u64,
    /// There was a write which no trigger told, and nobody has looked since.
    untold: bool,
    /// Everything that was committed up to this moment has been applied; 0 in a gap.
    covered: Moment,
    /// For each key: a commit that has been applied.
    applied: [Moment; KEYS],
    /// For each cache and key: the moment of what was returned.
    returned: [[Moment; KEYS]; 2],
    gets: [u64; 2],
    loads: Vec<Slot>,
    waits: Vec<Waiting>,
}

enum Told {
    Change { payload: String, keys: Vec<usize>, at: Moment },
    Fence { sent: Moment },
}

struct Slot {
    load: Load,
    keys: Vec<i64>,
    rows: Option<(Vec<Option<u64>>, Moment)>,
}

struct Waiting {
    cache: usize,
    key: usize,
    floor: Moment,
    wait: Wait,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let secret = plan.hashed.then_some(SECRET);
        let capacities = [plan.capacity, plan.capacity / 6].map(|capacity| 1 + usize::from(capacity % 6));
        let (runners, batch) = (1 + usize::from(plan.runners % 3), 1 + usize::from(plan.batch % 3));
        let mut world = Self {
            database: Database::default(),
            hashed: plan.hashed,
            tables: Tables::default(),
            caches: capacities.map(|capacity| Cache::new(capacity, runners, batch, secret)),
            capacities,
            channel: VecDeque::new(),
            listening: false,
            up: false,
            fingerprint: 0,
            untold: false,
            covered: 0,
            applied: [0; KEYS],
            returned: [[0; KEYS]; 2],
            gets: [0; 2],
            loads: Vec::new(),
            waits: Vec::new(),
        };
        for cache in &world.caches {
            world.tables.add(cache, 0);
        }
        world.database.commit(0..KEYS - 1, false);
        world.recover();
        world
    }

    pub fn step(&mut self, step: Step) {
        match step {
            Step::Commit { keys, absent, form } => self.commit(keys, absent, form),
            Step::Untold { key } => {
                self.database.commit([usize::from(key) % KEYS], false);
                (self.fingerprint, self.untold) = (self.fingerprint + 1, true);
            }
            Step::Apply => drop(self.apply()),
            Step::Get { cache, key, mood, cancelled } => {
                self.get(usize::from(cache), usize::from(key) % KEYS, mood, cancelled);
            }
            Step::Start { load } => drop(self.slot(load).map(|at| self.start(at))),
            Step::Read { load } => drop(self.slot(load).map(|at| self.read(at))),
            Step::Finish { load, failed, foreign } => {
                if let Some(at) = self.slot(load) {
                    self.finish(at, failed, foreign);
                }
            }
            Step::Fail { load } => {
                if let Some(at) = self.slot(load) {
                    let slot = &mut self.loads[at];
                    slot.load.fail();
                    (slot.keys, slot.rows) = (Vec::new(), None);
                }
            }
            Step::Drop { load } => drop(self.slot(load).map(|at| self.loads.swap_remove(at))),
            Step::Invalidate { key } => {
                let key = usize::from(key) % KEYS;
                self.tables.apply(&payload(self.caches[0].rows(&[name(key)])));
                self.applied[key] = self.database.now;
            }
            Step::Clear => {
                self.tables.apply(&payload(Rows::All));
                self.applied = [self.database.now; KEYS];
            }
            Step::Gap => self.gap(),
            Step::Listen => self.listening = true,
            Step::Fence if self.listening => self.channel.push_back(Told::Fence { sent: self.database.now }),
            Step::Fence => {}
            Step::Look => self.look(),
            Step::Verify { whole } => self.verify(whole),
            Step::Snapshot { cache } => self.snapshot(usize::from(cache)),
            Step::Refill { cache } => {
                let cache = usize::from(cache);
                let mut loads = Vec::new();
                self.caches[cache].refill(2, &mut loads);
                self.add(loads);
            }
            Step::Reclaim => self.caches.iter().for_each(Cache::reclaim),
            Step::Sweep => self.caches.iter().for_each(Cache::sweep),
        }
    }

    fn commit(&mut self, keys: u8, absent: bool, form: Form) {
        let chosen: Vec<usize> = (0..KEYS).filter(|key| keys >> key & 1 == 1).collect();
        self.database.commit(chosen.iter().copied(), absent);
        if !self.listening {
            return;
        }
        let names: Vec<i64> = chosen.iter().map(|key| name(*key)).collect();
        let payload = match form {
            Form::Keys => payload(self.caches[0].rows(&names)),
            Form::Strange if self.hashed => {
                let another = Cache::new(1, 1, 1, Some(b"another"));
                payload(another.rows(&names))
            }
            Form::Strange => r#"{"v":1,"t":"t","k":["x"]}"#.to_owned(),
            Form::Table => payload(Rows::All),
            Form::Everything => r#"{"v":1,"all":true}"#.to_owned(),
            Form::Unreadable => r#"{"v":1,"t":"t","k":[],"later":1}"#.to_owned(),
            Form::Garbage => "{".to_owned(),
        };
        self.channel.push_back(Told::Change { payload, keys: chosen, at: self.database.now });
    }

    /// Returns whether there was anything.
    fn apply(&mut self) -> bool {
        match self.channel.pop_front() {
            None => return false,
            Some(Told::Change { payload, keys, at }) => {
                self.tables.apply(&payload);
                for key in keys {
                    self.applied[key] = self.applied[key].max(at);
                }
            }
            Some(Told::Fence { sent }) => {
                self.look();
                if !self.up {
                    self.tables.set_coherent(true);
                    self.up = true;
                }
                self.covered = sent;
                self.applied = self.applied.map(|at| at.max(sent));
            }
        }
        true
    }

    /// Looks at the triggers, as is done for each fence.
    fn look(&mut self) {
        let was_in_doubt = self.tables.is_in_doubt();
        if self.tables.inspect(self.fingerprint) && !was_in_doubt {
            self.applied = [self.database.now; KEYS];
        }
        self.untold = false;
    }

    fn verify(&mut self, whole: bool) {
        if self.tables.is_in_doubt() {
            self.tables.verified(whole.then_some(self.fingerprint));
            if whole {
                self.applied = [self.database.now; KEYS];
                self.untold = false;
            }
        }
    }

    fn gap(&mut self) {
        if self.up {
            self.tables.set_coherent(false);
        }
        (self.up, self.listening, self.covered) = (false, false, 0);
        self.channel.clear();
    }

    fn recover(&mut self) {
        self.listening = true;
        self.channel.push_back(Told::Fence { sent: self.database.now });
        while self.apply() {}
        self.verify(true);
    }

    fn get(&mut self, cache: usize, key: usize, mood: Asks, cancelled: bool) {
        let mut floor = self.applied[key].max(self.returned[cache][key]);
        let mood = match mood {
            Asks::Coherent => Mood::Coherent,
            Asks::Stale => Mood::Stale,
            Asks::Current => Mood::Current,
        };
        if mood == Mood::Current && !self.caches[cache].is_coherent() {
            floor = self.database.now;
        }
        self.gets[cache] += 1;
        let mut loads = Vec::new();
        let got = self.caches[cache].get(name(key), mood, &mut loads);
        self.add(loads);
        match got {
            Ok(row) => self.answered(cache, key, floor, row),
            Err(wait) if !cancelled => self.waits.push(Waiting { cache, key, floor, wait }),
            Err(_) => {}
        }
    }

    fn answered(&mut self, cache: usize, key: usize, floor: Moment, row: Option<u64>) {
        let since = self.database.since(key, row, floor);
        let since = since.unwrap_or_else(|| panic!("key {key}: {row:?} is older than {floor} (I2)"));
        let returned = &mut self.returned[cache][key];
        *returned = since.max(*returned);
    }

    fn add(&mut self, loads: Vec<Load>) {
        self.loads.extend(loads.into_iter().map(|load| Slot { load, keys: Vec::new(), rows: None }));
    }

    fn slot(&self, n: u8) -> Option<usize> {
        (!self.loads.is_empty()).then(|| usize::from(n) % self.loads.len())
    }

    fn start(&mut self, at: usize) {
        let slot = &mut self.loads[at];
        if slot.keys.is_empty() {
            match slot.load.take() {
                Some(keys) => slot.keys = keys,
                None => drop(self.loads.swap_remove(at)),
            }
        }
    }

    /// The statement's snapshot is taken.
    fn read(&mut self, at: usize) {
        let slot = &mut self.loads[at];
        if slot.rows.is_none() && !slot.keys.is_empty() {
            let rows = slot.keys.iter().map(|key| self.database.row(usize::try_from(*key).expect("small")));
            slot.rows = Some((rows.collect(), self.database.now));
        }
    }

    fn finish(&mut self, at: usize, failed: u8, foreign: bool) {
        self.read(at);
        let slot = &mut self.loads[at];
        let Some((rows, moment)) = slot.rows.take() else { return };
        let row = |(n, row): (usize, Option<u64>)| (failed >> n & 1 == 0).then_some(row);
        slot.load.finish(rows.into_iter().enumerate().map(row).collect(), moment, !foreign);
        slot.keys.clear();
    }

    /// Rows from memory that are to be of one moment.
    fn snapshot(&mut self, cache: usize) {
        let keys: Vec<i64> = (0..KEYS).map(name).collect();
        let Some(rows) = self.caches[cache].snapshot(&keys, self.covered) else { return };
        for (key, row) in rows.into_iter().enumerate() {
            assert_eq!(row, self.database.at(key, self.covered), "key {key} at {} (snapshot)", self.covered);
        }
    }

    /// What must hold after every step.
    pub fn check(&mut self) {
        for mut waiting in std::mem::take(&mut self.waits) {
            match waiting.wait.poll() {
                Answer::Row(row) => self.answered(waiting.cache, waiting.key, waiting.floor, row),
                Answer::Failed => {}
                Answer::NotYet => self.waits.push(waiting),
                Answer::Forgotten => panic!("who waits for key {} is told nothing", waiting.key),
            }
        }
        let told = self.channel.iter().any(|told| matches!(told, Told::Change { .. }));
        for (n, cache) in self.caches.iter().enumerate() {
            cache.assert_whole();
            assert_eq!(cache.gets(), self.gets[n]);
            for key in 0..KEYS {
                let Some(row) = cache.peek(name(key)) else { continue };
                assert!(self.up, "key {key} is served in a gap");
                let current = self.database.since(key, row, self.applied[key]);
                assert!(current.is_some(), "key {key}: {row:?} is older than {} (I1)", self.applied[key]);
                if !told && !self.untold {
                    assert_eq!(row, self.database.row(key), "key {key} is stale for ever (I1)");
                }
            }
        }
    }

    fn run_all(&mut self) {
        while !self.loads.is_empty() {
            self.start(0);
            if !self.loads.is_empty() {
                self.finish(0, 0, false);
            }
            self.check();
        }
    }

    /// All comes to rest.
    pub fn settle(&mut self) {
        self.run_all();
        if !self.up {
            self.gap();
        }
        self.recover();
        self.check();
        for cache in 0..2 {
            for key in 0..KEYS {
                self.get(cache, key, Asks::Coherent, false);
                self.run_all();
                let held = self.caches[cache].peek(name(key));
                // Where there is no room for all, which one gives way is for quick_cache to say.
                if held.is_some() || self.capacities[cache] >= KEYS {
                    let row = Some(self.database.row(key));
                    assert_eq!(held, row, "key {key} is not held after a load that nothing overtook");
                }
            }
        }
        assert!(self.waits.is_empty(), "{} wait for ever", self.waits.len());
        self.caches.iter().for_each(Cache::reclaim);
        self.caches.iter().for_each(Cache::assert_at_rest);
    }
}

fn name(key: usize) -> i64 {
    i64::try_from(key).expect("small")
}

fn payload(rows: Rows) -> String {
    fuzzing::to_payload(&fuzzing::change(Some("t".into()), rows, Default::default(), None))
}
