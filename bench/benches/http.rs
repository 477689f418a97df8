//! What the cache service costs, beside a service that sends the same bytes from memory, and beside Redis.

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use axum::{Router, http::header, routing::get};
use clap::Parser as _;
use rowcache::cli::{Cli, report};
use rowcache_bench::{
    ground::{self, Ground, User, program},
    measure::{Spread, number},
    report::{Plot, Ratio, Shape, Table},
    suite::{self, Bench},
};
use tokio::{net::TcpListener, process::Command};

use self::load::{Load, Service, wrk};

#[path = "http/load.rs"]
mod load;

const ROW: &str = "/v1/public.users/42";
const OURS: &str = "rowcache serve";
const BARE: &str = "axum, the same row";
const HEADERS: &str = "axum, the same row and headers";
const REDIS: &str = "Redis GET";

fn main() -> ExitCode {
    // It has a log of its own, and must come before that of suites.
    match told_to_serve() {
        Some(cli) => serve(cli),
        None => suite::main("http", "The cache service over HTTP", run),
    }
}

/// The command of a process that is to be the cache service.
fn told_to_serve() -> Option<Cli> {
    let mut told = std::env::args().skip_while(|word| word != "--child").skip(1).peekable();
    told.next_if(|word| word == "serve")?;
    Some(Cli::parse_from(["rowcache".to_owned(), "serve".to_owned()].into_iter().chain(told)))
}

fn serve(cli: Cli) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.context("no runtime").and_then(|runtime| runtime.block_on(cli.run())) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

async fn run(mut bench: Bench) -> Result<Bench> {
    if let [headers, body] = &bench.options.child[..] {
        bare(headers, body.clone()).await?;
        return Ok(bench);
    }
    bench.about(
        "`wrk` with one thread and 32 connections asks for one row that is held, again and again. It shares the two processors with the service,
         which is a process of its own with its defaults. The bare service is axum on the same runtime, with one route that sends the same
         bytes from memory; a second one sends the headers, too, by which the cache service says how it came about (`Cache-Status`, `Age`, `ETag`, …).
         Redis is asked by its own `redis-benchmark`, also over 32 connections: its protocol has no headers, and its server one thread. CPU
         time is that of the service alone, its work in the kernel included.",
    );
    let ground = Ground::start(&mut bench).await?;
    ground.users(1000).await?;
    let url = ground.url();
    let ours = Service::start(
        &["serve", "--database-url", &url, "--table", "public.users", "--listen", "127.0.0.1:0"],
        "serving ",
    )
    .await?;
    let (head, body) = held(&ours).await?;
    let headers: String =
        head.lines().skip(1).filter(|line| !line.starts_with("connection")).collect::<Vec<_>>().join("\n");
    let bare = Service::start(&["", &body], "listening").await?;
    let with_headers = Service::start(&[&headers, &body], "listening").await?;
    let services = [(OURS, &ours), (BARE, &bare), (HEADERS, &with_headers)];
    for (name, service) in services {
        let answer = service.get(ROW, "").await?;
        ensure!(answer.ends_with(&body), "{name} sends another row: {answer}");
    }
    let redis = ground::redis(&mut bench).await?;
    redis.ask::<String>(&["SET", "user:42", &body]).await?;

    let rounds = bench.rounds(7);
    let seconds = bench.size(4, 1) as f64;
    let (mut rates, mut costs): ([Vec<f64>; 4], [Vec<f64>; 3]) = Default::default();
    let mut latencies: [Vec<Load>; 3] = Default::default();
    for round in 0..rounds {
        for n in 0..4 {
            let variant = (n + round) % 4;
            let Some((_, service)) = services.get(variant) else {
                rates[3].push(ask_redis(redis.port(), if bench.options.short { 20_000 } else { 250_000 }).await?);
                continue;
            };
            let before = service.cpu()?;
            let load = wrk(&format!("http://{}{ROW}", service.address), "", seconds).await?;
            let cpu = service.cpu()?.saturating_sub(before);
            rates[variant].push(load.a_second());
            costs[variant].push(cpu.as_secs_f64() * 1e6 / load.requests as f64);
            latencies[variant].push(load);
        }
    }
    ensure!(held(&ours).await?.1 == body, "the row is still held, and the same");

    let mut table = Table::new(
        "One row over 32 connections.",
        &["", "requests a second", "of the bare service's", "CPU time of the service, µs a request", "ms: p50", "p99"],
    );
    let of = |n: usize, to: usize| Spread::of(rates[n].iter().zip(&rates[to]).map(|(of, to)| of / to));
    let names = [OURS, BARE, HEADERS, REDIS];
    for (n, name) in names.iter().enumerate() {
        let cost = costs.get(n).map(|costs| Spread::of(costs.iter().copied()).to_string());
        let millis = |of: fn(&Load) -> f64| {
            latencies.get(n).map(|all| number(Spread::of(all.iter().map(of)).median)).unwrap_or_default()
        };
        table.row([
            (*name).to_owned(),
            Spread::of(rates[n].iter().copied()).to_string(),
            if n == 1 { String::new() } else { of(n, 1).to_string() },
            cost.unwrap_or_default(),
            millis(|load| load.p50.as_secs_f64() * 1e3),
            millis(|load| load.p99.as_secs_f64() * 1e3),
        ]);
    }
    bench.ratio(Ratio::gain("requests a second, a held row", BARE, of(0, 1)));
    bench.ratio(Ratio::gain("requests a second, a held row", HEADERS, of(0, 2)));
    bench.ratio(Ratio::gain("requests a second, a held row", REDIS, of(0, 3)));
    let cpu = |to: usize| Spread::of(costs[0].iter().zip(&costs[to]).map(|(of, to)| of / to));
    bench.ratio(Ratio::cost("CPU time of a request for a held row", BARE, cpu(1)));
    bench.ratio(Ratio::cost("CPU time of a request for a held row", HEADERS, cpu(2)));
    bench.table(table);
    let bars =
        names.iter().zip(&rates).map(|(name, rates)| ((*name).to_owned(), Spread::of(rates.iter().copied()).median));
    bench.plot(Plot {
        name: "requests".to_owned(),
        title: "One held row over HTTP, 32 connections".to_owned(),
        unit: "requests a second".to_owned(),
        log: false,
        shape: Shape::Bars(bars.collect()),
    });
    Ok(bench)
}

