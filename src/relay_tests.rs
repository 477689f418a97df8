//! The relay step by step, and in any order that a queue and two connections allow.

use proptest::prelude::*;

use super::*;

const LEFT: &str = "left";
const RIGHT: &str = "right";
const PATIENCE: Duration = Duration::from_secs(3);

fn message(n: usize) -> Item {
    Item::Message(format!("m{n}"))
}

fn uuid(n: usize) -> Uuid {
    Uuid::from_u128(n as u128)
}

fn fence(n: usize) -> Item {
    Item::Own(fence_payload(uuid(n)))
}

fn at(seconds: u64) -> Boot {
    Duration::from_secs(seconds)
}

/// A primary, and a spare that was attached a moment ago.
fn two() -> (Relay<&'static str>, LineId, LineId) {
    let mut relay = Relay::new(10_000);
    let (primary, spare) = (relay.next_id(), relay.next_id());
    relay.lead(primary, LEFT);
    relay.attach(spare, RIGHT);
    (relay, primary, spare)
}

/// The same, and the spare covers: both have received fence 0.
fn covered() -> (Relay<&'static str>, LineId, LineId) {
    let (mut relay, primary, spare) = two();
    relay.fence_sent(uuid(0), at(0));
    relay.received(spare, fence(0));
    assert_eq!(relay.received(primary, fence(0)), (Some(fence(0)), true));
    assert!(relay.is_covered() && relay.has_spare());
    (relay, primary, spare)
}

fn handed_over(relay: &mut Relay<&'static str>, lost: LineId) -> Vec<Item> {
    match relay.lost(lost) {
        Loss::Handoff { items, old: LEFT } => items.into(),
        loss => panic!("{loss:?}"),
    }
}

#[test]
fn a_line_alone_is_passed_on_and_its_loss_is_a_gap() {
    let mut relay = Relay::new(10_000);
    let id = relay.next_id();
    relay.lead(id, LEFT);
    relay.fence_sent(uuid(0), at(0));
    assert_eq!(relay.received(id, message(1)), (Some(message(1)), false));
    assert_eq!(relay.received(id, fence(0)), (Some(fence(0)), false));
    assert_eq!(relay.lost(id), Loss::Gap);
    assert_eq!(relay.clear(), [Some(LEFT), None]);
    assert_eq!(relay.lost(id), Loss::Late);
    assert_eq!(relay.received(id, message(2)), (None, false), "it had been given up");
}

#[test]
fn j1_a_spare_does_not_cover_as_soon_as_it_listens() {
    let (mut relay, primary, spare) = two();
    // 1. Message 1 is in the queue, before the place of the spare, and has not reached the primary.
    // 2. The spare listens. What is committed now reaches it.
    relay.received(spare, message(2));
    // 3. The primary is lost, and message 1 with it.
    assert!(!relay.is_covered());
    assert_eq!(relay.lost(primary), Loss::Gap);
}

#[test]
fn j1_a_fence_that_was_sent_before_the_spare_listened_proves_nothing() {
    let mut relay = Relay::new(10_000);
    let (primary, spare) = (relay.next_id(), relay.next_id());
    relay.lead(primary, LEFT);
    relay.fence_sent(uuid(0), at(0));
    relay.attach(spare, RIGHT);
    assert_eq!(relay.received(primary, fence(0)), (Some(fence(0)), false));
    relay.received(spare, fence(0));
    assert!(!relay.is_covered());
}

#[test]
fn the_spare_covers_when_the_primary_has_received_the_fence_and_not_when_the_spare_has() {
    let (mut relay, primary, spare) = two();
    relay.fence_sent(uuid(0), at(0));
    relay.received(spare, fence(0));
    assert!(!relay.is_covered(), "what stands before it may still be on its way to the primary");
    assert_eq!(relay.received(primary, message(1)), (Some(message(1)), false));
    assert_eq!(relay.received(primary, fence(0)), (Some(fence(0)), true));
    relay.fence_sent(uuid(1), at(1));
    assert_eq!(relay.received(primary, fence(1)), (Some(fence(1)), false), "it covers already");
}

#[test]
fn questions_are_handed_over_in_their_turn_and_make_nobody_forget() {
    let question = |n| Item::Question(uuid(n));
    let bytes_max = 2 * ("m1".len() + size_of::<Item>());
    let mut relay = Relay::new(bytes_max);
    let (primary, spare) = (relay.next_id(), relay.next_id());
    relay.lead(primary, LEFT);
    relay.attach(spare, RIGHT);
    for n in [0, 1] {
        // What stands before a fence that both have received is forgotten, and makes room.
        for n in 0..1000 {
            relay.received(spare, question(n));
        }
        relay.fence_sent(uuid(n), at(0));
        relay.received(spare, fence(n));
        relay.received(primary, fence(n));
        relay.received(spare, question(5));
    }
    for item in [message(1), question(7), message(2)] {
        relay.received(spare, item);
    }
    assert_eq!(relay.received(primary, question(7)), (Some(question(7)), false));
    let mut copy = relay.clone();
    assert_eq!(handed_over(&mut relay, primary), [question(5), message(1), question(7), message(2)]);
    for n in 0..1000 {
        copy.received(spare, question(n));
    }
    let mut full = copy.clone();
    assert_eq!(handed_over(&mut copy, primary).len(), 2 + QUESTIONS_MAX);
    // An overflow, which messages alone can cause, gives questions up.
    full.received(spare, message(3));
    assert_eq!(handed_over(&mut full, primary), [Item::Overflow]);
}

