use uuid::Uuid;

use super::*;

fn incarnation(n: u128) -> Incarnation {
    Incarnation { canary: Uuid::from_u128(n), started: 0 }
}

fn polled(snapshot: &str, read: &[u64]) -> Polled {
    Polled {
        incarnation: incarnation(1),
        standby: false,
        snapshot: snapshot.parse().expect("a snapshot"),
        lsn: 100,
        horizon: 0,
        horizon_after: 0,
        read: read.iter().copied().collect(),
        messages: read.len(),
    }
}

fn begin(snapshot: &str) -> Position {
    Position::after(None, polled(snapshot, &[])).0
}

#[test]
fn what_ran_at_one_poll_is_asked_for_at_the_next() {
    let at = begin("7:9:7");
    assert_eq!((at.since(), at.pending(), at.skip().count()), (9, &[7][..], 0));
    let (at, continuity) = Position::after(Some(&at), polled("9:9:", &[7]));
    assert_eq!((at.since(), at.pending(), continuity), (9, &[][..], Continuity::Kept));
}

#[test]
fn on_a_standby_what_was_read_is_skipped_until_nobody_asks_for_it() {
    let standby = |snapshot, read: &[u64]| Polled { standby: true, ..polled(snapshot, read) };
    let (at, _) = Position::after(None, standby("5:9:", &[6]));
    assert_eq!((at.since(), at.pending()), (5, &[][..]));
    assert_eq!(at.skip().collect::<Vec<_>>(), [6]);
    let (at, _) = Position::after(Some(&at), standby("5:12:", &[8, 11]));
    assert_eq!(at.skip().collect::<Vec<_>>(), [6, 8, 11], "5 has not ended");
    let (at, _) = Position::after(Some(&at), standby("9:12:", &[5]));
    assert_eq!((at.since(), at.skip().collect::<Vec<_>>()), (9, vec![11]));
}

#[test]
fn another_server_breaks_it_and_so_does_a_promotion() {
    let at = begin("9:9:");
    let (_, other) = Position::after(Some(&at), Polled { incarnation: incarnation(2), ..polled("9:9:", &[]) });
    assert_eq!(other, Continuity::OtherServer);
    let (_, promoted) = Position::after(Some(&at), Polled { standby: true, ..polled("9:9:", &[]) });
    assert_eq!(promoted, Continuity::OtherServer);
}

#[test]
fn removed_before_it_was_read() {
    let trimmed = |at: &Position, snapshot, below| {
        Position::after(Some(at), Polled { horizon_after: below, ..polled(snapshot, &[]) }).1
    };
    let at = begin("7:20:7,12");
    assert_eq!(trimmed(&at, "7:30:7,12", 0), Continuity::Kept);
    assert_eq!(trimmed(&at, "7:30:7,12", 20), Continuity::Kept, "all below was seen, or runs");
    assert_eq!(trimmed(&at, "7:30:7,12", 21), Continuity::Trimmed, "20 may have been removed");
    assert_eq!(trimmed(&at, "12:30:12", 8), Continuity::Trimmed, "7 has ended since");
    assert_eq!(trimmed(&at, "12:30:12", 7), Continuity::Kept, "7 is kept");
    assert_eq!(trimmed(&at, "7:30:7", 12), Continuity::Kept, "12 is kept");
    assert_eq!(trimmed(&at, "7:20:7,12", 21), Continuity::Kept, "there has been no 20");
    let moved = Position { horizon: 21, ..at };
    assert_eq!(trimmed(&moved, "12:30:12", 21), Continuity::Kept, "nothing was removed since");
}

#[test]
fn on_a_standby_whatever_ran_may_have_been_removed() {
    let (at, _) = Position::after(None, Polled { standby: true, ..polled("7:20:", &[]) });
    let trimmed = |below| {
        let polled = Polled { standby: true, horizon_after: below, ..polled("30:30:", &[]) };
        Position::after(Some(&at), polled).1
    };
    assert_eq!((trimmed(7), trimmed(8)), (Continuity::Kept, Continuity::Trimmed));
}

#[test]
fn a_mark_is_behind_its_position() {
    let mark = polled("9:9:", &[]).mark();
    assert_eq!((mark.lsn, mark.snapshot.sees(8), mark.snapshot.sees(9)), (99, true, false));
    let range = |xmax: u64| polled(&format!("1:{xmax}:"), &[]).range();
    assert_eq!((range(524_287), range(524_288)), (0, 1));
}
