//! What is measured: one list, for Prometheus and for OpenTelemetry.
//!
//! Counters are those of the library, read when somebody asks. `docs/operations.md` says what each is for.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use super::app::App;
use crate::{LoadTimes, Stats, Status, stats::TimeCounters};

/// Requests, by what they were for.
#[derive(Default)]
pub(crate) struct HttpMetrics {
    routes: [RouteMetrics; ROUTES.len()],
    pub(crate) in_flight: AtomicI64,
}

#[derive(Default)]
struct RouteMetrics {
    durations: TimeCounters,
    /// By the first digit of the status, from 2, and then by what is not a status of ours.
    statuses: [AtomicU64; STATUSES.len()],
}

/// The routes, as metrics name them; what is none of them comes last.
pub(crate) const ROUTES: [&str; 14] = [
    "/v1/{table}/{key}",
    "/v1/{table}",
    "/v1/{table}/{key}/invalidate",
    "/v1/{table}/clear",
    "/v1/explain/{table}/{key}",
    "/v1/nodes",
    "/v1/events",
    "/status",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/",
    "(none)",
];

/// Those that rows are asked for by.
const ROWS: [&str; 2] = ["/v1/{table}/{key}", "/v1/{table}"];

/// The statuses that are told apart.
const STATUSES: [u16; 19] =
    [200, 204, 304, 400, 401, 403, 404, 405, 409, 413, 415, 422, 429, 431, 500, 501, 503, 504, 0];

impl HttpMetrics {
    pub(crate) fn count(&self, route: &str, status: u16, took: Duration) {
        let place = ROUTES.iter().position(|it| *it == route).unwrap_or(ROUTES.len() - 1);
        let route = &self.routes[place];
        route.durations.add(took);
        let place = STATUSES.iter().position(|it| *it == status).unwrap_or(STATUSES.len() - 1);
        route.statuses[place].fetch_add(1, Ordering::Relaxed);
    }

    fn each(&self) -> impl Iterator<Item = (&'static str, LoadTimes, &RouteMetrics)> {
        ROUTES.iter().zip(&self.routes).map(|(name, route)| (*name, route.durations.snapshot(), route))
    }

    /// Those for rows together: how many, and how long they took.
    pub(crate) fn together(&self) -> (u64, Vec<(Duration, u64)>) {
        let mut buckets: Vec<(Duration, u64)> = LoadTimes::default().buckets().collect();
        for (_, times, _) in self.each().filter(|(name, ..)| ROWS.contains(name)) {
            for (sum, (_, count)) in buckets.iter_mut().zip(times.buckets()) {
                sum.1 += count;
            }
        }
        (buckets.iter().map(|(_, count)| count).sum(), buckets)
    }
}

/// A metric, and its values now.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) unit: Option<Unit>,
    pub(crate) values: Values,
}