#[test]
fn what_is_kept_is_bounded_to_the_byte() {
    let each = "m1".len() + size_of::<Item>();
    let in_time = vec![message(1), fence(1), message(2)];
    for (messages, handed) in [(2, in_time), (3, vec![Item::Overflow, fence(1), Item::Overflow])] {
        let mut relay = Relay::new(2 * each);
        let (primary, spare) = (relay.next_id(), relay.next_id());
        relay.lead(primary, LEFT);
        relay.attach(spare, RIGHT);
        relay.fence_sent(uuid(0), at(0));
        relay.received(spare, fence(0));
        relay.received(primary, fence(0));
        relay.fence_sent(uuid(1), at(1));
        relay.received(spare, message(1));
        relay.received(spare, fence(1));
        for n in 2..=messages {
            relay.received(spare, message(n));
        }
        assert_eq!(handed_over(&mut relay, primary), handed);
    }
}

#[test]
fn a_message_that_only_the_spare_received_is_handed_over() {
    let (mut relay, primary, spare) = covered();
    relay.fence_sent(uuid(1), at(1));
    for item in [message(1), fence(1), message(2)] {
        assert_eq!(relay.received(spare, item), (None, false));
    }
    assert_eq!(handed_over(&mut relay, primary), [message(1), fence(1), message(2)]);
    assert_eq!(relay.received(primary, message(1)), (None, false), "the old line is not heard any more");
    assert_eq!(relay.received(spare, message(3)), (Some(message(3)), false));
    assert_eq!(relay.primary(), Some(&(spare, RIGHT)));
    assert!(!relay.is_covered() && !relay.has_spare());
    assert_eq!(relay.lost(primary), Loss::Late);
    assert_eq!(relay.lost(spare), Loss::Gap);
}

#[test]
fn what_both_received_before_a_fence_that_both_received_is_not_handed_over() {
    for spare_first in [true, false] {
        let (mut relay, primary, spare) = covered();
        relay.fence_sent(uuid(1), at(1));
        let mut order = [primary, spare];
        if spare_first {
            order.reverse();
        }
        for line in order {
            for item in [message(1), message(2), fence(1)] {
                relay.received(line, item);
            }
        }
        relay.received(spare, message(3));
        assert_eq!(handed_over(&mut relay, primary), [message(3)], "spare first: {spare_first}");
    }
}

#[test]
fn a_fence_sent_again_by_a_stranger_moves_nothing() {
    let (mut relay, primary, spare) = covered();
    relay.fence_sent(uuid(1), at(1));
    for item in [fence(1), message(1), fence(1), message(2)] {
        relay.received(spare, item);
    }
    relay.received(primary, fence(1));
    let Item::Own(again) = fence(1) else { unreachable!() };
    assert_eq!(handed_over(&mut relay, primary), [message(1), Item::Message(again), message(2)]);
}

#[test]
fn an_overflow_covers_in_place_what_it_replaces() {
    let (mut relay, primary, spare) = covered();
    relay.fence_sent(uuid(1), at(1));
    relay.fence_sent(uuid(2), at(2));
    let long = || Item::Message("x".repeat(3000));
    for item in [long(), fence(1), long(), fence(2), long(), long()] {
        relay.received(spare, item);
    }
    let kept = |relay: &Relay<_>| relay.spare.as_ref().expect("there is one").kept.iter().map(weight).sum::<usize>();
    assert!(kept(&relay) <= 10_000);
    // What stands behind fence 1 is still covered when what stands before it is forgotten.
    relay.received(primary, fence(1));
    relay.received(spare, message(1));
    let expected = [Item::Overflow, fence(2), Item::Overflow, message(1)];
    assert_eq!(handed_over(&mut relay, primary), expected);
}

#[test]
fn what_is_kept_is_bounded_whatever_is_sent_to_the_own_channel() {
    let (mut relay, primary, spare) = covered();
    for n in 0..10_000 {
        relay.received(spare, fence(1000 + n));
        relay.fence_sent(uuid(1_000_000 + n), at(1));
    }
    let spare = relay.spare.as_ref().expect("there is one");
    assert!(spare.bytes <= 10_000 && spare.kept.len() < 200, "{}", spare.kept.len());
    assert_eq!(spare.fences.len(), FENCES_MAX);
    assert!(handed_over(&mut relay, primary).contains(&Item::Overflow));
}

#[test]
fn the_loss_of_a_spare_is_no_gap() {
    let (mut relay, primary, spare) = covered();
    assert_eq!(relay.lost(spare), Loss::Spare(RIGHT));
    assert!(!relay.is_covered());
    assert_eq!(relay.received(spare, message(1)), (None, false));
    assert_eq!(relay.received(primary, message(1)), (Some(message(1)), false));
    let another = relay.next_id();
    relay.attach(another, RIGHT);
    assert!(!relay.is_covered(), "it proves itself anew");
    assert_eq!(relay.lost(spare), Loss::Late);
}

