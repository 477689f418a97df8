//! What happens to the node, as server-sent events.
//!
//! The hub writes each event down once, as the bytes that all readers get, and keeps the latest of them. A reader who was away
//! names the last one he had (`Last-Event-ID`), and goes on behind it; if that is too long ago, or of another run of the
//! service, he is told that he missed some. A reader who is too slow is told the same.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures_util::stream;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{SemaphorePermit, watch};
use uuid::Uuid;

use super::{
    app::App,
    problem::Problem,
    table::{Served, joined},
};
use crate::{
    Change, Event, Node, Rows,
    key::{self, KeyType},
};

/// Events that a reader can be behind.
const KEPT: usize = 4096;

/// How often a line is sent to a reader to whom there is nothing to tell, so that he, and whatever is in between, knows that the connection
/// stands.
const SILENCE_MAX: Duration = Duration::from_secs(15);

pub(crate) struct Hub {
    /// Begins the names of its events: those of another run mean nothing here.
    run: String,
    pages: Mutex<Pages>,
    /// How many have been written.
    news: watch::Sender<u64>,
}

#[derive(Default)]
struct Pages {
    /// How many were written before those that are kept.
    dropped: u64,
    kept: VecDeque<Bytes>,
}

impl Hub {
    /// Follows the node until it is shut down.
    pub(crate) fn start(node: &Node, id: Uuid, tables: &[Served]) -> Arc<Self> {
        let run = id.simple().to_string().chars().take(8).collect();
        let hub = Arc::new(Self { run, pages: Mutex::default(), news: watch::Sender::new(0) });
        let keys: BTreeMap<String, Vec<KeyType>> = tables
            .iter()
            .filter(|table| table.is_keyed())
            .map(|table| (table.relation().to_owned(), table.types().to_vec()))
            .collect();
        let mut events = node.subscribe();
        let writer = Arc::clone(&hub);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                let (name, data) = shown(&event, &keys);
                writer.write(name, &data);
            }
        });
        hub
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, name: &str, data: &Value) {
        let mut pages = self.pages();
        let number = pages.dropped + pages.kept.len() as u64 + 1;
        let text = format!("id: {}-{number}\nevent: {name}\ndata: {data}\n\n", self.run);
        pages.kept.push_back(text.into());
        if pages.kept.len() > KEPT {
            pages.kept.pop_front();
            pages.dropped += 1;
        }
        drop(pages);
        self.news.send_replace(number);
    }

    /// How many had been written when the reader was last told; from now on, if he does not say.
    fn place(&self, last: Option<&str>) -> Place {
        let now = *self.news.borrow();
        let Some(last) = last else { return Place { next: now, missed: None } };
        let number = last.strip_prefix(&self.run).and_then(|rest| rest.strip_prefix('-')?.parse::<u64>().ok());
        match number.filter(|number| *number <= now) {
            Some(number) => Place { next: number, missed: None },
            // Of another run: nobody knows how many.
            None => Place { next: now, missed: Some(None) },
        }
    }

    /// What comes next for a reader: events, as many as there are; nothing, if there are none.
    fn read(&self, place: &mut Place) -> Option<Bytes> {
        let pages = self.pages();
        if let Some(missed) = place.missed.take() {
            return Some(self.lagged(place.next, missed));
        }
        if place.next < pages.dropped {
            let missed = pages.dropped - place.next;
            place.next = pages.dropped;
            return Some(self.lagged(place.next, Some(missed)));
        }
        let at = usize::try_from(place.next - pages.dropped).unwrap_or(usize::MAX);
        let news: Vec<&Bytes> = pages.kept.iter().skip(at).take(TOGETHER).collect();
        place.next += news.len() as u64;
        match news[..] {
            [] => None,
            [one] => Some(one.clone()),
            ref many => Some(many.iter().flat_map(|page| page.iter().copied()).collect()),
        }
    }

    fn lagged(&self, number: u64, missed: Option<u64>) -> Bytes {
        let data = json!({ "at": now(), "missed": missed });
        format!("id: {}-{number}\nevent: lagged\ndata: {data}\n\n", self.run).into()
    }
}

/// Events in one write.
const TOGETHER: usize = 64;

/// Where a reader is.
struct Place {
    /// How many he has been told, or has missed.
    next: u64,
    /// He is to be told that he missed some; how many, if that is known.
    missed: Option<Option<u64>>,
}

fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

fn shown(event: &Event, keys: &BTreeMap<String, Vec<KeyType>>) -> (&'static str, Value) {
    let at = now();
    match event {
        Event::Change(change) => ("change", of_change(change, keys, &at)),
        Event::Unreadable { table, error } => ("unreadable", json!({ "at": at, "table": table, "reason": error })),
        Event::Gap(reason) => ("gap", json!({ "at": at, "reason": reason.to_string() })),
        Event::Coherent => ("coherent", json!({ "at": at })),
        Event::Covered => ("covered", json!({ "at": at, "reason": null })),
        Event::Handoff(how) => ("handoff", json!({ "at": at, "reason": how })),
        Event::SpareLost(how) => ("spare_lost", json!({ "at": at, "reason": how })),
        Event::Incoherent { table, key, age } => {
            let types = keys.get(table).map_or(&[][..], Vec::as_slice);
            let key = key.as_ref().map(|key| joined(&key::texts(key, types)));
            ("incoherent", json!({ "at": at, "table": table, "key": key, "held_seconds": age.as_secs_f64() }))
        }
        Event::Lagged(missed) => ("lagged", json!({ "at": at, "missed": missed })),
    }
}

