//! Runs all tasks of a simulation in one thread: of those that could go on, a seeded choice does. Time passes only while none
//! can: it is tokio's paused clock, which then jumps to the next timer.

use std::{
    collections::BTreeSet,
    future::{Future, poll_fn},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use super::{dice::Dice, world::World};
use crate::{host::Task, sync::lock, verify::history::NodeId};

/// Whose task: a node's, which stands still while the node is stopped, or the world's.
pub(super) type Owner = Option<NodeId>;

/// Where tasks come from, and where they wake up.
#[derive(Default)]
pub(super) struct Tasks {
    new: Mutex<Vec<(Owner, Task)>>,
    /// In their order, and not in that in which they woke up: who waits for a `watch` is woken in a random one.
    ready: Mutex<Vec<usize>>,
    /// Nodes that stand still, and their tasks that could go on.
    stopped: Mutex<BTreeSet<NodeId>>,
    held: Mutex<Vec<(NodeId, usize)>>,
    root: Mutex<Option<Waker>>,
    /// Polls so far.
    pub(super) steps: AtomicU64,
    /// Once in so many steps of a node, the task that would take it is slow; 0 and `u64::MAX`: never.
    pub(super) slow_once_in: AtomicU64,
}

impl Tasks {
    pub(super) fn spawn(&self, owner: Owner, task: Task) {
        lock(&self.new).push((owner, task));
        self.stir();
    }

    fn wake(&self, id: usize) {
        insert(&mut lock(&self.ready), id);
        self.stir();
    }

    fn stir(&self) {
        if let Some(root) = lock(&self.root).take() {
            root.wake();
        }
    }

    /// Stops a node: its process and all of its threads.
    pub(super) fn stop(&self, node: NodeId) {
        lock(&self.stopped).insert(node);
    }

    pub(super) fn resume(&self, node: NodeId) {
        lock(&self.stopped).remove(&node);
        let held = std::mem::take(&mut *lock(&self.held));
        let (resumed, held) = held.into_iter().partition::<Vec<_>, _>(|(of, _)| *of == node);
        *lock(&self.held) = held;
        for (_, id) in resumed {
            self.wake(id);
        }
    }

    pub(super) fn is_stopped(&self, node: NodeId) -> bool {
        lock(&self.stopped).contains(&node)
    }
}

/// One task, as its wakers know it.
struct Flag {
    id: usize,
    queued: AtomicBool,
    tasks: Arc<Tasks>,
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.tasks.wake(self.id);
        }
    }
}

struct Slot {
    owner: Owner,
    task: Option<Task>,
    flag: Arc<Flag>,
    waker: Waker,
}

pub(super) struct Executor {
    tasks: Arc<Tasks>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    dice: Dice,
    /// The time, and since which step it has been that.
    standstill: (Duration, u64),
}

/// After so many steps in which no time has passed, it never will.
const STANDSTILL: u64 = 300_000;

impl Executor {
    pub(super) fn new(tasks: Arc<Tasks>, seed: u64) -> Self {
        let dice = Dice::new(seed ^ 0x5eed);
        Self { tasks, slots: Vec::new(), free: Vec::new(), dice, standstill: Default::default() }
    }

    /// Runs until `main` has ended.
    pub(super) async fn run<T>(&mut self, world: &World, main: impl Future<Output = T>) -> T {
        let mut main = std::pin::pin!(main);
        poll_fn(|context| {
            loop {
                if let Poll::Ready(done) = main.as_mut().poll(context) {
                    return Poll::Ready(done);
                }
                *lock(&self.tasks.root) = Some(context.waker().clone());
                let mut moved = false;
                // The main task looks only now and then: it waits for time to pass, not for single steps.
                for _ in 0..64 {
                    if !self.step(world) {
                        break;
                    }
                    moved = true;
                }
                if !moved {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    fn step(&mut self, world: &World) -> bool {
        let new = std::mem::take(&mut *lock(&self.tasks.new));
        for (owner, task) in new {
            self.add(owner, task);
        }
        let id = {
            let mut ready = lock(&self.tasks.ready);
            if ready.is_empty() {
                return false;
            }
            let n = self.dice.below(ready.len());
            ready.remove(n)
        };
        let slot = &mut self.slots[id];
        let Some(task) = &mut slot.task else { return true };
        if let Some(node) = slot.owner {
            if self.tasks.is_stopped(node) {
                lock(&self.tasks.held).push((node, id));
                return true;
            }
            let slow = self.tasks.slow_once_in.load(Ordering::Relaxed);
            if !matches!(slow, 0 | u64::MAX) && self.dice.once_in(slow) {
                let pause = Duration::from_millis(self.dice.between(1, 40));
                let tasks = Arc::clone(&self.tasks);
                self.tasks.spawn(
                    None,
                    Box::pin(async move {
                        tokio::time::sleep(pause).await;
                        tasks.wake(id);
                    }),
                );
                return true;
            }
        }
        slot.flag.queued.store(false, Ordering::Relaxed);
        let steps = self.tasks.steps.fetch_add(1, Ordering::Relaxed);
        if self.standstill.0 != world.now() {
            self.standstill = (world.now(), steps);
        }
        assert!(steps - self.standstill.1 < STANDSTILL, "tasks run and no time passes, task {id} of {:?}", slot.owner);
        world.before_step(slot.owner, id);
        let done = task.as_mut().poll(&mut Context::from_waker(&slot.waker)).is_ready();
        if done {
            // What it drops may wake others, or spawn.
            let task = slot.task.take();
            drop(task);
            self.free.push(id);
        }
        world.after_step(self.slots[id].owner);
        true
    }

    fn add(&mut self, owner: Owner, task: Task) {
        let id = self.free.pop().unwrap_or(self.slots.len());
        let flag = Arc::new(Flag { id, queued: AtomicBool::new(true), tasks: Arc::clone(&self.tasks) });
        let slot = Slot { owner, task: Some(task), waker: Waker::from(Arc::clone(&flag)), flag };
        if id == self.slots.len() {
            self.slots.push(slot);
        } else {
            self.slots[id] = slot;
        }
        insert(&mut lock(&self.tasks.ready), id);
    }
}

fn insert(sorted: &mut Vec<usize>, id: usize) {
    if let Err(at) = sorted.binary_search(&id) {
        sorted.insert(at, id);
    }
}