/// The head and the body of the answer for a row that is held.
async fn held(service: &Service) -> Result<(String, String)> {
    for _ in 0..2 {
        let answer = service.get(ROW, "").await?;
        let (head, body) = answer.split_once("\r\n\r\n").context("a head and a body")?;
        if head.contains("cache-status: rowcache; hit") {
            ensure!(serde_json::from_str::<User>(body)? == User::nth(42), "another row: {body}");
            return Ok((head.replace('\r', ""), body.to_owned()));
        }
    }
    anyhow::bail!("the row is not held")
}

/// A service that sends the same bytes to everybody.
async fn bare(headers: &str, body: String) -> Result<()> {
    let own = ["content-length", "content-type", "date", ""];
    let headers: Vec<(header::HeaderName, header::HeaderValue)> = headers
        .lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| !own.contains(name))
        .map(|(name, value)| Ok((name.parse()?, value.parse()?)))
        .collect::<Result<_>>()?;
    let body = axum::body::Bytes::from(body);
    let answer = move || {
        let mut all = header::HeaderMap::with_capacity(headers.len() + 1);
        all.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        all.extend(headers.iter().cloned());
        let body = body.clone();
        async move { (all, body) }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, Router::new().route("/v1/{table}/{key}", get(answer))).await?)
}

/// Requests a second.
async fn ask_redis(port: u16, requests: usize) -> Result<f64> {
    let mut command = Command::new(program("redis-benchmark")?);
    let (port, requests) = (port.to_string(), requests.to_string());
    command.args(["-p", &port, "-c", "32", "-n", &requests, "--csv", "GET", "user:42"]).kill_on_drop(true);
    let output = command.output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with("\"GET")).with_context(|| format!("it says: {text}"))?;
    let rate = line.split(',').nth(1).context("a second column")?.trim_matches('"');
    rate.parse().with_context(|| format!("{line} has no rate"))
}