fn of_change(change: &Change, keys: &BTreeMap<String, Vec<KeyType>>, at: &str) -> Value {
    let types = change.table.as_ref().and_then(|table| keys.get(table)).map_or(&[][..], Vec::as_slice);
    let (rows, hashed) = match &change.rows {
        Rows::All => (None, false),
        Rows::Keys(rows) => (Some(rows.iter().map(|key| joined(&key::texts(key, types))).collect::<Vec<_>>()), false),
        Rows::Hashed { .. } => (None, true),
    };
    json!({ "at": at, "table": change.table, "keys": rows, "hashed": hashed, "xid": change.xid })
}

/// Changes as they are applied on this node, and what happens to the node itself, as they come. Ends when the service does.
#[utoipa::path(
    get,
    path = "/v1/events",
    tag = "node",
    params(("Last-Event-ID" = Option<String>, Header, description = "Goes on behind this event; `lagged` tells if some are lost")),
    responses(
        (status = 200, description = "Server-sent events: `change`, `gap`, `coherent`, `covered`, `handoff`, `spare_lost`, `unreadable`, `incoherent`, `lagged`; each with a JSON object", content_type = "text/event-stream", body = String),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The node is starting, or there are too many readers", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn events(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, Problem> {
    let hub = Arc::clone(&app.running()?.hub);
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let place = hub.place(last);
    let reader = Reader::new(&app, hub, place)?;
    let stream = stream::unfold(reader, |mut reader| async move {
        let bytes = reader.next().await?;
        Some((Ok::<_, Infallible>(bytes), reader))
    });
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A reverse proxy that collects what it forwards would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Somebody who reads events. Counts for as long as it lives.
struct Reader {
    app: Arc<App>,
    hub: Arc<Hub>,
    place: Place,
    news: watch::Receiver<u64>,
    stopping: watch::Receiver<bool>,
    is_greeted: bool,
}

impl Reader {
    fn new(app: &Arc<App>, hub: Arc<Hub>, place: Place) -> Result<Self, Problem> {
        let Ok(permit) = app.event_readers.try_acquire() else {
            return Err(Problem::unavailable("too_many_readers", "too many read events already (--max-event-readers)"));
        };
        SemaphorePermit::forget(permit);
        let (news, stopping) = (hub.news.subscribe(), app.stopping.subscribe());
        Ok(Self { app: Arc::clone(app), hub, place, news, stopping, is_greeted: false })
    }

    async fn next(&mut self) -> Option<Bytes> {
        if !self.is_greeted {
            self.is_greeted = true;
            // Something at once, so that the reader knows that he is connected; and from where to go on, and how soon to come back.
            return Some(format!("id: {}-{}\nretry: 1000\n\n", self.hub.run, self.place.next).into());
        }
        loop {
            self.news.borrow_and_update();
            if let Some(bytes) = self.hub.read(&mut self.place) {
                return Some(bytes);
            }
            tokio::select! {
                changed = self.news.changed() => changed.ok()?,
                _ = self.stopping.wait_for(|it| *it) => return None,
                () = tokio::time::sleep(SILENCE_MAX) => return Some(Bytes::from_static(b": still here\n\n")),
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.app.event_readers.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> Hub {
        Hub { run: "cafe".to_owned(), pages: Mutex::default(), news: watch::Sender::new(0) }
    }

    fn all(hub: &Hub, place: &mut Place) -> String {
        std::iter::from_fn(|| hub.read(place)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
    }

    #[test]
    fn who_names_the_last_one_goes_on_behind_it() {
        let hub = hub();
        let mut live = hub.place(None);
        for n in 1..=3 {
            hub.write("change", &json!(n));
        }
        assert_eq!(all(&hub, &mut live).matches("id: cafe-").count(), 3);
        assert_eq!(all(&hub, &mut live), "");
        assert_eq!(all(&hub, &mut hub.place(Some("cafe-2"))), "id: cafe-3\nevent: change\ndata: 3\n\n");
        assert_eq!(all(&hub, &mut hub.place(Some("cafe-3"))), "");
    }

    #[test]
    fn who_was_away_for_too_long_is_told_how_much_was_missed() {
        let hub = hub();
        for n in 0..KEPT + 5 {
            hub.write("change", &json!(n));
        }
        let told = all(&hub, &mut hub.place(Some("cafe-2")));
        assert!(told.starts_with("id: cafe-5\nevent: lagged\n") && told.contains("\"missed\":3"), "{}", &told[..100]);
        assert_eq!(told.matches("event: change").count(), KEPT);
        // Of another run, or from the future.
        for last in ["beef-1", "cafe-99999", "nonsense"] {
            let told = all(&hub, &mut hub.place(Some(last)));
            assert!(told.contains("event: lagged") && told.contains("\"missed\":null"), "{last}: {told}");
            assert_eq!(told.matches("event:").count(), 1);
        }
    }
}
