//! For who runs the service: what it does, why it holds what it holds, and how to make it forget.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Query, State},
    http::{HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{app::App, metrics, problem::Problem, rows, table::Served};
use crate::{
    Cause, Explanation, FleetNode, Status, TableEvent, cli::fleet_as_json, key::AnyKey, postgres::json_rows::Sent,
};

/// The process lives.
#[utoipa::path(get, path = "/healthz", tag = "node", responses((status = 200, description = "It does", content_type = "application/json", body = Object)))]
pub(crate) async fn alive() -> Json<Value> {
    Json(json!({ "alive": true }))
}

/// Whether entries are served from memory, and reads are answered. Not so while the node starts, stops, or is not coherent: reads are slower then, and go to
/// Postgres.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "node",
    responses(
        (status = 200, description = "Yes", content_type = "application/json", body = Object),
        (status = 503, description = "No, and why", content_type = "application/json", body = Object),
    )
)]
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    let why = if app.is_stopping() {
        Some("it is stopping".to_owned())
    } else {
        match app.running() {
            Err(problem) => Some(problem.detail().to_owned()),
            Ok(running) => match running.node.status() {
                Status::Coherent { .. } => None,
                status @ Status::Bypassed { .. } => Some(status.to_string()),
            },
        }
    };
    match why {
        None => Json(json!({ "ready": true })).into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "reason": why }))).into_response(),
    }
}

/// Metrics for Prometheus, as text.
#[utoipa::path(get, path = "/metrics", tag = "node", responses(
    (status = 200, description = "Metrics", content_type = "application/openmetrics-text", body = String),
    (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut response = Response::new(Body::from(metrics::text(&app)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE));
    response
}

