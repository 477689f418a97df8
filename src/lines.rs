//! A node's lines, one or two: what they deliver, and what it means that one is lost.
//!
//! ```text
//! line  ──→ relay ──→ inbox
//! spare ──→ relay: kept, until a fence shows that the other line has received it too, or until that one is lost
//! ```

use std::sync::Arc;

use crate::{
    coherence::{Boot, Coherence, Fence, Reason},
    error::{Error, Kind, Result},
    fleet,
    inbox::Item,
    relay::{LineId, Loss},
    server::{Hear, Line, Received},
    shared::Shared,
    status::Event,
    sync::lock,
};

/// The end of a connection is seen by its task, and by a statement that was under way: whoever comes first says the same.
pub(crate) fn warn_lost(how: &str) {
    tracing::warn!(%how, "the LISTEN connection was lost; reads go to Postgres until it is back");
}

/// What one line tells its node.
struct Heard {
    by: Arc<Shared>,
    from: LineId,
}

impl Hear for Heard {
    fn received(&self, message: Received) {
        let item = match message {
            Received::Change(payload) => Item::Message(payload),
            Received::Own(payload) => Item::Own(payload),
            Received::Question(payload) => match fleet::asked(&payload) {
                Some(nonce) => Item::Question(nonce),
                // Not a change, whatever it is.
                None => return,
            },
        };
        self.by.received(self.from, item);
    }

    fn lost(&self, how: String) {
        if self.by.lose(self.from, how.clone()) {
            warn_lost(&how);
        }
    }
}

impl Shared {
    /// Connects and listens. What the line receives counts for nothing before it is the first one or the spare.
    pub(crate) async fn open_line(self: &Arc<Self>) -> Result<(LineId, Arc<dyn Line>)> {
        let id = lock(&self.relay).next_id();
        let hear = Arc::new(Heard { by: Arc::clone(self), from: id });
        Ok((id, self.server.open(&self.own_channel, hear).await?))
    }

    fn received(&self, from: LineId, item: Item) {
        let own = matches!(item, Item::Own(_));
        let mut relay = lock(&self.relay);
        let (passed, covers) = relay.received(from, item);
        if let Some(item) = passed {
            self.inbox.push(item);
        }
        if covers {
            self.tell(Event::Covered);
        }
        drop(relay);
        if covers {
            tracing::info!("the spare line covers: losing one of the two is no gap");
        }
        if own {
            // A fence that one line has received sets the other one a limit, which the keeper watches.
            self.wake.notify_one();
        }
    }

    /// Begins an epoch with this line.
    pub(crate) fn lead(&self, id: LineId, line: &Arc<dyn Line>) {
        let incarnation = line.incarnation();
        lock(&self.relay).lead(id, Arc::clone(line));
        self.look(|coherence| coherence.listening(incarnation));
        self.lose_if_ended(id, &**line);
    }

    /// Keeps this line beside the one that is heard, to take over from it.
    pub(crate) fn attach(&self, id: LineId, line: &Arc<dyn Line>) -> Result<()> {
        if self.look(|coherence| coherence.incarnation()) != Some(line.incarnation()) {
            return Err(Error::new(
                Kind::Unavailable,
                "it reached another server or database than the LISTEN connection that is open: a failover may be \
                 under way, or the listener's address stands for several servers",
            ));
        }
        lock(&self.relay).attach(id, Arc::clone(line));
        self.lose_if_ended(id, &**line);
        // It covers when a fence that is sent from here on has been received. An error: there is a gap anyway.
        let _ = self.look(Coherence::want_fence);
        self.wake.notify_one();
        Ok(())
    }

    /// A line that ended before the relay knew of it was nobody's loss.
    fn lose_if_ended(&self, id: LineId, line: &dyn Line) {
        if !line.is_open() {
            self.lose(id, "closed".into());
        }
    }

    /// The line that is heard, and whose control connection is used.
    pub(crate) fn line(&self) -> Option<(LineId, Arc<dyn Line>)> {
        lock(&self.relay).primary().cloned()
    }

    /// The server's ends of the sessions that listen: of the line that is heard, and of its spare.
    pub(crate) fn listeners(&self) -> [Option<i32>; 2] {
        let relay = lock(&self.relay);
        [relay.primary().and_then(|(_, line)| line.listener()), relay.spare().and_then(|line| line.listener())]
    }

    /// Notes that a fence is about to be sent. Returns whether a spare could take over if that failed.
    pub(crate) fn fence_starts(&self, fence: Fence) -> bool {
        let mut relay = lock(&self.relay);
        relay.fence_sent(fence.nonce, self.host.now());
        relay.is_covered()
    }

    /// A line is lost, or is given up. Returns whether that is a gap, and was none before.
    pub(crate) fn lose(&self, id: LineId, how: String) -> bool {
        if self.status_reason() == Some(Reason::ShutDown) {
            // Its lines end, in whatever order.
            return false;
        }
        let mut relay = lock(&self.relay);
        let (line, event, text) = match relay.lost(id) {
            Loss::Late => return false,
            Loss::Gap => {
                drop(relay);
                let is_news = self.look(|coherence| coherence.has_line());
                self.gap(Reason::ConnectionLost(how));
                return is_news;
            }
            Loss::Spare(line) => (line, Event::SpareLost(how.clone()), "the spare line was lost; opening another one"),
            Loss::Handoff { items, old } => {
                for item in items {
                    self.inbox.push(item);
                }
                (old, Event::Handoff(how.clone()), "the LISTEN connection was lost, and the spare one took over")
            }
        };
        self.tell(event);
        drop(relay);
        drop(line);
        tracing::info!(%how, "{text}");
        self.spare_wanted.notify_one();
        self.wake.notify_one();
        false
    }

    /// Gives up a line that is deaf while the other one is not. Returns whether there was one.
    pub(crate) fn lose_the_deaf(&self, now: Boot) -> bool {
        let deaf = lock(&self.relay).deaf(self.config.beat_timeout);
        let Some((_, id)) = deaf.filter(|(at, _)| now > *at) else { return false };
        self.lose(id, "it did not receive a fence that the other line has received".into());
        true
    }

    /// When a line is to be given up unless it receives something.
    pub(crate) fn deaf_at(&self) -> Option<Boot> {
        lock(&self.relay).deaf(self.config.beat_timeout).map(|(at, _)| at)
    }

    pub(crate) fn give_up_lines(&self) {
        let lines = lock(&self.relay).clear();
        drop(lines);
    }

    pub(crate) fn is_covered(&self) -> bool {
        let covered = lock(&self.relay).is_covered();
        covered && self.look(|coherence| coherence.bypassed().is_none())
    }
}
