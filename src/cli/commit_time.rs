//! How long after a commit something happened here.
//!
//! The server says when a transaction committed (`pg_xact_commit_timestamp`, if `track_commit_timestamp` is on), by its
//! own clock. Ours may be another, so the difference of the two is measured: of several round trips the shortest one
//! says most, and half of it is how wrong the difference can be.
//!
//! The server takes the time when it writes the commit record; what follows is included: the wait for the disk, the
//! notification, and applying it.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use sqlx::PgPool;
use tokio::time::timeout;

/// Round trips of one measurement.
const ROUND_TRIPS: usize = 8;

/// Clocks drift apart by some 10 ms an hour at worst: negligible within this time.
const MEASURE_EVERY: Duration = Duration::from_mins(1);

/// A server that does not answer for this long is asked again later.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Asks one server for the times of commits.
pub(crate) struct CommitTimes {
    pool: PgPool,
    clock: Option<ServerClock>,
    measured_at: Option<Instant>,
}

/// The server's clock, seen from ours. Microseconds.
#[derive(Clone, Copy, Debug)]
struct ServerClock {
    ahead: i64,
    /// The difference can be wrong by this much.
    error: i64,
}

impl CommitTimes {
    pub(crate) fn new(pool: PgPool) -> Self {
        Self { pool, clock: None, measured_at: None }
    }

    /// How long before the given moment each transaction committed, in their order; `None` where it cannot be told.
    pub(crate) async fn latencies(&mut self, seen: &[(u64, SystemTime)]) -> Vec<Option<Duration>> {
        let found = timeout(ANSWER_WITHIN, self.find(seen)).await;
        found.ok().and_then(Result::ok).unwrap_or_else(|| vec![None; seen.len()])
    }

    async fn find(&mut self, seen: &[(u64, SystemTime)]) -> sqlx::Result<Vec<Option<Duration>>> {
        let Some(clock) = self.measure().await? else { return Ok(vec![None; seen.len()]) };
        let commits = self.commits(seen).await?;
        Ok(seen.iter().map(|(xid, at)| clock.between(*commits.get(xid)?, micros(*at))).collect())
    }

    /// The clock as it was measured last, or is measured now. `None`: the server keeps no commit times.
    async fn measure(&mut self) -> sqlx::Result<Option<ServerClock>> {
        if self.measured_at.is_some_and(|at| at.elapsed() < MEASURE_EVERY) {
            return Ok(self.clock);
        }
        let on = sqlx::query_scalar("select current_setting('track_commit_timestamp')::boolean");
        self.clock = if on.fetch_one(&self.pool).await? { Some(self.compare_clocks().await?) } else { None };
        self.measured_at = Some(Instant::now());
        Ok(self.clock)
    }

    async fn compare_clocks(&self) -> sqlx::Result<ServerClock> {
        let mut connection = self.pool.acquire().await?;
        let mut best = ServerClock { ahead: 0, error: i64::MAX };
        for _ in 0..ROUND_TRIPS {
            let sent = micros(SystemTime::now());
            let ask = sqlx::query_scalar("select (extract(epoch from clock_timestamp()) * 1000000)::int8");
            let server: i64 = ask.fetch_one(&mut *connection).await?;
            let back = micros(SystemTime::now());
            let error = (back - sent) / 2;
            if (0..best.error).contains(&error) {
                best = ServerClock { ahead: server - (sent + error), error };
            }
        }
        if best.ahead.abs() <= best.error {
            // No difference can be seen: most likely it is one clock.
            best.ahead = 0;
        }
        Ok(best)
    }

    async fn commits(&self, seen: &[(u64, SystemTime)]) -> sqlx::Result<HashMap<u64, i64>> {
        let xids: Vec<String> = seen.iter().map(|(xid, _)| xid.to_string()).collect();
        let ask = sqlx::query_as(
            "select x, (extract(epoch from pg_xact_commit_timestamp(x::xid8::xid)) * 1000000)::int8 \
             from unnest($1::text[]) as x",
        );
        let commits: Vec<(String, Option<i64>)> = ask.bind(xids).fetch_all(&self.pool).await?;
        Ok(commits.into_iter().filter_map(|(xid, at)| Some((xid.parse().ok()?, at?))).collect())
    }
}

impl ServerClock {
    /// From a moment of the server's clock to one of ours. `None` where that cannot be: a clock was set.
    fn between(self, server: i64, ours: i64) -> Option<Duration> {
        let passed = ours + self.ahead - server;
        (passed >= -self.error).then(|| Duration::from_micros(u64::try_from(passed).unwrap_or(0)))
    }
}

/// Microseconds since 1970.
fn micros(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_difference_of_the_clocks_is_taken_out() {
        let clock = ServerClock { ahead: 5_000, error: 100 };
        assert_eq!(clock.between(1_000_000, 996_000), Some(Duration::from_millis(1)));
        assert_eq!(clock.between(1_000_000, 994_950), Some(Duration::ZERO), "within the error of the measurement");
        assert_eq!(clock.between(1_000_000, 990_000), None, "before the commit: a clock was set");
    }
}
