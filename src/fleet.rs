//! Who else listens on this database, and how they are: what is asked, what is answered, and what a node still has to answer.
//!
//! ```text
//! question = {"v":1,"ask":NONCE}                 on channel rowcache_fleet
//! answer   = {"v":1,"id":UUID,"name":TEXT,…}     on channel rowcache_fleet_NONCE, below 8000 bytes
//! ```
//!
//! A question goes through the inbox and the applier like a change, so that who answers has applied all that stands before it.
//! It is none: what cannot be read is ignored, and no number of questions makes a node forget anything. They can cost an
//! answer, nothing else.

use std::{
    collections::{HashSet, VecDeque},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::sync::{Mutex, lock};

/// The channel on which nodes are asked.
pub(crate) const CHANNEL: &str = "rowcache_fleet";

/// The version of the grammar above.
const VERSION: u64 = 1;

/// NOTIFY refuses payloads of 8000 bytes or more.
const PAYLOAD_MAX: usize = 7999;

/// Bytes of a text in an answer. All of them together leave room for tables, however they are escaped.
const TEXT_MAX: usize = 200;

/// The nodes that listen on a database, as they were when they were asked: by [`Node::fleet`](crate::Node::fleet), or by
/// [`Fleet::ask`], which needs no node.
///
/// **Who is seen.** Each node with a LISTEN connection to this database. Not those without: nodes with
/// [`Config::listen`](crate::Config::listen) off, also if they are coherent by way of the change log. Nor a node that has lost its
/// connection, and connects again; for [`Config::staleness_bound`](crate::Config::staleness_bound) at most it may not know that itself.
///
/// **What an answer means.** If it says that the node is coherent, the node has applied everything that was committed before the question was
/// sent, such as a [`Table::clear`](crate::Table::clear) that had returned before. Else it serves nothing from memory, but to reads that allow for old rows.
/// Nothing is known of nodes that are [silent](Self::silent).
///
/// Answers are hints for people and dashboards, not proofs: anybody who may connect to the database can answer in a node's
/// place.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fleet {
    /// How long answers were waited for, at most.
    pub deadline: Duration,
    /// The nodes, by name.
    pub nodes: Vec<FleetNode>,
}

impl Fleet {
    /// The nodes that did not answer in time: they stand still, are cut off, have switched [`Config::answers`](crate::Config::answers)
    /// off, or have been asked too often. One with a [`redundant_listener`](crate::Config::redundant_listener) stands here with both of its
    /// connections.
    pub fn silent(&self) -> impl Iterator<Item = &FleetNode> {
        self.nodes.iter().filter(|node| node.report.is_none())
    }
}

/// One node of a [`Fleet`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct FleetNode {
    /// What it calls itself ([`Config::name`](crate::Config::name)). Nothing makes it unique.
    pub name: String,
    /// The process id of the server process that has its LISTEN connection. 0 in the test kit.
    pub listener_pid: i32,
    /// From where it is connected. `None`: by way of a Unix socket, or the role that asks may not see it (it takes
    /// `pg_read_all_stats`, which is part of `pg_monitor`, unless both have the same role).
    pub client: Option<String>,
    /// For how long it has been connected. `None`: the role that asks may not see it, or it was connected after the list was made.
    pub connected: Option<Duration>,
    /// It is the node that asked.
    pub is_this: bool,
    /// What it answered. `None`: it is silent.
    pub report: Option<NodeReport>,
}

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct NodeReport {
    /// New for each start.
    pub id: Uuid,
    /// The version of this library that it runs.
    pub version: String,
    /// The name of the machine.
    pub host: String,
    /// The process id on that machine.
    pub process: u32,
    /// [`Config::address`](crate::Config::address).
    pub address: Option<String>,
    /// Since it started.
    pub uptime: Duration,
    /// Whether it serves entries from memory. Single tables may not, all the same.
    pub is_coherent: bool,
    /// How long ago the last fence that came back was sent. `None`: none has come back yet.
    pub as_of: Option<Duration>,
    /// [`Config::staleness_bound`](crate::Config::staleness_bound).
    pub staleness_bound: Duration,
    /// Why it is not coherent, if it is not.
    pub reason: Option<String>,
    /// How often it ceased to be coherent.
    pub gaps: u64,
    /// Its caches, those with the most entries first.
    pub tables: Vec<TableReport>,
    /// Further caches, which did not fit into the answer.
    pub tables_left_out: u64,
}

