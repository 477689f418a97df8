//! Services in processes of their own, and the load that `wrk` puts on them.

use std::{env, fs, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use rowcache_bench::{ground::program, measure::cpu_of_server};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};

/// How long a service may take to start.
const PATIENCE: Duration = Duration::from_mins(1);

/// A service in a process of its own, which ends when this is dropped.
#[derive(Debug)]
pub struct Service {
    process: Child,
    /// `127.0.0.1:8080`.
    pub address: String,
}

impl Service {
    /// This program, told to be a service. It says `listening on http://…` once it can be reached, and may say that it is `serving` later.
    pub async fn start(told: &[&str], until: &str) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--child").args(told).env_remove("RUST_LOG").stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn()?;
        let output = process.stdout.take().context("its output")?;
        let mut lines = BufReader::new(output).lines();
        let started = async {
            let mut address = None;
            while let Some(line) = lines.next_line().await? {
                if let Some((_, url)) = line.split_once("listening on http://") {
                    address = Some(url.to_owned());
                }
                if line.contains(until) {
                    return address.context("it serves, and does not listen");
                }
            }
            bail!("the service {told:?} did not start")
        };
        let address = timeout(PATIENCE, started).await.context("the service does not start")??;
        // What it says later is of no interest, and must not be in its way.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { process, address })
    }

    /// The CPU time that it has taken so far.
    pub fn cpu(&self) -> Result<Duration> {
        cpu_of_server(self.process.id().context("it has ended")?)
    }

    /// What it answers to a request, head and body.
    pub async fn get(&self, path: &str, headers: &str) -> Result<String> {
        let mut stream = TcpStream::connect(&self.address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{headers}\r\n", self.address);
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }
}

/// What came of a turn of `wrk`.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub requests: u64,
    pub took: Duration,
    pub p50: Duration,
    pub p99: Duration,
}

impl Load {
    pub fn a_second(&self) -> f64 {
        self.requests as f64 / self.took.as_secs_f64()
    }
}

/// Counts what is wrong, and says what was measured on one line.
const DONE: &str = r#"
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("measured %d %d %d %d %d\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

/// Has one thread with 32 connections ask for this, without a pause. The script may choose the requests.
pub async fn wrk(url: &str, script: &str, seconds: f64) -> Result<Load> {
    let file = env::temp_dir().join(format!("rowcache-bench-{}.lua", std::process::id()));
    fs::write(&file, format!("{script}{DONE}"))?;
    let mut command = Command::new(program("wrk")?);
    command.args(["-t1", "-c32", &format!("-d{}s", seconds.ceil()), "-s"]).arg(&file).arg(url).kill_on_drop(true);
    let output = command.output().await?;
    fs::remove_file(&file)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("measured "));
    let numbers: Vec<u64> = line.into_iter().flat_map(str::split_whitespace).filter_map(|it| it.parse().ok()).collect();
    let [requests, took, p50, p99, wrong] = numbers[..] else {
        bail!("wrk says: {text}{}", String::from_utf8_lossy(&output.stderr))
    };
    ensure!(requests > 0 && wrong == 0, "{wrong} of {requests} requests to {url} went wrong");
    let [took, p50, p99] = [took, p50, p99].map(Duration::from_micros);
    Ok(Load { requests, took, p50, p99 })
}
