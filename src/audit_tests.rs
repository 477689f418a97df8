//! One round of the audit, with whatever can happen between its reading and its verdict. The node has no line: the tests
//! apply messages and fences by hand.

use tokio::{sync::Notify, task::JoinHandle, time::timeout};
use uuid::Uuid;

use super::*;
use crate::{
    change::{Change, Mark, RowKey, Rows},
    clock,
    coherence::{Incarnation, Reason},
    config::Config,
    digest::Tenths,
    error::{Error, Kind, Result},
    fill::Join,
    hashed::{Hashed, Secret},
    host::Process,
    postgres::server::Postgres,
    source::{Digesting, Digests, Loading, Received, Stamp},
    stats::{Audits, SAMPLED},
    status::Events,
    store::{Asked, Bounds, Limits, Origin, Runner},
    tables::{Member, Trust},
};

const TABLE: &str = "public.t";
const SERVER: Incarnation = Incarnation { canary: Uuid::from_u128(1), started: 7 };
const STAMP: Stamp = Stamp { incarnation: Some(SERVER), dirty: false, lsn: 7, saw: None };

fn digest(version: u8) -> Digest {
    Digest::of([Some(&[version][..])])
}

/// Reads what the test says, and tells that it has.
#[derive(Default)]
struct Scripted {
    answer: std::sync::Mutex<Option<Result<(Digest, Stamp)>>>,
    asked: Notify,
}

impl Source<i64, u8> for Scripted {
    fn load<'a>(&'a self, _: &'a [i64]) -> Loading<'a, u8> {
        unreachable!("an audit does not load")
    }

    fn load_at_once<'a>(&'a self, _: &'a [i64]) -> Loading<'a, u8> {
        unreachable!("an audit does not load")
    }

    fn digests<'a>(&'a self, keys: &'a [i64]) -> Digesting<'a> {
        let answer = self.answer.lock().expect("no panic").take().expect("one statement, whose answer is known");
        self.asked.notify_one();
        let answer = answer.map(|(digest, stamp)| Digests { rows: keys.iter().map(|_| digest).collect(), stamp });
        Box::pin(async { answer })
    }
}

/// For what is never waited for, unless something is broken.
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    store: Arc<Store<i64, u8>>,
    source: Arc<Scripted>,
    shared: Arc<Shared>,
    events: Events,
}

/// A node that is coherent, and holds version 1 of row 1, which has just been served.
fn world(hashed: Option<Hashed<i64>>) -> World {
    let mut config = Config::from_url("postgres://nobody@localhost:1/nowhere").expect("a URL");
    config.beat = Duration::from_millis(1);
    let shared = Shared::new(config.clone(), Arc::new(Postgres::new(config)), Arc::new(Process::current()));
    let store = Store::new(Bounds::rows::<i64, u8>(10), Limits { runners_max: 1, batch_max: 10 }, hashed);
    let store = Arc::new(store);
    shared.tables.add(TABLE, Trust::default(), &(Arc::clone(&store) as Arc<dyn Member>));
    shared.look(|coherence| coherence.listening(SERVER));
    let world = World { store, source: Arc::default(), events: shared.subscribe(), shared };
    world.fence();
    world.publish(1);
    world.store.open_seats(1);
    for _ in 0..100 * SAMPLED {
        world.store.lookup(&1).expect("held");
    }
    assert!(!world.store.has_seats(), "one was taken");
    world
}

impl World {
    /// A fence is sent, and counts.
    fn fence(&self) {
        self.shared.step(|coherence| {
            let nonce = Uuid::new_v4();
            let Some(fence) = coherence.next_fence(clock::now() + Duration::from_hours(1), nonce) else {
                return Vec::new();
            };
            let mark = Mark { snapshot: "10:10:".parse().expect("a snapshot"), lsn: 7 };
            coherence.fence_checked(fence);
            coherence.fence_polled(fence, mark.clone());
            coherence.fence_applied(nonce, mark)
        });
    }

    /// Row 1 is loaded and kept, as of this version.
    fn publish(&self, version: u8) {
        let mut wanted = Vec::new();
        assert!(matches!(self.store.ask(&1, Join::Running, &mut wanted), Asked::Wait(_)));
        let mut runners: Vec<Runner<_, _>> = self.store.enqueue(wanted);
        runners[0].take();
        let at = Tenths::at(clock::now().saturating_sub(Duration::from_secs(90)));
        let received = Received { digest: digest(version), ..Received::default() };
        runners[0].finish_received(
            [(Ok(Some(version)), received)],
            Origin { stamp: STAMP, ours: true, at, ..Origin::default() },
        );
        assert!(runners[0].take().is_none());
    }

    fn change(&self) {
        let change = Change::requested(TABLE, Rows::Keys(vec![RowKey::new(&1_i64.to_parts())]));
        self.shared.tables.apply(&change);
    }