/// What a node says of one of its caches. The counters are those of [`Stats`](crate::Stats).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableReport {
    /// As of [`Table::name`](crate::Table::name); of a memo, `memo:` and its name. A long one is cut.
    pub name: String,
    /// Whether its entries are served.
    pub is_coherent: bool,
    /// Entries held, those included that are no longer valid and whose memory has not been reclaimed yet.
    pub entries: u64,
    /// What is held, in the unit of `capacity`.
    pub used: u64,
    /// What can be held: rows, or bytes.
    pub capacity: u64,
    /// Keys asked for.
    pub gets: u64,
    /// Keys answered from memory.
    pub hits: u64,
}

/// The answer of a node to one question.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) name: String,
    /// The server process of the line that it hears, and of its spare.
    pub(crate) listener: i32,
    pub(crate) spare: Option<i32>,
    pub(crate) report: NodeReport,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Question {
    v: u64,
    ask: Uuid,
}

/// The wire form of an answer. A later version may say more: unknown fields are left aside.
#[derive(Deserialize, Serialize)]
struct Wire {
    v: u64,
    id: Uuid,
    name: String,
    pid: i32,
    spare: Option<i32>,
    version: String,
    host: String,
    process: u32,
    address: Option<String>,
    up: f64,
    coherent: bool,
    as_of: Option<f64>,
    bound: f64,
    why: Option<String>,
    gaps: u64,
    tables: Vec<WireTable>,
    left_out: u64,
}

/// Name, coherent, entries, used, capacity, gets, hits.
type WireTable = (String, bool, u64, u64, u64, u64, u64);

/// The message that asks.
pub(crate) fn question(nonce: Uuid) -> String {
    serde_json::to_string(&Question { v: VERSION, ask: nonce }).expect("a number and a uuid can always be written")
}

/// Which question this is. `None`: it is none that this version understands.
pub(crate) fn asked(payload: &str) -> Option<Uuid> {
    let object = payload.trim_ascii_start().starts_with('{');
    let question = serde_json::from_str(payload).ok().filter(|question: &Question| object && question.v == VERSION);
    question.map(|question| question.ask)
}

/// The channel on which a question is answered.
pub(crate) fn answer_channel(nonce: Uuid) -> String {
    format!("{CHANNEL}_{}", nonce.simple())
}

impl Reply {
    /// The wire form, short enough for NOTIFY: with as many tables as fit.
    pub(crate) fn to_payload(&self) -> String {
        let Self { name, listener, spare, report } = self;
        let mut wire = Wire {
            v: VERSION,
            id: report.id,
            name: text(name),
            pid: *listener,
            spare: *spare,
            version: text(&report.version),
            host: text(&report.host),
            process: report.process,
            address: report.address.as_deref().map(text),
            up: seconds(report.uptime),
            coherent: report.is_coherent,
            as_of: report.as_of.map(seconds),
            bound: seconds(report.staleness_bound),
            why: report.reason.as_deref().map(text),
            gaps: report.gaps,
            tables: Vec::new(),
            // As wide as it can become.
            left_out: report.tables.len() as u64 + report.tables_left_out,
        };
        let mut tables: Vec<_> = report.tables.iter().collect();
        tables.sort_by(|a, b| b.entries.cmp(&a.entries).then_with(|| a.name.cmp(&b.name)));
        let mut room = PAYLOAD_MAX.saturating_sub(write(&wire).len());
        for table in tables {
            let it = table;
            let table = (text(&it.name), it.is_coherent, it.entries, it.used, it.capacity, it.gets, it.hits);
            // And a comma.
            let Some(left) = room.checked_sub(write(&table).len() + 1) else { break };
            room = left;
            wire.tables.push(table);
            wire.left_out -= 1;
        }
        write(&wire)
    }