/// Everything about this node: who it is, whether it is coherent, its counters, its tables.
#[utoipa::path(get, path = "/status", tag = "node", responses(
    (status = 200, description = "The node", content_type = "application/json", body = Object),
    (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn status(State(app): State<Arc<App>>) -> Json<Value> {
    let (requests, durations) = app.http.together();
    let running = app.try_running();
    let counters = running.map(|running| {
        let stats = running.node.stats();
        json!({
            "gaps": stats.gaps,
            "recoveries": stats.recoveries,
            "fences": stats.fences,
            "fence_seconds": stats.fence_took.as_secs_f64(),
            "messages": stats.messages,
            "unreadable": stats.unreadable,
            "overflows": stats.overflows,
        })
    });
    let tables: Vec<Value> = running.into_iter().flat_map(|running| running.tables.values()).map(of_table).collect();
    Json(json!({
        "node": {
            // As other nodes know it.
            "id": running.map_or(app.id, |running| running.node.handle.shared.id),
            "name": app.name,
            "version": env!("CARGO_PKG_VERSION"),
            "host": super::options::host_name(),
            "process": std::process::id(),
            "address": app.address.get(),
            "started_at": format!("{:.3}", app.started_at),
            "uptime_seconds": app.started.elapsed().as_secs_f64(),
        },
        "status": of_node(&app),
        "counters": counters,
        "notification_queue_usage": app.queue_usage(),
        "http": {
            "requests": requests,
            "in_flight": app.http.in_flight.load(std::sync::atomic::Ordering::Relaxed),
            "durations": metrics::histogram(durations.into_iter()),
        },
        "tables": tables,
    }))
}

fn of_node(app: &App) -> Value {
    let running = match app.running() {
        Ok(running) => running,
        Err(problem) => return json!({ "coherent": false, "reason": problem.detail() }),
    };
    let (node, shared) = (&running.node, &running.node.handle.shared);
    let (since, why) = match node.status() {
        Status::Coherent { .. } => (None, None),
        Status::Bypassed { since, why } => (Some(since.elapsed().as_secs_f64()), Some(why.to_string())),
    };
    let age = shared.age();
    json!({
        "coherent": why.is_none(),
        // Never, before the first fence.
        "as_of_seconds": (age < Duration::MAX).then_some(age.as_secs_f64()),
        "staleness_bound_seconds": shared.config.staleness_bound().as_secs_f64(),
        "lease_seconds": shared.config.lease.as_secs_f64(),
        "for_seconds": since,
        "reason": why,
        "covered": node.is_covered(),
        "caching": shared.tables.off().is_none(),
    })
}

fn of_table(table: &Served) -> Value {
    let stats = table.table().stats();
    let reason = match table.table().status() {
        Status::Coherent { .. } => None,
        Status::Bypassed { why, .. } => Some(why.to_string()),
    };
    let key: Vec<_> = table.key().iter().map(|(name, of)| json!({ "column": name, "type": of.postgres() })).collect();
    let (columns, excluded) = match table.sent() {
        Sent::All => (None, None),
        Sent::Only(names) => (Some(names), None),
        Sent::AllBut(names) => (None, Some(names)),
    };
    json!({
        "name": table.path(),
        "coherent": reason.is_none(),
        "reason": reason,
        "key": key,
        "columns": columns,
        "excluded": excluded,
        "writable": table.is_writable(),
        "gets": stats.gets,
        "hits": stats.hits,
        "stale": stats.stale,
        "misses": stats.misses,
        "loads": stats.loads,
        "published": stats.published,
        "voided": stats.voided,
        "uncached": stats.uncached,
        "failed": stats.failed,
        "invalidations": stats.invalidations,
        "clears": stats.clears,
        "entries": stats.entries,
        "absent": stats.absent,
        "bytes": stats.bytes,
        "capacity": stats.capacity,
        "used": stats.used,
        "hit_ratio": stats.hit_ratio(),
        "audited": stats.audits.audited,
        "incoherent": stats.audits.incoherent,
        "load_durations": metrics::histogram(stats.load_times.buckets()),
    })
}

/// Why a row is held, or is not. Asks nobody.
#[utoipa::path(
    get,
    path = "/v1/explain/{table}/{key}",
    tag = "node",
    params(
        ("table" = String, Path, description = "As it was named to the service", example = "public.users"),
        ("key" = String, Path, description = "As for reading", example = "42"),
    ),
    responses(
        (status = 200, description = "What this node knows of the key", content_type = "application/json", body = Object),
        (status = 400, description = "The key cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such table", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The node is starting", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn explain(State(app): State<Arc<App>>, uri: Uri) -> Result<Json<Value>, Problem> {
    let path = uri.path().strip_prefix("/v1/explain").unwrap_or_default();
    let (table, key) = rows::row_in(&app, path.split('/').skip(1))?;
    let explanation: Explanation<AnyKey> = table.table().explain(&key);
    let held = explanation.held.map(|held| {
        json!({
            "is_row": held.is_row,
            "is_served": held.is_served,
            "age_seconds": held.age.as_secs_f64(),
            "seen_to": held.seen_to.map(|lsn| format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)),
            "is_fenced": held.is_fenced,
            "expires_in_seconds": held.expires_in.map(|left| left.as_secs_f64()),
        })
    });
    let last = explanation.last.as_ref().map(|(ago, event)| {
        let (what, by) = ended(event);
        json!({ "seconds_ago": ago.as_secs_f64(), "event": what, "by": by.map(ToString::to_string) })
    });
    Ok(Json(json!({
        "table": table.path(),
        "key": table.show_key(&key),
        "held": held,
        "is_loading": explanation.is_loading,
        "is_pinned": explanation.is_pinned,
        "coherent": matches!(explanation.status, Some(Status::Coherent { .. })),
        "last": last,
        "text": explanation.to_string(),
    })))
}

fn ended<K>(event: &TableEvent<K>) -> (&'static str, Option<&Cause>) {
    match event {
        TableEvent::Invalidated { by, .. } => ("invalidated", Some(by)),
        TableEvent::Cleared { by } => ("cleared", Some(by)),
        TableEvent::Expired { .. } => ("expired", None),
        TableEvent::Evicted { .. } => ("evicted", None),
        _ => ("gap", None),
    }
}

/// Where something is to be forgotten.
#[derive(Clone, Copy, Debug, Default, Deserialize, utoipa::ToSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scope {
    /// On all nodes of the database.
    #[default]
    Cluster,
    /// On this one.
    Local,
}