#[test]
fn deaf_is_who_did_not_receive_what_the_other_one_did() {
    let (mut relay, primary, spare) = covered();
    relay.fence_sent(uuid(1), at(10));
    assert_eq!(relay.deaf(PATIENCE), None, "neither has it");
    relay.received(spare, fence(1));
    assert_eq!(relay.deaf(PATIENCE), Some((at(10) + PATIENCE / 2, primary)));
    relay.received(primary, fence(1));
    assert_eq!(relay.deaf(PATIENCE), None);
    relay.fence_sent(uuid(2), at(20));
    relay.received(primary, fence(2));
    assert_eq!(relay.deaf(PATIENCE), Some((at(20) + PATIENCE, spare)));
}

#[test]
fn a_primary_is_not_called_deaf_while_nobody_could_take_over() {
    let (mut relay, _, spare) = two();
    relay.fence_sent(uuid(1), at(10));
    relay.received(spare, fence(1));
    assert_eq!(relay.deaf(PATIENCE), None);
}

/// Something happens in a world of one queue and two connections.
#[derive(Clone, Copy, Debug)]
enum Step {
    Commit,
    Fence,
    Attach,
    PrimaryReceives,
    SpareReceives,
}

/// The queue: `Some(n)` is the fence with this number.
struct World {
    queue: Vec<Option<usize>>,
    relay: Relay<&'static str>,
    primary: LineId,
    primary_at: usize,
    spare: Option<(LineId, usize)>,
    inbox: Vec<Item>,
}

impl World {
    fn new(bytes_max: usize) -> Self {
        let mut relay = Relay::new(bytes_max);
        let primary = relay.next_id();
        relay.lead(primary, LEFT);
        Self { queue: Vec::new(), relay, primary, primary_at: 0, spare: None, inbox: Vec::new() }
    }

    fn item(&self, at: usize) -> Option<Item> {
        self.queue.get(at).map(|kind| kind.map_or_else(|| message(at), fence))
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Commit => self.queue.push(None),
            Step::Fence => {
                let n = self.queue.len();
                self.relay.fence_sent(uuid(n), at(n as u64));
                self.queue.push(Some(n));
            }
            // LISTEN takes its place behind everything that is committed (A8).
            Step::Attach if self.spare.is_none() => {
                let id = self.relay.next_id();
                self.relay.attach(id, RIGHT);
                self.spare = Some((id, self.queue.len()));
            }
            Step::Attach => {}
            Step::PrimaryReceives => {
                if let Some(item) = self.item(self.primary_at) {
                    self.inbox.extend(self.relay.received(self.primary, item).0);
                    self.primary_at += 1;
                }
            }
            Step::SpareReceives => {
                if let Some((id, at)) = self.spare
                    && let Some(item) = self.item(at)
                {
                    self.inbox.extend(self.relay.received(id, item).0);
                    self.spare = Some((id, at + 1));
                }
            }
        }
    }

    /// The primary is lost now; what the spare has still to receive comes later. Whether that was a handoff.
    fn lose_the_primary(&mut self) -> bool {
        let Loss::Handoff { items, .. } = self.relay.lost(self.primary) else { return false };
        self.inbox.extend(items);
        for _ in 0..self.queue.len() {
            self.step(Step::SpareReceives);
        }
        true
    }

    /// Everything in the queue before `end` is somewhere in the inbox before `before`.
    fn assert_covered(&self, end: usize, before: usize) {
        let inbox = &self.inbox[..before];
        for at in 0..end {
            let item = self.item(at).expect("it is in the queue");
            // Forgetting everything covers all that is committed by then.
            let known = inbox.contains(&item) || inbox.contains(&Item::Overflow);
            assert!(known, "{item:?} of {:?} is missing in {inbox:?}", self.queue);
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Commit),
        3 => Just(Step::Fence),
        1 => Just(Step::Attach),
        4 => Just(Step::PrimaryReceives),
        4 => Just(Step::SpareReceives),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// J2: after a handoff nothing is missing, and whatever stands before a fence in the queue is applied before it (I4).
    #[test]
    fn j2_a_handoff_loses_nothing(steps in steps(), bytes_max in prop_oneof![Just(usize::MAX), Just(100)]) {
        let mut world = World::new(bytes_max);
        for step in steps {
            world.step(step);
        }
        if world.lose_the_primary() {
            world.assert_covered(world.queue.len(), world.inbox.len());
            for (at, n) in world.queue.iter().enumerate().filter_map(|(at, fence)| Some((at, (*fence)?))) {
                let applied = world.inbox.iter().position(|item| *item == fence(n)).expect("covered");
                world.assert_covered(at, applied);
            }
        }
    }
}

fn fence_payload(nonce: Uuid) -> String {
    format!(r#"{{"v":1,"f":"{nonce}","s":"1:1:","l":1}}"#)
}
