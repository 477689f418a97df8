//! The CPU time of a server: of its processes that run, and of those that have ended.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// What the server with this postmaster has used so far.
pub(super) fn cpu(postmaster: u32) -> Result<Duration> {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").context("this machine has no /proc")? {
        let Ok(stat) = fs::read_to_string(entry?.path().join("stat")) else { continue };
        // The name, in parentheses, may contain anything.
        let Some((pid, rest)) =
            stat.split_once(" (").zip(stat.rsplit_once(") ")).map(|((pid, _), (_, rest))| (pid, rest))
        else {
            continue;
        };
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |n: usize| fields[n].parse::<u64>().unwrap_or(0);
        // Fields 3 (state), 4 (parent), 14 to 17 (user, system; of children that have ended) of proc(5).
        if pid == postmaster.to_string() {
            ticks += number(11) + number(12) + number(13) + number(14);
        } else if number(1) == u64::from(postmaster) {
            ticks += number(11) + number(12);
        }
    }
    // 100 a second, on every Linux.
    Ok(Duration::from_millis(ticks * 10))
}