type Labels = Vec<(&'static str, String)>;

/// A number of a table.
type OfStats = fn(&Stats) -> u64;

pub(crate) enum Values {
    Counter(Vec<(Labels, u64)>),
    Gauge(Vec<(Labels, f64)>),
    Times(Vec<(Labels, LoadTimes)>),
}

/// Everything, now.
pub(crate) fn families(app: &App) -> Vec<Family> {
    let mut all = Families(Vec::with_capacity(48));
    all.gauge(
        "build_info",
        "The version that runs",
        None,
        vec![(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)],
    );
    all.gauge1("uptime", "Since the service was started", Some(Unit::Seconds), app.started.elapsed().as_secs_f64());
    of_node(&mut all, app);
    of_tables(&mut all, app);
    of_http(&mut all, app);
    all.0
}

fn of_node(all: &mut Families, app: &App) {
    let Some(running) = app.try_running() else {
        all.gauge1("coherent", COHERENT, None, 0.0);
        return;
    };
    let (node, stats) = (&running.node, running.node.stats());
    let shared = &node.handle.shared;
    all.gauge1("coherent", COHERENT, None, flag(matches!(node.status(), Status::Coherent { .. })));
    all.gauge1(
        "fence_age",
        "Since the last fence that came back was sent",
        Some(Unit::Seconds),
        shared.age().as_secs_f64(),
    );
    all.gauge1(
        "staleness_bound",
        "No read misses a change that was visible longer before it",
        Some(Unit::Seconds),
        shared.config.staleness_bound().as_secs_f64(),
    );
    all.gauge1(
        "fence_duration",
        "How long the last fence took, until it counted",
        Some(Unit::Seconds),
        stats.fence_took.as_secs_f64(),
    );
    all.gauge1(
        "covered",
        "Whether a second line would take over if the first one was lost",
        None,
        flag(node.is_covered()),
    );
    all.gauge1("caching", "Whether caching is switched on", None, flag(shared.tables.off().is_none()));
    if let Some(share) = app.queue_usage() {
        all.gauge1(
            "notification_queue_usage",
            "Of the server's notification queue, as a share",
            Some(Unit::Other("ratio".to_owned())),
            share,
        );
    }
    all.counter1("gaps", "Times that the node ceased to be coherent", stats.gaps);
    all.counter1("recoveries", "Times that it became coherent", stats.recoveries);
    all.counter1("fences", "Fences that came back", stats.fences);
    all.counter1("messages", "Messages applied, fences included", stats.messages);
    all.counter1("messages_unreadable", "Messages that could not be read", stats.unreadable);
    all.counter1("inbox_overflows", "Times that more messages came than the inbox holds", stats.overflows);
}

const COHERENT: &str = "Whether entries are served from memory";

fn of_tables(all: &mut Families, app: &App) {
    let Some(running) = app.try_running() else { return };
    let tables: Vec<(Labels, Stats, bool)> = running
        .tables
        .values()
        .map(|table| {
            let is_coherent = matches!(table.table().status(), Status::Coherent { .. });
            (vec![("table", table.path().to_owned())], table.table().stats(), is_coherent)
        })
        .collect();
    let by = |label: &'static str, of: &[(&str, OfStats)]| {
        let mut values = Vec::new();
        for (labels, stats, _) in &tables {
            for (value, count) in of {
                let mut labels = labels.clone();
                labels.push((label, (*value).to_owned()));
                values.push((labels, count(stats)));
            }
        }
        Values::Counter(values)
    };
    all.gauge(
        "table_coherent",
        "Whether entries of the table are served",
        None,
        tables.iter().map(|(labels, _, is)| (labels.clone(), flag(*is))).collect(),
    );
    all.add(
        "gets",
        "Keys asked for, by how they were answered",
        None,
        by("result", &[("hit", |it| it.hits), ("stale", |it| it.stale), ("miss", |it| it.misses)]),
    );
    all.add(
        "misses",
        "Keys not answered from memory: for which a load was started, or joined, or none asked for",
        None,
        by("kind", &[("led", |it| it.led), ("joined", |it| it.joined), ("declined", |it| it.declined)]),
    );
    all.add(
        "loads",
        "Loads of a key, by what became of them",
        None,
        by(
            "outcome",
            &[
                ("published", |it| it.published),
                ("voided", |it| it.voided),
                ("uncached", |it| it.uncached),
                ("failed", |it| it.failed),
            ],
        ),
    );
    all.add(
        "audits",
        "Hits whose rows were read again, by what was found",
        None,
        by(
            "result",
            &[
                ("equal", |it| it.audits.equal),
                ("changed", |it| it.audits.changed),
                ("skipped", |it| it.audits.skipped),
                ("incoherent", |it| it.audits.incoherent),
            ],
        ),
    );
    let counters: [(&str, &str, OfStats); 11] = [
        ("loads_refused", "Loads that failed at once, because Postgres had not answered lately", |it| it.refused),
        ("load_queries", "Statements that loaded rows", |it| it.queries),
        ("rows_not_found", "Loads that found no row", |it| it.not_found),
        ("rescued", "Misses answered by what was held, because the load failed or took too long", |it| it.rescued),
        ("invalidations", "Keys that a message or a call invalidated", |it| it.invalidations),
        ("clears", "Times that all entries were dropped at once", |it| it.clears),
        ("refilled", "Rows read again after a gap", |it| it.refilled),
        ("refreshed", "Entries read again before they expired", |it| it.refreshed),
        ("expired", "Entries that were too old", |it| it.expired),
        ("evicted", "Entries that had to go for lack of space", |it| it.evicted),
        ("oversized", "Of those: larger than any that can be held", |it| it.oversized),
    ];
    for (name, help, count) in counters {
        let values = tables.iter().map(|(labels, stats, _)| (labels.clone(), count(stats))).collect();
        all.add(name, help, None, Values::Counter(values));
    }
    let gauges: [(_, _, _, OfStats); 5] = [
        ("entries", "Entries held, absent ones included", None, |it| it.entries),
        ("absent_entries", "Entries that stand for rows that do not exist", None, |it| it.absent),
        ("entry", "What entries take that are bounded by memory", Some(Unit::Bytes), |it| it.bytes),
        ("capacity", "What can be held: rows, or bytes if that is the bound", None, |it| it.capacity),
        ("used", "Of the capacity: what is held", None, |it| it.used),
    ];
    for (name, help, unit, value) in gauges {
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        let values = tables.iter().map(|(labels, stats, _)| (labels.clone(), value(stats) as f64)).collect();
        all.gauge(name, help, unit, values);
    }
    let times = tables.iter().map(|(labels, stats, _)| (labels.clone(), stats.load_times)).collect();
    all.add("load_duration", "How long statements took that load rows", Some(Unit::Seconds), Values::Times(times));
}

