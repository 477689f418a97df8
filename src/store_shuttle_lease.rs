//! The lease's end under the model checker: the clock closes the gates while loads are published, messages applied, and a
//! fence counts. The steps are those of `Shared::step`: what the state machine says is done under its lock.
//!
//! Checked in every schedule: gates are open only while the state machine is up, whenever its lock is free; a read that
//! begins when no line proves anything finds nothing in memory; and what is written while the line is deaf is seen by
//! whoever asks for what is current once the lease has ended.

use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::{
    change::Mark,
    coherence::{Action, Coherence, Reason, Timing},
    horizon::Horizon,
};

const TIMING: Timing = Timing {
    beat: Duration::from_secs(1),
    beat_timeout: Duration::from_secs(3),
    lease: Duration::from_secs(5),
    spacing: Duration::from_millis(5),
};

struct Node {
    world: Arc<World>,
    coherence: Mutex<Coherence>,
    horizon: Horizon,
    /// Times at which the gates were opened: changes under the lock of `coherence`.
    opened: AtomicU64,
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn mark() -> Mark {
    Mark { snapshot: "10:10:".parse().unwrap(), lsn: 7 }
}

impl Node {
    /// A node that is up since second 1, and has row 0 in memory.
    fn new() -> Arc<Self> {
        let world = World::new(CALM);
        world.tables.set_coherent(false);
        let coherence = Mutex::new(Coherence::new(TIMING, at(0)));
        let node = Arc::new(Self { world, coherence, horizon: Horizon::default(), opened: AtomicU64::new(0) });
        node.listen();
        node.fence(1);
        node.world.get(0, Mood::Coherent, false);
        node
    }

    /// As `Shared::step`.
    fn step(&self, step: impl FnOnce(&mut Coherence) -> Vec<Action>) {
        let mut coherence = lock(&self.coherence);
        for action in step(&mut coherence) {
            match action {
                Action::Open => {
                    self.world.tables.set_coherent(true);
                    self.opened.fetch_add(1, Ordering::SeqCst);
                }
                Action::Close => {
                    self.horizon.gap();
                    self.world.tables.set_coherent(false);
                }
                Action::Advance => {
                    self.horizon.advance(coherence.coherent_as_of().unwrap(), coherence.mark().unwrap().lsn);
                }
                Action::Release(_) => {}
            }
        }
    }

    fn listen(&self) {
        let incarnation = Incarnation { canary: Uuid::nil(), started: 7 };
        self.step(|coherence| {
            coherence.listening(incarnation);
            Vec::new()
        });
    }

    /// A fence is sent at this time, and comes back, behind whatever is in the channel.
    fn fence(&self, now: u64) {
        let nonce = Uuid::from_u128(now.into());
        let Some(fence) = lock(&self.coherence).next_fence(at(now), nonce) else { return };
        thread::yield_now();
        while self.world.apply() {}
        self.step(|coherence| coherence.fence_checked(fence));
        self.step(|coherence| coherence.fence_polled(fence, mark()));
        self.step(|coherence| coherence.fence_applied(nonce, mark()));
    }

    fn check(&self) {
        let coherence = lock(&self.coherence);
        assert_eq!(self.world.store.is_coherent(), coherence.bypassed().is_none(), "a gate that nobody may trust");
        assert!(coherence.bypassed().is_none() || self.horizon.covered() == 0);
    }

    /// A read begins while the node is not coherent.
    fn look(&self) {
        let opened = {
            let coherence = lock(&self.coherence);
            if coherence.bypassed().is_none() {
                return;
            }
            self.opened.load(Ordering::SeqCst)
        };
        let held = self.world.store.lookup(&0);
        let coherence = lock(&self.coherence);
        if self.opened.load(Ordering::SeqCst) == opened {
            assert!(held.is_none(), "served without a lease");
        }
        drop(coherence);
    }
}

/// Plays the steps at the same time.
fn together(node: &Arc<Node>, steps: impl IntoIterator<Item = fn(&Node)>) {
    let threads = steps.into_iter().map(|step| {
        let node = Arc::clone(node);
        thread::spawn(move || step(&node))
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().unwrap();
    }
}

fn scenario() {
    let node = Node::new();
    let steps: [fn(&Node); 5] = [
        |node| {
            // The lease ends at 6; a fence that was sent at 2 prolongs it to 7, if it comes in time.
            node.step(|coherence| coherence.tick(at(6)));
            node.check();
            node.step(|coherence| coherence.tick(at(9)));
            node.check();
            node.look();
        },
        |node| {
            node.fence(2);
            node.check();
            // The line is found again, if it was given up.
            node.listen();
            node.fence(9);
            node.check();
        },
        |node| {
            node.world.write(0, false);
            node.world.write(1, false);
        },
        |node| {
            node.world.get(0, Mood::Coherent, false);
            node.world.get(1, Mood::Current, false);
        },
        |node| {
            node.look();
            node.world.get(0, Mood::Current, false);
        },
    ];
    together(&node, steps);
    while node.world.apply() {}
    node.check();
    node.world.get(0, Mood::Coherent, false);
    node.world.assert_at_rest();
}

#[test]
fn shuttle_the_end_of_the_lease_against_fences_loads_and_reads() {
    explore(scenario);
}

/// The line is deaf: what is written from here on is never told.
#[test]
fn shuttle_a_deaf_line_against_the_end_of_the_lease() {
    explore(|| {
        let node = Node::new();
        lock(&node.world.channel).listening = false;
        let steps: [fn(&Node); 4] = [
            |node| {
                node.step(|coherence| coherence.tick(at(7)));
                node.look();
                // Whoever begins now sees what was written, whatever was being loaded and published meanwhile.
                node.world.get(0, Mood::Current, false);
            },
            |node| node.world.write(0, false),
            |node| node.world.get(0, Mood::Coherent, false),
            |node| node.step(|coherence| coherence.gap(at(7), Reason::BeatLate)),
        ];
        together(&node, steps);
        assert!(node.world.store.lookup(&0).is_none());
        node.check();
        node.world.assert_at_rest();
    });
}
