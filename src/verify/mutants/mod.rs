//! Proof that all of this can fail: takes out one protection after another, and sees that something notices.
//!
//! Works on a copy of the tree under `target/mutants`, with a target directory of its own: first every catcher must be green there, and
//! then, with each mutant in turn, red. What does not compile proves nothing, and counts like a mutant that nothing noticed.

mod features;
mod service;
mod table;
mod tier;

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use table::{Catcher, Mutant};

pub(super) const HELP: &str = "\
Examples:
  rowcache-verify mutants                        all of them, which takes up to an hour
  rowcache-verify mutants ticket lease           these
  rowcache-verify mutants --list                 what there is
  rowcache-verify mutants --markdown > docs/mutants.md

It runs in the source tree of rowcache (the working directory), and needs what its tests need.";

#[derive(clap::Args)]
pub(super) struct Options {
    /// Only these. Default: all.
    #[arg(value_name = "MUTANT")]
    names: Vec<String>,
    /// Only says which there are.
    #[arg(long)]
    list: bool,
    /// Prints the table as Markdown, on stdout.
    #[arg(long)]
    markdown: bool,
}

/// A catcher that has not ended after this has caught it: a test that hangs is red.
const PATIENCE: Duration = Duration::from_mins(10);

/// What became of a mutant in the hands of one catcher.
struct Outcome {
    /// The first test that failed; `None`: nothing noticed.
    caught_by: Option<String>,
    took: Duration,
}

fn all() -> impl Iterator<Item = &'static Mutant> {
    table::MUTANTS.iter().chain(features::MUTANTS).chain(service::MUTANTS).chain(tier::MUTANTS)
}

pub(super) fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for mutant in all() {
            println!("{:<24} {}", mutant.name, mutant.protection);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let chosen = choose(&options.names)?;
    let tree = Tree::copy()?;
    for mutant in &chosen {
        ensure!(
            mutant.is_current(&tree.root)?,
            "{}: its text does not stand in {} exactly once",
            mutant.name,
            mutant.file
        );
    }
    let mut seen = HashSet::new();
    for catcher in chosen.iter().flat_map(|mutant| mutant.catchers).filter(|catcher| seen.insert(**catcher)) {
        eprintln!("without a mutant: {}", catcher.name());
        tree.build(*catcher).with_context(|| format!("{} does not compile", catcher.name()))?;
        if let Some(test) = tree.run(*catcher)?.caught_by {
            bail!("{} is red without any mutant ({test})", catcher.name());
        }
    }
    if options.markdown {
        print!("{}", include_str!("head.md"));
    }
    let mut survived = 0;
    for mutant in chosen {
        tree.with(mutant, || {
            for catcher in mutant.catchers {
                let outcome = match tree.build(*catcher) {
                    Ok(()) => tree.run(*catcher)?,
                    Err(error) => {
                        eprintln!("mutant {} does not compile: {error:#}", mutant.name);
                        Outcome { caught_by: None, took: Duration::ZERO }
                    }
                };
                survived += usize::from(outcome.caught_by.is_none());
                tell(mutant, *catcher, &outcome, options.markdown);
            }
            Ok(())
        })?;
    }
    eprintln!("{survived} times a mutant was not noticed");
    Ok(if survived == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn choose(names: &[String]) -> Result<Vec<&'static Mutant>> {
    if names.is_empty() {
        return Ok(all().collect());
    }
    let find = |name: &String| all().find(|mutant| mutant.name == name);
    names.iter().map(|name| find(name).with_context(|| format!("there is no mutant `{name}`; see --list"))).collect()
}

fn tell(mutant: &Mutant, catcher: Catcher, outcome: &Outcome, markdown: bool) {
    let seconds = outcome.took.as_secs_f64();
    let by = outcome.caught_by.as_deref().unwrap_or("NOT NOTICED");
    if markdown {
        println!("| `{}` | {} | `{}` | {} | {by} |", mutant.name, mutant.protection, mutant.file, catcher.name());
    }
    eprintln!("{:<24} {:<60} {by} ({seconds:.1} s)", mutant.name, catcher.name());
}

impl Mutant {
    fn is_current(&self, root: &Path) -> Result<bool> {
        let file = root.join(self.file);
        let source = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        Ok(source.matches(self.text).count() == 1)
    }
}

impl Catcher {
    /// For people.
    fn name(self) -> String {
        match self {
            Self::Unit(of) => format!("unit tests `{of}`"),
            Self::Test(file, "") => format!("`tests/{file}.rs`"),
            Self::Test(file, of) => format!("`tests/{file}.rs`, `{of}`"),
            Self::Schedules(of) => format!("random schedules `{of}`"),
            Self::Orderings(of) => format!("orderings `{of}`"),
            Self::Simulation(seeds) => format!("simulation, {seeds} seeds"),
        }
    }

    fn building(self) -> Vec<&'static str> {
        match self {
            Self::Unit(_) | Self::Test(..) | Self::Schedules(_) | Self::Orderings(_) => {
                [&self.running()[..], &["--no-run"]].concat()
            }
            Self::Simulation(_) => vec!["build", "--all-features", "--bin", "rowcache-verify"],
        }
    }

    /// The program that has the tests of a file, and how their names begin there. Asked of the source tree, and not compiled
    /// in, because then each new file of tests would have all of this compiled anew.
    fn program(file: &'static str) -> (&'static str, String) {
        let main = fs::read_to_string("tests/main.rs").unwrap_or_default();
        if main.contains(&format!("\nmod {file};\n")) { ("it", format!("{file}::")) } else { (file, String::new()) }
    }

    /// `tests/main.rs` with this file alone, if it has it: the whole of it takes minutes to compile, and each mutant would pay them.
    fn alone(self) -> Option<String> {
        let Self::Test(file, _) = self else { return None };
        let main = fs::read_to_string("tests/main.rs").ok()?;
        let (before, modules) = main.split_once("\nmod program;\n")?;
        let wanted = modules.lines().find(|line| *line == format!("mod {file};"))?;
        Some(format!("{before}\nmod program;\n{wanted}\n"))
    }

    /// All tests of a program, if it is one of those with tests on real Postgres: [`Tree::run`] says which of them.
    fn running(self) -> Vec<&'static str> {
        match self {
            Self::Unit(of) | Self::Orderings(of) => vec!["test", "--all-features", "--lib", of],
            Self::Test(file, _) => vec!["test", "--all-features", "--test", Self::program(file).0],
            Self::Schedules(of) => vec!["test", "--profile", "explore", "--lib", of],
            Self::Simulation(seeds) => {
                let simulate = ["--", "simulate", "--seed", "1", "--steps", "6000", "--seeds", seeds];
                [&["run", "--all-features", "--bin", "rowcache-verify"][..], &simulate].concat()
            }
        }
    }
}

