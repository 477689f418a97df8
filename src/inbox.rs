//! What the listener has received and the applier has not yet applied.
//!
//! Bounded in bytes, and never in the way of the socket: a listener that is not read makes Postgres keep the
//! messages of every session, and in the end refuse commits. When the bound is reached, the changes in the box
//! are replaced by one that covers them all: forget everything (I6). Fences stay, behind it, so a fence still
//! comes after every change that was received before it.

use std::collections::VecDeque;

use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    change::Mark,
    coherence::Fence,
    sync::{Mutex, lock},
};

/// One thing to apply, in the order of the channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Item {
    /// A message of the channel, as it came.
    Message(String),
    /// A message of the node's own channel: a fence.
    Own(String),
    /// Somebody asks how this node is, and waits for an answer with this nonce. No change.
    Question(Uuid),
    /// What a poll of the change log found stands before this. It is part of this fence, and saw this.
    Polled(Box<(Fence, Mark)>),
    /// More came in than the box holds: stands for all of it.
    Overflow,
    /// Messages of the change log may have been removed before they were read: stands for all of them.
    Missed,
}

impl Item {
    /// Bytes.
    fn weight(&self) -> usize {
        match self {
            Self::Message(payload) | Self::Own(payload) => payload.len() + size_of::<Self>(),
            // Fences are few, one at a time, and so are questions (`QUESTIONS_MAX`).
            Self::Polled(..) | Self::Question(_) | Self::Overflow | Self::Missed => 0,
        }
    }
}

/// More questions do not wait: anybody can ask, and no number of them may make a node forget anything.
pub(crate) const QUESTIONS_MAX: usize = 64;

pub(crate) struct Inbox {
    /// Protects what is in the box.
    content: Mutex<Content>,
    arrived: Notify,
    bytes_max: usize,
}

#[derive(Default)]
struct Content {
    items: VecDeque<Item>,
    bytes: usize,
    questions: usize,
}

impl Inbox {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { content: Mutex::default(), arrived: Notify::new(), bytes_max }
    }

    /// Adds what was received. Returns whether the box overflowed.
    pub(crate) fn push(&self, item: Item) -> bool {
        let mut content = lock(&self.content);
        if matches!(item, Item::Question(_)) {
            if content.questions == QUESTIONS_MAX {
                return false;
            }
            content.questions += 1;
        }
        content.bytes += item.weight();
        content.items.push_back(item);
        let overflowed = content.bytes > self.bytes_max;
        if overflowed {
            content.items.retain(|item| matches!(item, Item::Own(_) | Item::Polled(..)));
            content.bytes = content.items.iter().map(Item::weight).sum();
            if content.bytes > self.bytes_max / 2 {
                // Not fences of ours, or few of them: somebody has learnt the channel's name. A fence that is lost is late.
                content.items.retain(|item| matches!(item, Item::Polled(..)));
                content.bytes = 0;
            }
            content.items.push_front(Item::Overflow);
            content.questions = 0;
        }
        drop(content);
        self.arrived.notify_one();
        overflowed
    }

    /// Waits until there is something, and takes it all.
    ///
    /// # Cancel safety
    ///
    /// Nothing is taken before this returns.
    pub(crate) async fn take(&self) -> VecDeque<Item> {
        loop {
            let items = {
                let mut content = lock(&self.content);
                (content.bytes, content.questions) = (0, 0);
                std::mem::take(&mut content.items)
            };
            if !items.is_empty() {
                return items;
            }
            self.arrived.notified().await;
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_fence_stays_in_its_turn() {
        let inbox = Inbox::new(500);
        let items = [Item::Message("before".into()), Item::Own("fence".into()), Item::Message("after".into())];
        for item in items.clone() {
            assert!(!inbox.push(item));
        }
        assert_eq!(inbox.take().await, items);
    }

    #[tokio::test]
    async fn an_overflow_covers_what_it_replaces_and_keeps_the_fences() {
        let inbox = Inbox::new(500);
        let message = || Item::Message("x".repeat(100));
        assert!(!inbox.push(message()));
        assert!(!inbox.push(Item::Own("fence".into())));
        assert!(!inbox.push(message()));
        assert!(!inbox.push(message()));
        assert!(inbox.push(message()));
        assert!(!inbox.push(message()));
        assert_eq!(inbox.take().await, [Item::Overflow, Item::Own("fence".into()), message()]);
    }

    #[tokio::test]
    async fn the_bound_is_in_bytes_and_fences_may_take_half_of_it() {
        let (own, message) = (Item::Own("x".repeat(100)), Item::Message("x".repeat(100)));
        for (fences, kept) in [(2, 2), (3, 0)] {
            let inbox = Inbox::new(4 * own.weight());
            for _ in 0..fences {
                assert!(!inbox.push(own.clone()));
            }
            for _ in fences..4 {
                assert!(!inbox.push(message.clone()), "full is not too full");
            }
            assert!(inbox.push(message.clone()));
            let items = inbox.take().await;
            assert_eq!((&items[0], items.len()), (&Item::Overflow, 1 + kept), "of {fences} fences");
        }
    }

    #[tokio::test]
    async fn questions_wait_in_their_turn_and_are_never_an_overflow() {
        let inbox = Inbox::new(500);
        let question = |n| Item::Question(Uuid::from_u128(n));
        assert!(!inbox.push(Item::Message("before".into())));
        for n in 0..10_000 {
            assert!(!inbox.push(question(n)));
        }
        assert!(!inbox.push(Item::Message("after".into())));
        let items = inbox.take().await;
        assert_eq!(
            (items.len(), &items[0], &items[1]),
            (QUESTIONS_MAX + 2, &Item::Message("before".into()), &question(0))
        );
        // Who asked before an overflow gets no answer; who asks after it does.
        assert!(!inbox.push(question(1)));
        assert!(inbox.push(Item::Message("x".repeat(500))));
        assert!(!inbox.push(question(2)));
        assert_eq!(inbox.take().await, [Item::Overflow, question(2)]);
    }

    #[tokio::test]
    async fn a_flood_on_the_own_channel_is_bounded_too() {
        let inbox = Inbox::new(500);
        for _ in 0..1000 {
            inbox.push(Item::Own("x".repeat(100)));
        }
        let items = inbox.take().await;
        assert!(items.len() <= 6 && items.contains(&Item::Overflow), "{items:?}");
    }
}