    /// Audits once: the row is read as `answer` says, then `meanwhile` happens, and then fences come back.
    async fn audit(&self, answer: Result<(Digest, Stamp)>, meanwhile: impl FnOnce()) -> Audits {
        *self.source.answer.lock().expect("no panic") = Some(answer);
        let (source, shared) = (Arc::clone(&self.source) as _, Arc::clone(&self.shared));
        let auditor = Auditor { source, shared, name: TABLE.into(), alarms: Throttle::default() };
        let store = Arc::clone(&self.store);
        let round: JoinHandle<()> = tokio::spawn(async move { auditor.round(&store).await });
        timeout(PATIENCE, self.source.asked.notified()).await.expect("the row is read again");
        meanwhile();
        let end = clock::now() + PATIENCE;
        while !round.is_finished() {
            assert!(clock::now() < end, "the round waits for more than fences");
            self.fence();
            tokio::task::yield_now().await;
        }
        round.await.expect("no panic");
        self.store.counters.snapshot().audits
    }
}

#[tokio::test]
async fn a_row_that_is_what_was_served_is_no_news() {
    let audits = world(None).audit(Ok((digest(1), STAMP)), || {}).await;
    assert_eq!((audits.audited, audits.equal), (1, 1));
}

#[tokio::test]
async fn a_change_on_its_way_is_no_alarm() {
    let world = world(None);
    let audits = world.audit(Ok((digest(2), STAMP)), || world.change()).await;
    assert_eq!((audits.audited, audits.changed), (1, 1), "{audits:?}");
}

#[tokio::test]
async fn an_entry_that_was_loaded_since_is_no_alarm() {
    let world = world(None);
    let meanwhile = || {
        world.change();
        world.publish(3);
    };
    let audits = world.audit(Ok((digest(2), STAMP)), meanwhile).await;
    assert_eq!((audits.audited, audits.changed), (1, 1), "{audits:?}");
    assert!(world.store.peek(&1).is_some(), "and it is kept");
}

#[tokio::test]
async fn an_entry_that_a_clear_put_out_of_service_is_no_alarm() {
    let world = world(None);
    let meanwhile = || drop(world.shared.tables.clear(Some(TABLE)));
    let audits = world.audit(Ok((Digest::ABSENT, STAMP)), meanwhile).await;
    assert_eq!((audits.audited, audits.changed), (1, 1), "{audits:?}");
    assert_eq!(world.store.stats().entries, 1, "its memory is still held");
}

#[tokio::test]
async fn nothing_is_concluded_across_a_gap() {
    let world = world(None);
    let meanwhile = || {
        world.shared.gap(Reason::BeatLate);
        world.shared.look(|coherence| coherence.listening(SERVER));
    };
    let audits = world.audit(Ok((digest(2), STAMP)), meanwhile).await;
    assert_eq!((audits.audited, audits.skipped), (1, 1), "{audits:?}");
}

#[tokio::test]
async fn nothing_is_concluded_from_another_server_a_dirty_statement_or_a_failure() {
    let other = Incarnation { canary: Uuid::from_u128(2), ..SERVER };
    let answers = [
        Ok((digest(2), Stamp { dirty: true, ..STAMP })),
        Ok((digest(2), Stamp { incarnation: None, ..STAMP })),
        Ok((digest(2), Stamp { incarnation: Some(other), ..STAMP })),
        Err(Error::new(Kind::Timeout, "no answer")),
    ];
    for answer in answers {
        let what = format!("{:?}", answer.as_ref().map(|(_, stamp)| *stamp));
        let audits = world(None).audit(answer, || {}).await;
        assert_eq!((audits.audited, audits.skipped), (1, 1), "{what}: {audits:?}");
    }
}

#[tokio::test]
async fn what_nobody_told_is_found_counted_told_and_forgotten() {
    for hashed in [false, true] {
        let mut world = world(hashed.then(|| Hashed::new(Secret::new(b"secret"))));
        let audits = world.audit(Ok((Digest::ABSENT, STAMP)), || {}).await;
        assert_eq!((audits.audited, audits.incoherent, audits.within_hour), (1, 1, 1), "{audits:?}");
        assert!(world.store.peek(&1).is_none(), "forgotten");
        let told = loop {
            let event = timeout(PATIENCE, world.events.recv()).await.expect("is told").expect("the node lives");
            if let Event::Incoherent { table, key, age } = event {
                break (table, key, age.as_secs());
            }
        };
        let key = (!hashed).then(|| RowKey::new(&1_i64.to_parts()));
        assert_eq!(told, (TABLE.to_owned(), key, 90));
    }
}

#[tokio::test]
async fn a_sample_is_no_larger_than_the_seats() {
    let world = world(None);
    assert_eq!(world.store.take_sample().len(), 1);
    world.store.open_seats(3);
    for _ in 0..1000 {
        world.store.lookup(&1);
    }
    assert!(!world.store.has_seats(), "all three were taken");
    assert_eq!(world.store.take_sample().len(), 1, "an entry is read once, however often it was served");
    for _ in 0..1000 {
        world.store.lookup(&1);
    }
    assert!(world.store.take_sample().is_empty(), "no seat is free until the next round");
}

#[test]
fn a_pace_keeps_the_rate_and_sends_no_more_statements_than_it_must() {
    let pace = |rate, beat| {
        let pace = Pace::new(rate, Duration::from_millis(beat));
        (pace.seats, pace.period.as_millis())
    };
    assert_eq!(pace(1, 1000), (1, 1000));
    assert_eq!(pace(1, 100), (1, 1000), "a beat is no reason for more");
    assert_eq!(pace(100, 1000), (100, 1000));
    assert_eq!(pace(1000, 100), (100, 100));
    assert_eq!(pace(10, 60_000), (10, 1000), "nor for hits by the thousand that wait");
}