/// A copy of the source tree.
struct Tree {
    root: PathBuf,
    targets: PathBuf,
}

impl Tree {
    /// Of what is in the working directory, committed or not. What has not changed since the last copy keeps its time, so that
    /// it need not be compiled again.
    fn copy() -> Result<Self> {
        let here = std::env::current_dir()?;
        let manifest = fs::read_to_string("Cargo.toml").unwrap_or_default();
        ensure!(manifest.contains("name = \"rowcache\""), "{} is not the source tree of rowcache", here.display());
        let home = here.join("target/mutants");
        let tree = Self { root: home.join("tree"), targets: home.join("target") };
        let listed = Command::new("git").args(["ls-files", "--cached", "--others", "--exclude-standard"]).output();
        let listed = listed.context("git is needed, to know which files belong to the tree")?;
        ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr).trim());
        for file in String::from_utf8_lossy(&listed.stdout).lines() {
            let Ok(content) = fs::read(file) else { continue };
            tree.write(file, &content)?;
            fs::set_permissions(tree.root.join(file), fs::metadata(file)?.permissions())?;
        }
        Ok(tree)
    }

    fn write(&self, file: &str, content: &[u8]) -> Result<()> {
        let to = self.root.join(file);
        if fs::read(&to).is_ok_and(|old| old == content) {
            return Ok(());
        }
        fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
        fs::write(&to, content).with_context(|| format!("writing {}", to.display()))
    }

    /// Does something while the mutant is in place.
    fn with(&self, mutant: &Mutant, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let whole = fs::read_to_string(self.root.join(mutant.file))?;
        self.write(mutant.file, whole.replacen(mutant.text, mutant.instead, 1).as_bytes())?;
        let outcome = work();
        self.write(mutant.file, whole.as_bytes())?;
        outcome
    }

    fn cargo(&self, arguments: &[&str], catcher: Catcher) -> Command {
        let mut cargo = Command::new("cargo");
        cargo.args(arguments).current_dir(&self.root);
        // Mutants leave things unused.
        let (flags, target) = match catcher {
            Catcher::Schedules(_) => ("--cfg shuttle -A warnings", "shuttle"),
            Catcher::Unit(_) | Catcher::Test(..) | Catcher::Simulation(_) | Catcher::Orderings(_) => {
                ("-A warnings", "std")
            }
        };
        if let Catcher::Orderings(_) = catcher {
            cargo.env("ROWCACHE_TEST_ATOMICS", "loom");
        }
        cargo.env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", self.targets.join(target)).env("RUST_BACKTRACE", "0");
        cargo
    }

    fn build(&self, catcher: Catcher) -> Result<()> {
        if let Some(main) = catcher.alone() {
            self.write("tests/main.rs", main.as_bytes())?;
        }
        let built = self.cargo(&catcher.building(), catcher).output().context("cargo is needed")?;
        ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Ok(())
    }

    /// The tests of this file whose names contain this, with their full names: a filter would also find those of other files.
    fn tests(&self, catcher: Catcher, file: &'static str, of: &str) -> Result<Vec<String>> {
        let listed = self.cargo(&[&catcher.running()[..], &["--", "--list"]].concat(), catcher).output()?;
        let beginning = Catcher::program(file).1;
        let all = String::from_utf8_lossy(&listed.stdout).into_owned();
        let names = all.lines().filter_map(|line| line.strip_suffix(": test"));
        let is_it = |name: &&str| name.strip_prefix(&*beginning).is_some_and(|name| name.contains(of));
        let names: Vec<_> = names.filter(is_it).map(str::to_owned).collect();
        ensure!(
            !names.is_empty(),
            "{} names no test:\n{all}{}",
            catcher.name(),
            String::from_utf8_lossy(&listed.stderr)
        );
        Ok(names)
    }

    fn run(&self, catcher: Catcher) -> Result<Outcome> {
        let mut arguments = catcher.running();
        let tests = match catcher {
            Catcher::Test(file, of) => self.tests(catcher, file, of)?,
            Catcher::Unit(_) | Catcher::Schedules(_) | Catcher::Orderings(_) | Catcher::Simulation(_) => Vec::new(),
        };
        if !tests.is_empty() {
            arguments.extend(["--", "--exact"]);
            arguments.extend(tests.iter().map(String::as_str));
        }
        let began = Instant::now();
        // `timeout` also ends what cargo has started.
        let cargo = self.cargo(&arguments, catcher);
        let mut limited = Command::new("timeout");
        limited
            .arg(PATIENCE.as_secs().to_string())
            .arg(cargo.get_program())
            .args(cargo.get_args())
            .current_dir(&self.root);
        limited.envs(cargo.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let ended = limited.stdin(Stdio::null()).output().context("`timeout` (coreutils) is needed")?;
        let printed = String::from_utf8_lossy(&ended.stdout);
        let is_run =
            |line: &str| line.starts_with("running ") && !line.starts_with("running 0 ") || line.starts_with("steps ");
        let ran = printed.lines().any(is_run) || ended.status.code() == Some(124);
        ensure!(ran, "{} names no test:\n{printed}{}", catcher.name(), String::from_utf8_lossy(&ended.stderr));
        let failed = printed.lines().find_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
        let seed = printed.lines().find_map(|line| line.strip_prefix("seed ")?.split_once(": ").map(|(seed, _)| seed));
        let caught_by = match failed {
            Some(test) => Some(format!("`{test}`")),
            None if seed.is_some() => seed.map(|seed| format!("seed {seed}")),
            None if ended.status.code() == Some(124) => Some(format!("did not end within {PATIENCE:?}")),
            None if !ended.status.success() => Some("the test program was ended".to_owned()),
            None => None,
        };
        Ok(Outcome { caught_by, took: began.elapsed() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_still_applies() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut names = HashSet::new();
        for mutant in all() {
            assert!(names.insert(mutant.name), "two mutants `{}`", mutant.name);
            assert!(mutant.is_current(root).expect("reads"), "mutant `{}` is out of date", mutant.name);
            assert!(mutant.text != mutant.instead && !mutant.catchers.is_empty(), "mutant `{}`", mutant.name);
            for catcher in mutant.catchers {
                if let Catcher::Test(file, _) = catcher {
                    assert!(
                        root.join(format!("tests/{file}.rs")).is_file(),
                        "mutant `{}`: tests/{file}.rs",
                        mutant.name
                    );
                }
            }
        }
    }
}
