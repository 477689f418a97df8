//! What a transaction of Postgres could see: the form in which `pg_current_snapshot()` prints it.
//!
//! ```text
//! 10:20:10,14,15     xmin:xmax:running    below 10 all have ended; from 20 on none had; of those between, these run
//! ```
//!
//! A standby prints an empty list of running transactions, whatever runs (source: `xid8funcs.c`, which copies a list that recovery
//! leaves empty). Of its snapshots only the lower bound means anything: `change_log.rs`.

use std::str::FromStr;

/// What a load saw, in two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sight {
    /// All transactions below this had ended.
    pub(crate) xmin: u64,
    /// How many had ended, of all that there ever were.
    pub(crate) ended: u64,
}

/// A snapshot of the primary.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Snapshot {
    xmin: u64,
    xmax: u64,
    /// Sorted.
    running: Vec<u64>,
}

impl Snapshot {
    /// All below this had ended.
    pub(crate) fn xmin(&self) -> u64 {
        self.xmin
    }

    /// None from this on had ended.
    pub(crate) fn xmax(&self) -> u64 {
        self.xmax
    }

    /// What a load with this snapshot saw.
    ///
    /// On one primary a snapshot shows all that an earlier one shows, so that `ended` grows with each transaction that ends, and orders
    /// them. The ids of savepoints are in no list: they count as ended once they are below `xmax`, in this snapshot as in
    /// all later ones, so that they disturb no order.
    pub(crate) fn sight(&self) -> Sight {
        Sight { xmin: self.xmin, ended: self.xmax - self.running.len() as u64 }
    }

    /// Those between the two that had not.
    pub(crate) fn running(&self) -> &[u64] {
        &self.running
    }

    /// What sees just those transactions that both see.
    pub(crate) fn common(&self, other: &Self) -> Self {
        let (xmin, xmax) = (self.xmin.min(other.xmin), self.xmax.min(other.xmax));
        let mut running: Vec<u64> = [&self.running[..], &other.running[..]].concat();
        running.retain(|xid| *xid < xmax);
        running.sort_unstable();
        running.dedup();
        Self { xmin, xmax, running }
    }

    /// Whether this transaction had ended when the snapshot was taken. Only for ids of whole transactions
    /// (`pg_current_xact_id()`): those of savepoints are in no list.
    pub(crate) fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || xid < self.xmax && self.running.binary_search(&xid).is_err()
    }
}

impl FromStr for Snapshot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("`{text}` is no transaction id"));
        let [xmin, xmax, running] = text.split(':').collect::<Vec<_>>()[..] else {
            return Err(format!("`{text}` is no snapshot"));
        };
        let (xmin, xmax) = (number(xmin)?, number(xmax)?);
        let mut running: Vec<u64> =
            running.split(',').filter(|id| !id.is_empty()).map(number).collect::<Result<_, _>>()?;
        running.sort_unstable();
        Ok(Self { xmin, xmax, running })
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn x13_what_ran_is_not_seen_though_later_ones_are() {
        let snapshot: Snapshot = "10:20:10,14".parse().expect("a snapshot");
        let seen: Vec<u64> = (8..22).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
        assert!("10:10:".parse::<Snapshot>().expect("nothing runs").sees(9));
    }

    #[test]
    fn what_both_see() {
        for (one, two) in [
            ("10:20:10,14", "12:18:12,17"),
            ("10:10:", "10:10:"),
            ("5:6:5", "9:30:9,12"),
            ("10:20:10,14", "10:20:10,14"),
        ] {
            let parse = |text: &str| text.parse::<Snapshot>().expect("a snapshot");
            let (one, two) = (parse(one), parse(two));
            let (both, again) = (one.common(&two), two.common(&one));
            assert_eq!(both, again);
            for xid in 0..40 {
                assert_eq!(both.sees(xid), one.sees(xid) && two.sees(xid), "{xid} in {one:?} and {two:?}");
            }
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "1:2", "1:2:3:4", "a:2:", "1:2:x", "-1:2:"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
    }
}
