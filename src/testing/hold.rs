//! What is held on its way until a test lets it go.

use std::sync::Arc;

use tokio::sync::watch;

use super::World;

/// A place that can be closed.
#[derive(Default)]
pub(super) struct Hold(watch::Sender<Held>);

#[derive(Clone, Copy, Default)]
struct Held {
    guards: usize,
    waiting: usize,
}

impl Hold {
    fn close(&self) {
        self.0.send_modify(|held| held.guards += 1);
    }

    fn open(&self) {
        self.0.send_modify(|held| held.guards -= 1);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.borrow().guards > 0
    }

    /// Returns when it is open.
    pub(super) async fn pass(&self) {
        if !self.is_closed() {
            return;
        }
        let _waits = Waits::at(self);
        self.until(|held| held.guards == 0).await;
    }

    async fn until(&self, is_it: impl FnMut(&Held) -> bool) {
        let mut held = self.0.subscribe();
        held.wait_for(is_it).await.expect("the sender is part of self");
    }
}

/// Somebody waits.
struct Waits<'a>(&'a Hold);

impl<'a> Waits<'a> {
    fn at(hold: &'a Hold) -> Self {
        hold.0.send_modify(|held| held.waiting += 1);
        Self(hold)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|held| held.waiting -= 1);
    }
}

/// Loads that have read their rows stay under way until this is dropped: made by [`Database::hold_loads`](super::Database::hold_loads).
#[must_use = "loads go on as soon as it is dropped"]
pub struct HeldLoads(Arc<World>);

impl HeldLoads {
    pub(super) fn new(world: &Arc<World>) -> Self {
        world.loads.close();
        Self(Arc::clone(world))
    }

    /// Returns when at least so many loads are held. One load is one statement, with as many keys as were waiting
    /// for it; a node runs [`Config::loads_max`](crate::Config::loads_max) of them at a time.
    pub async fn reached(&self, loads: usize) {
        self.0.loads.until(|held| held.waiting >= loads).await;
    }

    /// Lets them go on; as dropping it does.
    pub fn release(self) {}
}

impl Drop for HeldLoads {
    fn drop(&mut self) {
        self.0.loads.open();
    }
}

/// Messages are queued and not delivered until this is dropped: made by
/// [`Database::hold_messages`](super::Database::hold_messages).
#[must_use = "messages are delivered as soon as it is dropped"]
pub struct HeldMessages(Arc<World>);

impl HeldMessages {
    pub(super) fn new(world: &Arc<World>) -> Self {
        world.messages.close();
        Self(Arc::clone(world))
    }

    /// Lets them be delivered; as dropping it does.
    pub fn release(self) {}
}

impl Drop for HeldMessages {
    fn drop(&mut self) {
        self.0.messages.open();
    }
}
