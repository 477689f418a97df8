//! `rowcache serve`: the cache for those who do not write Rust, and the way to look into it.
//!
//! ```text
//! options      what it is told
//! http         sockets, routes ──→ around: who asks, how long, counted ──→
//! shortcut     before the routes: a row that is held, and nothing special
//! rows         a row, rows, a change of one ── directives: how fresh ── table: keys as text, rows as JSON
//! events       what happens, as it happens
//! operate      status, explanations, nodes; invalidate, clear
//! metrics      one list, for Prometheus and OpenTelemetry
//! page         the same to look at
//! app          what all requests share
//! ```
//!
//! It listens at once, and answers 503 until it has reached Postgres: whoever starts it together with its database need not wait
//! for that.

pub(crate) mod app;
mod directives;
mod events;
mod guard;
mod http;
mod metrics;
mod operate;
pub(crate) mod options;
mod page;
mod problem;
mod rows;
mod shortcut;
pub(crate) mod table;
mod telemetry;

use std::{
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use axum_server::Handle;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::task::JoinSet;

use self::{
    app::{App, Limits},
    guard::Guard,
    http::Sockets,
    options::{Flags, Settings, Tokens},
    table::{Served, TableSpec},
    telemetry::Telemetry,
};
use crate::{Config, Error, Node, cli::signals::Signals, error::with_causes};

/// The command.
pub(crate) async fn serve(flags: &Flags, database_url: Option<String>) -> Result<ExitCode> {
    let mut settings = Settings::read(flags, database_url)?;
    if flags.print_config {
        print!("{}", settings.printed);
        return Ok(ExitCode::SUCCESS);
    }
    // There may be several in one program; of all that use TLS here, this is the one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let telemetry = Telemetry::start(settings.log_format, settings.otlp_endpoint.as_deref(), &settings.name)?;
    let mut signals = Signals::new()?;
    let limits = Limits {
        max_keys: settings.max_keys,
        max_event_readers: settings.max_event_readers,
        request_timeout: settings.request_timeout,
    };
    let app = App::new(settings.name.clone(), Guard::new(&settings.tokens, settings.insecure_no_tokens), &limits);
    let tls = match &settings.tls {
        Some(files) => Some(http::tls(files).await?),
        None => None,
    };
    let listening = Listening::bind(&settings.listen, Sockets { max_connections: settings.max_connections, tls })?;
    let address = settings.advertise.clone().unwrap_or_else(|| listening.addresses[0].clone());
    let _ = app.address.set(address.clone());
    settings.node.name = Some(settings.name.clone());
    settings.node.address = Some(address);
    let listening = listening.serve(&app);
    for address in &listening.addresses {
        println!("listening on {address}");
    }
    tokio::spawn(Arc::clone(&app).watch_queue());
    let ended = tokio::select! {
        started = start(&app, &settings.node, &settings.tables) => match started {
            Ok(()) => {
                let tables: Vec<&str> = app.try_running().iter().flat_map(|running| running.tables.keys()).map(String::as_str).collect();
                println!("serving {}", tables.join(", "));
                telemetry.measure(&app);
                signals.next().await;
                Ok(())
            }
            Err(error) => Err(error),
        },
        () = signals.next() => Ok(()),
    };
    if ended.is_ok() {
        println!("stopping: what is under way may take {:?}; again, to end at once", settings.shutdown_grace);
    }
    tokio::select! {
        () = listening.stop(&app, settings.shutdown_grace) => {}
        () = signals.next() => {}
    }
    if let Some(running) = app.try_running() {
        running.node.shutdown().await;
    }
    // It waits for whoever collects traces.
    let _ = tokio::task::spawn_blocking(move || telemetry.end()).await;
    ended.map(|()| ExitCode::SUCCESS)
}

/// Reaches Postgres and opens the tables; tries for as long as Postgres does not answer.
async fn start(app: &App, config: &Config, specs: &[TableSpec]) -> Result<()> {
    let pauses = || {
        let pauses = ExponentialBuilder::default().with_min_delay(Duration::from_millis(200)).with_jitter();
        pauses.with_max_delay(Duration::from_secs(5)).without_max_times().build()
    };
    let mut waits = pauses();
    loop {
        let error = match reach(config, specs).await {
            Ok((node, tables)) => {
                app.run(node, tables);
                return Ok(());
            }
            Err(error) => error,
        };
        let can_mend = error.is_unavailable() || error.is_timeout();
        if !can_mend {
            return Err(error.into());
        }
        let why = with_causes(&error);
        tracing::warn!("Postgres cannot be reached yet: {why}");
        app.is_in_the_way(why);
        tokio::time::sleep(waits.next().unwrap_or_default()).await;
    }
}

async fn reach(config: &Config, specs: &[TableSpec]) -> Result<(Node, Vec<Served>), Error> {
    let node = Node::start(config.clone()).await?;
    match open(&node, specs).await {
        Ok(tables) => Ok((node, tables)),
        Err(error) => {
            node.shutdown().await;
            Err(error)
        }
    }
}

async fn open(node: &Node, specs: &[TableSpec]) -> Result<Vec<Served>, Error> {
    let mut tables = Vec::new();
    for spec in specs {
        tables.push(Served::open(node, spec.clone()).await?);
    }
    Ok(tables)
}

/// Sockets that nobody serves yet.
struct Listening {
    sockets: Sockets,
    listeners: Vec<TcpListener>,
    addresses: Vec<String>,
}

impl Listening {
    fn bind(addresses: &[SocketAddr], sockets: Sockets) -> Result<Self> {
        let scheme = if sockets.tls.is_some() { "https" } else { "http" };
        let mut listening = Self { sockets, listeners: Vec::new(), addresses: Vec::new() };
        for address in addresses {
            let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
            listening.addresses.push(format!("{scheme}://{}", listener.local_addr()?));
            listening.listeners.push(listener);
        }
        if listening.listeners.is_empty() {
            bail!("nowhere to listen: name an address, as --listen 127.0.0.1:8080");
        }
        Ok(listening)
    }

    fn serve(self, app: &Arc<App>) -> Serving {
        let Self { sockets, listeners, addresses } = self;
        let sockets = Arc::new(sockets);
        let service = http::service(app);
        let mut serving = Serving { addresses, handles: Vec::new(), tasks: JoinSet::new() };
        for listener in listeners {
            let (handle, sockets, service) = (Handle::new(), Arc::clone(&sockets), service.clone());
            serving.handles.push(handle.clone());
            serving.tasks.spawn(async move {
                if let Err(error) = sockets.serve(listener, service, handle).await {
                    tracing::error!("a socket is not served any more: {error}");
                }
            });
        }
        serving
    }
}

/// Sockets that are served, until this is dropped.
pub(crate) struct Serving {
    addresses: Vec<String>,
    handles: Vec<Handle<SocketAddr>>,
    tasks: JoinSet<()>,
}

impl Serving {
    /// Answers what is under way, and nothing else.
    pub(crate) async fn stop(mut self, app: &App, grace: Duration) {
        app.stopping.send_replace(true);
        for handle in &self.handles {
            handle.graceful_shutdown(Some(grace));
        }
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Serves tables of a node that runs already, without tokens: for the demo.
pub(crate) async fn serve_here(
    node: &Node,
    name: &str,
    listener: TcpListener,
    specs: &[TableSpec],
) -> Result<(Arc<App>, Serving)> {
    let limits = Limits { max_keys: 1000, max_event_readers: 256, request_timeout: Duration::from_secs(10) };
    let app = App::new(name.to_owned(), Guard::new(&Tokens::default(), false), &limits);
    let address = format!("http://{}", listener.local_addr()?);
    let _ = app.address.set(address.clone());
    let listening = Listening {
        sockets: Sockets { max_connections: 1000, tls: None },
        listeners: vec![listener],
        addresses: vec![address],
    };
    app.run(node.clone(), open(node, specs).await?);
    tokio::spawn(Arc::clone(&app).watch_queue());
    Ok((Arc::clone(&app), listening.serve(&app)))
}
