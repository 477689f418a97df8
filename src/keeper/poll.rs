//! Polls the change log: with each fence, and in between as often as changes come, while a table is open that is told that way.

use std::time::Duration;

use tokio::time::timeout;

use super::{full, limit};
use crate::{
    change_log::{Continuity, Position},
    coherence::{Boot, Fence},
    config::Config,
    error::{Error, Kind, Result},
    inbox::Item,
    lines::warn_lost,
    server::Line,
    shared::Shared,
    tables::Via,
};

/// Where a node is in the change log, and when it looks again.
pub(super) struct Poller {
    position: Option<Position>,
    polled_at: Option<Boot>,
    /// Short after a poll that found something, longer with each one that found nothing.
    pause: Duration,
    /// The range of the log that was the last one when somebody had trimmed it.
    trimmed: Option<u64>,
    /// When this was the oldest transaction that ran: after `log_retention` what is below it is removed.
    oldest: Option<(Boot, u64)>,
    /// Polls in a row that have not ended in time.
    late: u32,
}

/// After so many there probably is more to read since the position than can be read in time, and the next attempt would fare no better. Between
/// two of them a line was opened, so that it is not the link: the server answers, and makes a poll's answer up before it sends any of it.
const TOO_FAR_BEHIND: u32 = 2;

impl Poller {
    pub(super) fn new(config: &Config) -> Self {
        Self { position: None, polled_at: None, pause: config.poll_max, trimmed: None, oldest: None, late: 0 }
    }

    /// When to poll, fences apart; `None` while no open table is told by way of the log.
    pub(super) fn due(&self, shared: &Shared) -> Option<Boot> {
        let last = self.polled_at?;
        let is_wanted = shared.config.polls_always || shared.tables.is_told(None, Via::Log);
        is_wanted.then(|| last + self.pause)
    }

    /// Polls once. What was found is in the inbox when this returns, and behind it the fence that the poll is part of.
    ///
    /// The position is moved after that, and only here: what the inbox did not get is read again, by whichever line comes next.
    pub(super) async fn poll(&mut self, shared: &Shared, fence: Option<Fence>) {
        let Some((id, line)) = shared.line() else { return };
        let covered = shared.is_covered();
        let limit = limit(shared, covered);
        let outcome = timeout(limit, self.read(shared, &*line, fence)).await;
        if outcome.is_err() {
            self.late += 1;
        }
        let lost = match outcome {
            Ok(Ok(())) => return,
            // Late, which the state machine sees by itself.
            Err(_) if !covered && fence.is_some() => return,
            Ok(Err(error)) => full(&error),
            Err(_) => format!("the change log could not be polled within {limit:?}"),
        };
        if shared.lose(id, lost.clone()) && !fence.is_some_and(|fence| fence.probe) {
            warn_lost(&lost);
        }
        if let Some(fence) = fence {
            // If there is no gap, another one is due at once.
            shared.look(|coherence| coherence.fence_not_sent(fence));
        }
    }

    async fn read(&mut self, shared: &Shared, line: &dyn Line, fence: Option<Fence>) -> Result<()> {
        let push = |payload| {
            shared.inbox.push(Item::Message(payload));
        };
        let is_too_far_behind = self.late >= TOO_FAR_BEHIND;
        let since = self.position.as_ref().filter(|_| !is_too_far_behind);
        let polled = line.poll(since, &push).await?;
        if polled.incarnation != line.incarnation() {
            return Err(Error::new(Kind::Unavailable, "the change log is polled on another server than before"));
        }
        let (messages, mark, standby) = (polled.messages, polled.mark(), polled.standby);
        let (range, xmin) = (polled.range(), polled.xmin());
        let (position, continuity) = Position::after(self.position.as_ref(), polled);
        if continuity == Continuity::Trimmed {
            tracing::warn!(
                "the change log was trimmed while this node could not read it; everything held was forgotten"
            );
        }
        if is_too_far_behind {
            tracing::warn!("the change log had more to read than could be read in time; everything held was forgotten");
        }
        if continuity != Continuity::Kept || is_too_far_behind {
            shared.inbox.push(Item::Missed);
        }
        if continuity == Continuity::OtherServer {
            self.oldest = None;
        }
        self.late = 0;
        if let Some(fence) = fence {
            shared.inbox.push(Item::Polled(Box::new((fence, mark))));
        }
        self.position = Some(position);
        self.polled_at = Some(shared.host.now());
        let (min, max) = (shared.config.poll_min, shared.config.poll_max);
        self.pause = if messages > 0 { min } else { (self.pause * 2).clamp(min, max) };
        if fence.is_some() && !standby {
            self.trim(shared, line, range, xmin).await;
        }
        Ok(())
    }

    /// Trims the log if that is due. Any node may do it. That it cannot be done is nothing that a node depends on.
    async fn trim(&mut self, shared: &Shared, line: &dyn Line, range: u64, xmin: u64) {
        let now = shared.host.now();
        let (since, oldest) = *self.oldest.get_or_insert((now, xmin));
        let retention = shared.config.log_retention.max(shared.config.lease);
        let before = (now.saturating_sub(since) >= retention).then_some(oldest);
        if before.is_none() && self.trimmed == Some(range) {
            return;
        }
        let trimmed = line.trim(before).await.unwrap_or_else(|error| {
            tracing::warn!(error = full(&error), "cannot trim the change log, which grows until some node can");
            true
        });
        if trimmed {
            self.trimmed = Some(range);
            if before.is_some() {
                self.oldest = Some((now, xmin));
            }
        }
    }
}
