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
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: u64 =
            memory.and_then(|text| text.split(' ').next().and_then(|text| text.parse().ok())).unwrap_or_default();
        let mut versions = vec![rustc()];
        versions.extend(servers.iter().cloned());
        versions.extend(crates());
        Self {
            processor: processor(&read("/proc/cpuinfo")),
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

/// What `text` says of `name`, as the kernel writes it: `model name\t: AMD EPYC`.
fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (of, value) = line.split_once(':')?;
        (of.trim() == name).then(|| value.trim().to_owned())
    })
}

/// Virtual machines often have a name in common, whatever they run on. The family and the model tell which it is.
fn processor(cpuinfo: &str) -> String {
    let Some(name) = field(cpuinfo, "model name") else { return std::env::consts::ARCH.to_owned() };
    match (field(cpuinfo, "cpu family"), field(cpuinfo, "model")) {
        (Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        _ => name,
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
    fn processors_of_one_name_are_told_apart() {
        let cpuinfo = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n";
        assert_eq!(processor(cpuinfo), "AMD EPYC (family 25, model 17)");
        assert_eq!(processor("model name\t: Neoverse\n"), "Neoverse");
        assert_eq!(processor(""), std::env::consts::ARCH);
    }

    #[test]
    fn every_crate_that_is_compared_has_a_version() {
        assert_eq!(crates().len(), CRATES.len(), "{:?}", crates());
    }
}
