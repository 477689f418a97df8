//! What it was measured on, and with which versions.

use std::{fs, process::Command, thread};

use serde::{Deserialize, Serialize};

/// Two runs are compared if they have this in common, but for the versions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    pub processors: usize,
    pub memory_gib: u64,
    pub kernel: String,
    /// `rustc 1.95.0`, `PostgreSQL 18.4`, `moka 0.12.16`.
    pub versions: Vec<String>,
}

impl Machine {
    /// This one. `servers` are those that ran.
    pub fn here(servers: &[String]) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: u64 =
            memory.and_then(|text| text.split(' ').next().and_then(|text| text.parse().ok())).unwrap_or_default();
        let mut versions = vec![rustc()];
        versions.extend(servers.iter().cloned());
        versions.extend(crates());
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            processors: thread::available_parallelism().map_or(1, usize::from),
            memory_gib: (kib + (1 << 19)) >> 20,
            kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
            versions,
        }
    }

    /// Whether figures of the two can be compared.
    pub fn is_like(&self, other: &Self) -> bool {
        (&self.processor, self.processors, self.memory_gib) == (&other.processor, other.processors, other.memory_gib)
    }
}

fn rustc() -> String {
    let output = Command::new("rustc").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.split(" (").next().unwrap_or("rustc").trim().to_owned()
}

/// What is compared, by the lock file that this program was built with.
const CRATES: [&str; 11] = [
    "rowcache",
    "quick_cache",
    "moka",
    "foyer-memory",
    "hydracache",
    "dashmap",
    "lru",
    "redis",
    "sqlx",
    "tokio-postgres",
    "axum",
];

fn crates() -> Vec<String> {
    let lock: toml::Value = toml::from_str(include_str!("../Cargo.lock")).expect("a lock file of cargo");
    let packages = lock["package"].as_array().expect("a list of packages");
    let version = |name: &str| {
        let package = packages.iter().find(|package| package["name"].as_str() == Some(name));
        package.and_then(|package| package["version"].as_str()).map(|version| format!("{name} {version}"))
    };
    CRATES.iter().filter_map(|name| version(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_that_is_compared_has_a_version() {
        assert_eq!(crates().len(), CRATES.len(), "{:?}", crates());
    }
}
