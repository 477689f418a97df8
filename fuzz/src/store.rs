//! Two caches of one table, step by step, against a plain history of rows. After each step, for what the caches hold and
//! return: I1, both halves of I2, the structure of the store; and of what is told, I4. At the end: nobody waits, nothing is
//! left behind, and what is held is what the database has.

mod oracle;
mod world;

use arbitrary::Arbitrary;

use world::World;

pub const KEYS: usize = 4;

#[derive(Arbitrary, Debug)]
pub struct Input {
    plan: Plan,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Plan {
    pub hashed: bool,
    pub capacity: u8,
    pub runners: u8,
    pub batch: u8,
}

/// How a commit is told.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Form {
    /// By its keys, or their hashes.
    Keys,
    /// By keys of another type, or hashes of another secret.
    Strange,
    Table,
    Everything,
    /// By what nobody can read.
    Unreadable,
    Garbage,
}

/// Which commits, caches and loads: any number, taken modulo those that there are.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Step {
    /// Rows change, and it is told.
    Commit {
        keys: u8,
        absent: bool,
        form: Form,
    },
    /// A row changes while the triggers are off.
    Untold {
        key: u8,
    },
    /// The next message is applied.
    Apply,
    Get {
        cache: bool,
        key: u8,
        mood: Asks,
        cancelled: bool,
    },
    Start {
        load: u8,
    },
    Read {
        load: u8,
    },
    Finish {
        load: u8,
        failed: u8,
        foreign: bool,
    },
    Fail {
        load: u8,
    },
    Drop {
        load: u8,
    },
    /// This node knows of a commit by itself.
    Invalidate {
        key: u8,
    },
    Clear,
    Gap,
    Listen,
    Fence,
    Look,
    Verify {
        whole: bool,
    },
    Snapshot {
        cache: bool,
    },
    Refill {
        cache: bool,
    },
    Reclaim,
    Sweep,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Asks {
    Coherent,
    Stale,
    Current,
}

pub fn run(input: &Input) {
    let mut world = World::new(input.plan);
    for step in input.steps.iter().take(300) {
        world.step(*step);
        world.check();
    }
    world.settle();
}