    /// Reads an answer of anybody. `None`: it is none that this version understands.
    pub(crate) fn parse(payload: &str) -> Option<Self> {
        let wire: Wire = serde_json::from_str(payload).ok()?;
        let seconds = |seconds| Duration::try_from_secs_f64(seconds).ok();
        let as_of = match wire.as_of {
            Some(as_of) => Some(seconds(as_of)?),
            None => None,
        };
        let report = NodeReport {
            id: wire.id,
            version: text(&wire.version),
            host: text(&wire.host),
            process: wire.process,
            address: wire.address.as_deref().map(text),
            uptime: seconds(wire.up)?,
            is_coherent: wire.coherent,
            as_of,
            staleness_bound: seconds(wire.bound)?,
            reason: wire.why.as_deref().map(text),
            gaps: wire.gaps,
            tables: wire.tables.into_iter().map(TableReport::from).collect(),
            tables_left_out: wire.left_out,
        };
        (wire.v == VERSION).then(|| Self { name: text(&wire.name), listener: wire.pid, spare: wire.spare, report })
    }
}

impl From<WireTable> for TableReport {
    fn from((name, is_coherent, entries, used, capacity, gets, hits): WireTable) -> Self {
        Self { name: text(&name), is_coherent, entries, used, capacity, gets, hits }
    }
}

fn write(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("texts, numbers and lists of them can always be written")
}

/// To the millisecond.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

/// A text for one line of a screen, of a sane length: it comes from a setting, or from anybody.
fn text(text: &str) -> String {
    let mut cut = String::new();
    for char in text.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }) {
        if cut.len() + char.len_utf8() > TEXT_MAX {
            break;
        }
        cut.push(char);
    }
    cut
}

/// Makes out of the sessions that listen and of the answers who there is. Answers come in any order, from anybody.
#[derive(Debug)]
pub(crate) struct Census {
    nodes: Vec<FleetNode>,
    /// Sessions that answers have named as spare: part of another node.
    spares: HashSet<i32>,
    /// Answers of sessions that are not on the list.
    unlisted: usize,
}

/// More of them are not taken down. They are few, unless somebody makes them up.
const UNLISTED_MAX: usize = 1000;

impl Census {
    pub(crate) fn new(listed: Vec<FleetNode>) -> Self {
        Self { nodes: listed, spares: HashSet::new(), unlisted: 0 }
    }

    /// Whether nobody is waited for.
    pub(crate) fn is_complete(&self) -> bool {
        self.nodes.iter().all(|node| node.report.is_some() || self.is_spare(node))
    }

    fn is_spare(&self, node: &FleetNode) -> bool {
        node.report.is_none() && self.spares.contains(&node.listener_pid)
    }

    /// Takes an answer down: the first of each session.
    pub(crate) fn answered(&mut self, reply: Reply) {
        let Reply { name, listener, spare, report } = reply;
        let known = self.nodes.iter_mut().find(|node| node.listener_pid == listener);
        match known {
            Some(node) if node.report.is_some() => return,
            Some(node) => (node.name, node.report) = (name, Some(report)),
            None if self.unlisted == UNLISTED_MAX => return,
            None => {
                self.unlisted += 1;
                let (client, connected, is_this, report) = (None, None, false, Some(report));
                self.nodes.push(FleetNode { name, listener_pid: listener, client, connected, is_this, report });
            }
        }
        self.spares.extend(spare);
    }

    /// By name. A spare connection is no node.
    pub(crate) fn nodes(mut self) -> Vec<FleetNode> {
        let mut nodes = std::mem::take(&mut self.nodes);
        nodes.retain(|node| !self.is_spare(node));
        nodes.sort_by(|a, b| (&a.name, a.listener_pid).cmp(&(&b.name, b.listener_pid)));
        nodes
    }
}

/// Questions that a node still has to answer: few, each once. More are forgotten, which costs their answers; anybody may ask.
#[derive(Default)]
pub(crate) struct Questions {
    /// Protects what was asked.
    heard: Mutex<Heard>,
    arrived: Notify,
}