/// The query of [`invalidate`] and [`clear`].
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Scoped {
    /// `cluster`, the default, or `local`: this node alone.
    #[param(inline)]
    #[serde(default)]
    scope: Scope,
}

type Asked = Result<Query<Scoped>, axum::extract::rejection::QueryRejection>;

fn scope(asked: Asked) -> Result<Scope, Problem> {
    asked.map(|Query(it)| it.scope).map_err(|_| Problem::bad_request("bad_scope", "`scope` is `cluster` or `local`"))
}

/// Makes nodes forget a row, for changes that triggers cannot see. Says who has.
#[utoipa::path(
    post,
    path = "/v1/{table}/{key}/invalidate",
    tag = "administration",
    params(
        ("table" = String, Path, description = "As it was named to the service", example = "public.users"),
        ("key" = String, Path, description = "As for reading", example = "42"),
        Scoped,
    ),
    responses(
        (status = 200, description = "Who has forgotten it, and who did not answer or is not coherent", content_type = "application/json", body = Object),
        (status = 400, description = "The key cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "The token is for reading", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such table", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Other nodes could not be told; this one has forgotten it", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn invalidate(State(app): State<Arc<App>>, uri: Uri, asked: Asked) -> Result<Json<Value>, Problem> {
    let (table, key) = rows::row_of(&app, &uri)?;
    match scope(asked)? {
        Scope::Local => {
            table.table().forget(&key);
            Ok(Json(json!({ "scope": "local", "confirmed": [app.name], "unconfirmed": [] })))
        }
        Scope::Cluster => {
            table.table().invalidate(&key).await?;
            confirmed(&app).await
        }
    }
}

/// Makes nodes forget all rows of a table. Says who has.
#[utoipa::path(
    post,
    path = "/v1/{table}/clear",
    tag = "administration",
    params(("table" = String, Path, description = "As it was named to the service", example = "public.users"), Scoped),
    responses(
        (status = 200, description = "Who has forgotten them, and who did not answer or is not coherent", content_type = "application/json", body = Object),
        (status = 400, description = "The scope cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "The token is for reading", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such table", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Other nodes could not be told; this one has forgotten them", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn clear(State(app): State<Arc<App>>, uri: Uri, asked: Asked) -> Result<Json<Value>, Problem> {
    let table = app.table(uri.path().split('/').nth(2).unwrap_or_default())?;
    match scope(asked)? {
        Scope::Local => {
            table.table().forget_all();
            Ok(Json(json!({ "scope": "local", "confirmed": [app.name], "unconfirmed": [] })))
        }
        Scope::Cluster => {
            table.table().clear().await?;
            confirmed(&app).await
        }
    }
}

/// The nodes of this database, and what they say of themselves; those that did not answer in time are named, too.
#[utoipa::path(get, path = "/v1/nodes", tag = "node", responses(
    (status = 200, description = "The nodes", content_type = "application/json", body = Object),
    (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
    (status = 503, description = "The database cannot be asked now", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn nodes(State(app): State<Arc<App>>) -> Result<Json<Value>, Problem> {
    Ok(Json(fleet_as_json(&*app.fleet().await?)))
}

/// Who has applied what was sent before: whoever answers a question that is asked now, and says that he is coherent. One who is not may still
/// serve old rows to those who allow that.
async fn confirmed(app: &App) -> Result<Json<Value>, Problem> {
    let fleet = app.running()?.node.fleet(FLEET_DEADLINE).await?;
    let has = |node: &&FleetNode| node.report.as_ref().is_some_and(|report| report.is_coherent);
    let (confirmed, others): (Vec<_>, Vec<_>) = fleet.nodes.iter().partition(has);
    let names = |nodes: Vec<&FleetNode>| nodes.into_iter().map(|node| node.name.clone()).collect::<Vec<_>>();
    Ok(Json(json!({ "scope": "cluster", "confirmed": names(confirmed), "unconfirmed": names(others) })))
}

/// How long other nodes are waited for.
pub(crate) const FLEET_DEADLINE: Duration = Duration::from_secs(1);
