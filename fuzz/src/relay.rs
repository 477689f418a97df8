//! A queue, and lines that come and go. Nothing that a line which counts had in front of it is lost: whatever stands in the
//! queue behind the begin of the epoch, and before the place that the node has read, went into the inbox, or *everything*
//! went there after it. What stands before a fence did so before the fence (I4).

use arbitrary::Arbitrary;
use rowcache::fuzzing::{Item, Lost, Relay};
use uuid::Uuid;

#[derive(Arbitrary, Debug)]
pub struct Input {
    /// What the spare's messages may take: little, or more than there can be.
    tight: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Commit,
    LongCommit,
    /// The node sends a fence, which is in the queue at once.
    Fence,
    /// The node notes a fence that it sends; it is in the queue later.
    SlowFence,
    FenceArrives,
    /// Somebody sends a fence of ours once more.
    Forged(u8),
    Attach,
    Receives {
        spare: bool,
        many: u8,
    },
    LosePrimary,
    LoseSpare,
}

#[derive(Clone, Copy)]
enum Told {
    Commit { long: bool },
    Fence(u128),
}

struct World {
    queue: Vec<Told>,
    relay: Relay,
    primary: (usize, usize),
    spare: Option<(usize, usize)>,
    slow: Option<u128>,
    fences: u128,
    /// The first of the queue that this epoch must not lose.
    begin: usize,
    /// What went in, and how long the queue was then.
    inbox: Vec<(Item, usize)>,
}

pub fn run(input: &Input) {
    let mut relay = Relay::new(if input.tight { 400 } else { usize::MAX });
    let primary = (relay.open(true), 0);
    let mut world =
        World { queue: Vec::new(), relay, primary, spare: None, slow: None, fences: 0, begin: 0, inbox: Vec::new() };
    for step in input.steps.iter().take(200) {
        world.step(*step);
    }
    world.step(Step::Receives { spare: false, many: u8::MAX });
    world.check();
    world.step(Step::LosePrimary);
    world.step(Step::Receives { spare: false, many: u8::MAX });
    world.check();
}

impl World {
    fn item(&self, at: usize) -> Item {
        match self.queue[at] {
            Told::Commit { long } => {
                Item::Message(format!("m{at}{}", if long { "x".repeat(300) } else { String::new() }))
            }
            Told::Fence(n) => Item::Own(format!(r#"{{"v":1,"f":"{}","s":"1:1:","l":1}}"#, Uuid::from_u128(n))),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Commit => self.queue.push(Told::Commit { long: false }),
            Step::LongCommit => self.queue.push(Told::Commit { long: true }),
            Step::Fence | Step::SlowFence if self.slow.is_some() => {}
            Step::Fence | Step::SlowFence => {
                self.fences += 1;
                self.relay.fence_sent(Uuid::from_u128(self.fences));
                self.slow = Some(self.fences);
                if matches!(step, Step::Fence) {
                    self.step(Step::FenceArrives);
                }
            }
            Step::FenceArrives => self.queue.extend(self.slow.take().map(Told::Fence)),
            // Who knows the nonce has read it in the queue.
            Step::Forged(n) if !self.queue.is_empty() => {
                let told = self.queue[usize::from(n) % self.queue.len()];
                if matches!(told, Told::Fence(_)) {
                    self.queue.push(told);
                }
            }
            Step::Forged(_) => {}
            Step::Attach if self.spare.is_none() => self.spare = Some((self.relay.open(false), self.queue.len())),
            Step::Attach => {}
            Step::Receives { spare, many } => (0..many).for_each(|_| self.receive(spare)),
            Step::LoseSpare => {
                if let Some((line, _)) = self.spare.take() {
                    assert!(matches!(self.relay.lost(line), Lost::Nothing));
                }
            }
            Step::LosePrimary => self.lose_primary(),
        }
    }

    fn receive(&mut self, spare: bool) {
        let line = if spare { self.spare } else { Some(self.primary) };
        let Some((line, at)) = line.filter(|(_, at)| *at < self.queue.len()) else { return };
        let heard = self.relay.received(line, self.item(at));
        assert_eq!(heard.is_some(), !spare, "the primary is heard, and nobody else");
        self.inbox.extend(heard.map(|item| (item, self.queue.len())));
        if spare { self.spare = Some((line, at + 1)) } else { self.primary = (line, at + 1) }
    }

    fn lose_primary(&mut self) {
        let covered = self.relay.is_covered();
        match self.relay.lost(self.primary.0) {
            Lost::Handoff(items) => {
                assert!(covered);
                self.inbox.extend(items.into_iter().map(|item| (item, self.queue.len())));
                self.primary = self.spare.take().expect("a spare took over");
            }
            Lost::Gap => {
                assert!(!covered, "the spare covers");
                self.check();
                self.relay.give_up_both();
                (self.spare, self.slow) = (None, None);
                self.inbox.clear();
                self.begin = self.queue.len();
                self.primary = (self.relay.open(true), self.begin);
            }
            Lost::Nothing => panic!("the primary was nobody"),
        }
        self.check();
    }

    /// See the module.
    fn check(&self) {
        self.assert_covered(self.primary.1, self.inbox.len());
        for at in self.begin..self.primary.1 {
            if let Told::Fence(_) = self.queue[at] {
                let item = self.item(at);
                if let Some(applied) = self.inbox.iter().position(|(it, _)| *it == item) {
                    let first = (self.begin..).find(|at| self.item(*at) == item).expect("it is there");
                    self.assert_covered(first, applied);
                }
            }
        }
    }

    fn assert_covered(&self, end: usize, before: usize) {
        for at in self.begin..end {
            let item = self.item(at);
            let covers = |(it, length): &(Item, usize)| *it == item || *it == Item::Overflow && *length > at;
            // A forged fence is a message that says nothing.
            let matters = matches!(item, Item::Message(_));
            assert!(!matters || self.inbox[..before].iter().any(covers), "{item:?} is lost before {before}");
        }
    }
}