#[derive(Default)]
struct Heard {
    waiting: VecDeque<Uuid>,
    /// The last ones that were taken on. A question comes twice when the line is handed over: from the one that was lost, and
    /// from the one that takes over.
    known: VecDeque<Uuid>,
}

/// As many are answered in less than a second, which is about as long as somebody waits.
const WAITING_MAX: usize = 16;

const KNOWN_MAX: usize = 64;

impl Questions {
    /// A question has been applied.
    pub(crate) fn ask(&self, nonce: Uuid) {
        let mut heard = lock(&self.heard);
        if heard.known.contains(&nonce) || heard.waiting.len() == WAITING_MAX {
            return;
        }
        if heard.known.len() == KNOWN_MAX {
            heard.known.pop_front();
        }
        heard.known.push_back(nonce);
        heard.waiting.push_back(nonce);
        drop(heard);
        self.arrived.notify_one();
    }

    /// Waits for a question, and takes it.
    ///
    /// # Cancel safety
    ///
    /// Nothing is taken before this returns.
    pub(crate) async fn next(&self) -> Uuid {
        loop {
            let next = lock(&self.heard).waiting.pop_front();
            if let Some(nonce) = next {
                return nonce;
            }
            self.arrived.notified().await;
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(name: &str, entries: u64) -> TableReport {
        TableReport { name: name.into(), is_coherent: true, entries, used: 1, capacity: 9, gets: 5, hits: 4 }
    }

    fn reply(listener: i32, spare: Option<i32>) -> Reply {
        let report = NodeReport {
            id: Uuid::from_u128(7),
            version: "0.1.0".into(),
            host: "web-1".into(),
            process: 4711,
            address: Some("http://web-1:8080".into()),
            uptime: Duration::from_millis(61_234),
            is_coherent: false,
            as_of: None,
            staleness_bound: Duration::from_millis(5010),
            reason: Some("a fence is late".into()),
            gaps: 3,
            tables: vec![table("public.orders", 9), table("public.users", 2)],
            tables_left_out: 0,
        };
        Reply { name: "web".into(), listener, spare, report }
    }

    fn listed(pid: i32) -> FleetNode {
        let (client, connected, is_this, report) = (None, None, false, None);
        FleetNode { name: "n".into(), listener_pid: pid, client, connected, is_this, report }
    }

    #[test]
    fn what_is_asked_is_understood_and_nothing_else() {
        let nonce = Uuid::new_v4();
        assert_eq!(asked(&question(nonce)), Some(nonce));
        for other in [
            String::new(),
            "garbage".into(),
            r#"{"v":1}"#.into(),
            format!(r#"[1,"{nonce}"]"#),
            format!(r#"{{"v":2,"ask":"{nonce}"}}"#),
            format!(r#"{{"v":1,"ask":"{nonce}","all":true}}"#),
            r#"{"v":1,"ask":"no uuid"}"#.into(),
            r#"{"v":1,"all":true}"#.into(),
        ] {
            assert_eq!(asked(&other), None, "{other}");
        }
        // Of an identifier, Postgres takes no more than 63 bytes.
        assert!(answer_channel(nonce).len() <= 63);
    }

    #[test]
    fn an_answer_comes_back_as_it_was() {
        let told = Reply { spare: Some(8), ..reply(7, None) };
        assert_eq!(Reply::parse(&told.to_payload()), Some(told.clone()));
        let later = told.to_payload().replacen('{', r#"{"new":[1],"#, 1);
        assert_eq!(Reply::parse(&later), Some(told.clone()), "a later version may say more");
        for other in ["", "{}", "[]", r#"{"v":1,"id":7}"#] {
            assert_eq!(Reply::parse(other), None, "{other}");
        }
        let payload = told.to_payload();
        for (from, to) in
            [(r#""v":1"#, r#""v":2"#), (r#""up":61.234"#, r#""up":-1.0"#), (r#""up":61.234"#, r#""up":1e300"#)]
        {
            assert!(payload.contains(from), "{payload}");
            assert_eq!(Reply::parse(&payload.replace(from, to)), None, "{to}");
        }
    }

    #[test]
    fn an_answer_fits_with_the_largest_tables_first() {
        let mut told = reply(7, Some(8));
        // Escaped, this is what takes most.
        let long = "\"".repeat(1000);
        (told.name, told.report.version, told.report.host) = (long.clone(), long.clone(), long.clone());
        (told.report.address, told.report.reason) = (Some(long.clone()), Some(long.clone()));
        told.report.tables = (0..1000).map(|n| table(&format!("public.t{n}"), n)).collect();
        let payload = told.to_payload();
        assert!(payload.len() <= PAYLOAD_MAX && payload.len() > PAYLOAD_MAX - 100, "{}", payload.len());
        let read = Reply::parse(&payload).expect("it can be read");
        let tables = read.report.tables;
        assert!(tables.len() > 50 && tables.len() as u64 + read.report.tables_left_out == 1000, "{}", tables.len());
        assert_eq!((&*tables[0].name, &*tables[1].name), ("public.t999", "public.t998"));
        assert_eq!(read.name, "\"".repeat(TEXT_MAX));
        told.report.tables.truncate(1);
        told.report.tables[0].name = long;
        assert_eq!(Reply::parse(&told.to_payload()).expect("it can be read").report.tables.len(), 1);
    }

    #[test]
    fn no_text_leaves_its_line() {
        let told = Reply { name: "a\u{1b}[2J\nb\0".into(), ..reply(7, None) };
        let forged = told.to_payload();
        assert_eq!(Reply::parse(&forged).expect("it can be read").name, "a\u{fffd}[2J\u{fffd}b\u{fffd}");
        assert_eq!(text(&"ü".repeat(200)).chars().count(), 100);
    }

    #[test]
    fn who_answers_is_ticked_off() {
        let mut census = Census::new(vec![listed(1), listed(2), listed(3)]);
        census.answered(reply(1, Some(2)));
        assert!(!census.is_complete());
        census.answered(Reply { name: "another".into(), ..reply(1, None) });
        census.answered(reply(9, None));
        let nodes = census.nodes();
        let told = |node: &FleetNode| (node.name.clone(), node.listener_pid, node.report.is_some());
        let told: Vec<_> = nodes.iter().map(told).collect();
        // The first answer counts, a spare is no node, and who was not on the list is there.
        assert_eq!(told, [("n".into(), 3, false), ("web".into(), 1, true), ("web".into(), 9, true)]);
        let mut census = Census::new(vec![listed(1), listed(2)]);
        census.answered(reply(2, Some(1)));
        assert!(census.is_complete());
        assert!(Census::new(Vec::new()).is_complete());
    }

    #[test]
    fn made_up_answers_are_bounded() {
        let mut census = Census::new(vec![listed(1)]);
        for pid in 2..5000 {
            census.answered(reply(pid, Some(-pid)));
        }
        assert!(!census.is_complete() && census.spares.len() == UNLISTED_MAX);
        assert_eq!(census.nodes().len(), 1 + UNLISTED_MAX);
    }

    #[tokio::test]
    async fn questions_are_answered_once_and_few_wait() {
        let questions = Questions::default();
        let nonces: Vec<_> = (1..=20).map(Uuid::from_u128).collect();
        questions.ask(nonces[0]);
        questions.ask(nonces[0]);
        assert_eq!(questions.next().await, nonces[0]);
        for nonce in &nonces {
            questions.ask(*nonce);
        }
        for nonce in &nonces[1..=WAITING_MAX] {
            assert_eq!(questions.next().await, *nonce);
        }
        // The others have been forgotten, and may come again.
        questions.ask(nonces[19]);
        assert_eq!(questions.next().await, nonces[19]);
        for n in 0..1000 {
            questions.ask(Uuid::from_u128(100 + n));
            questions.next().await;
        }
        assert_eq!(lock(&questions.heard).known.len(), KNOWN_MAX);
    }

    proptest! {
        #[test]
        fn anything_can_be_read(payload in any::<String>()) {
            asked(&payload);
            Reply::parse(&payload);
        }
    }
}