fn of_http(all: &mut Families, app: &App) {
    let (mut requests, mut times) = (Vec::new(), Vec::new());
    for (name, durations, route) in app.http.each() {
        let label = ("route", name.to_owned());
        for (status, count) in STATUSES.iter().zip(&route.statuses) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                let status = if *status == 0 { "other".to_owned() } else { status.to_string() };
                requests.push((vec![label.clone(), ("status", status)], count));
            }
        }
        if durations.count() > 0 {
            times.push((vec![label], durations));
        }
    }
    all.add("http_requests", "Requests answered, by route and status", None, Values::Counter(requests));
    all.add(
        "http_request_duration",
        "How long they took, until the first byte of the answer",
        Some(Unit::Seconds),
        Values::Times(times),
    );
    #[expect(clippy::cast_precision_loss, reason = "a gauge")]
    let in_flight = app.http.in_flight.load(Ordering::Relaxed) as f64;
    all.gauge1("http_requests_in_flight", "Requests that are being answered", None, in_flight);
    #[expect(clippy::cast_precision_loss, reason = "a gauge")]
    let readers = app.event_readers_max.saturating_sub(app.event_readers.available_permits()) as f64;
    all.gauge1("event_readers", "Connections that read events", None, readers);
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

struct Families(Vec<Family>);

impl Families {
    fn add(&mut self, name: &'static str, help: &'static str, unit: Option<Unit>, values: Values) {
        self.0.push(Family { name, help, unit, values });
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, unit: Option<Unit>, values: Vec<(Labels, f64)>) {
        self.add(name, help, unit, Values::Gauge(values));
    }

    fn gauge1(&mut self, name: &'static str, help: &'static str, unit: Option<Unit>, value: f64) {
        self.gauge(name, help, unit, vec![(Vec::new(), value)]);
    }

    fn counter1(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.add(name, help, None, Values::Counter(vec![(Vec::new(), value)]));
    }
}

/// The text that Prometheus reads.
pub(crate) fn text(app: &Arc<App>) -> String {
    let mut registry = Registry::with_prefix("rowcache");
    registry.register_collector(Box::new(Now(Arc::downgrade(app))));
    let mut text = String::new();
    // A string takes whatever is written.
    let _ = encode(&mut text, &registry);
    text
}

/// What [`text`] is.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

struct Now(Weak<App>);

impl fmt::Debug for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Now")
    }
}

impl Collector for Now {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(app) = self.0.upgrade() else { return Ok(()) };
        for Family { name, help, unit, values } in families(&app) {
            let kind = match values {
                Values::Counter(_) => MetricType::Counter,
                Values::Gauge(_) => MetricType::Gauge,
                Values::Times(_) => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            match values {
                Values::Counter(values) => {
                    for (labels, value) in values {
                        if labels.is_empty() {
                            metric.encode_counter::<Vec<(String, String)>, _, u64>(&value, None)?;
                        } else {
                            ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
                        }
                    }
                }
                Values::Gauge(values) => {
                    for (labels, value) in values {
                        if labels.is_empty() {
                            metric.encode_gauge(&value)?;
                        } else {
                            ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
                        }
                    }
                }
                Values::Times(values) => {
                    for (labels, times) in values {
                        let buckets: Vec<(f64, u64)> = ends(&times).collect();
                        let mut metric = metric.encode_family(&labels)?;
                        let sum = times.total().as_secs_f64();
                        metric.encode_histogram::<Vec<(String, String)>>(sum, times.count(), &buckets, None)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The ends of buckets, in seconds, and what is in each; the last one has no end.
fn ends(times: &LoadTimes) -> impl Iterator<Item = (f64, u64)> {
    let last = times.buckets().count() - 1;
    times
        .buckets()
        .enumerate()
        .map(move |(n, (end, count))| (if n == last { f64::INFINITY } else { end.as_secs_f64() }, count))
}

/// For `/status`: the ends of all buckets but the last, and what is in each.
pub(crate) fn histogram(buckets: impl Iterator<Item = (Duration, u64)>) -> serde_json::Value {
    let (mut ends, counts): (Vec<f64>, Vec<u64>) = buckets.map(|(end, count)| (end.as_secs_f64(), count)).unzip();
    ends.pop();
    serde_json::json!({ "le_seconds": ends, "counts": counts })
}
