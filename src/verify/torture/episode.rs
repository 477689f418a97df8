//! One episode: load, a fault, its end, rest, comparison, check.

use std::{
    fs,
    io::{BufWriter, Write as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::{Rng as _, rngs::StdRng};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    super::{
        checker::{self, Promises, Violation},
        history::{History, NodeId},
    },
    Options,
    faults::{Done, Fault},
    nodes::{Nodes, Notes},
    notes::{self, Base},
    tally::Tally,
    timeline::Incidents,
    wire::{Counts, LEASE, LOAD_TIMEOUT, Order, PATIENCE, Quiet, RawNote, nanos},
    world::World,
    writer,
};

/// Besides the nodes' own.
const WRITERS: u64 = 4;

/// Reads may miss what became visible within a lease, or within a load that they share while there is none; and the machine is busy.
const STALENESS_BOUND: Duration = LEASE.saturating_add(LOAD_TIMEOUT).saturating_add(Duration::from_millis(500));

/// Memory of one node that would mean that something grows without bound. The tables have some 200 rows.
const MEMORY_MAX: u64 = 400 << 20;

/// Violations that are printed.
const PRINTED: usize = 3;

pub(super) struct Run {
    // In this order they end.
    nodes: Nodes,
    world: World,
    base: Base,
    /// Counters of the nodes at the end of the last episode.
    counted: Vec<(NodeId, Counts)>,
    pub(super) tally: Tally,
    /// Logs of the nodes; kept with the notes of what was found.
    directory: tempfile::TempDir,
    notes_in: PathBuf,
    began: Instant,
}

impl Run {
    pub(super) async fn start(options: &Options, seed: u64) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("rowcache-torture-").tempdir()?;
        let world = World::new(options.postgres_bin.clone(), options.log).await?;
        eprintln!("Postgres {}, {} nodes, seed {seed}", world.server.version(), options.nodes);
        let nodes = Nodes::start(options.nodes, &world, directory.path(), seed).await?;
        let notes_in = options.notes.clone().unwrap_or_else(std::env::temp_dir);
        let (counted, tally) = Default::default();
        let mut run =
            Self { nodes, world, base: Base::new(), counted, tally, directory, notes_in, began: Instant::now() };
        let client = run.world.client().await?;
        let survivors = run.world.survivors(&client).await?;
        run.base = notes::base(&run.world.timeline, run.world.server.port(), &survivors);
        run.world.learn_incarnation(&client).await?;
        Ok(run)
    }

    /// Plays one; returns what was found.
    pub(super) async fn episode(&mut self, fault: Fault, seed: u64, rng: &mut StdRng) -> Result<Option<String>> {
        *self.nodes.notebook.open() = Notes::default();
        self.world.timeline.incidents = Incidents::default();
        let done = self.load(fault, rng).await?;
        self.nodes.stop().await?;
        // A node that has lost its server puts the canary of the next one in place.
        let quiet = self.nodes.quiet().await?;
        let client = self.world.until_ready().await?;
        self.world.learn_incarnation(&client).await?;
        let survivors = self.world.survivors(&client).await?;
        let notes = std::mem::take(&mut *self.nodes.notebook.open());
        let lines_lost = count_lines(&notes);
        self.tally.note_reads(&notes);
        let (history, mut wrong) =
            notes::history(notes, &quiet, &self.world.timeline, &survivors, &mut self.base, self.world.log_only);
        self.tally.note_writes(&history.writes);
        let report = checker::check(&history, Promises { staleness_bound: nanos(STALENESS_BOUND) });
        wrong.extend(quiet.iter().flat_map(|(id, quiet)| quiet.wrong.iter().map(move |it| format!("node {id}: {it}"))));
        wrong.extend(self.nodes.lively().await?);
        let counts = self.count(&quiet, &mut wrong);
        let visible = done.is_visible(&counts, lines_lost > 0);
        self.tally.episodes += 1;
        self.tally.lines_lost += lines_lost;
        let (survived, seen) = self.tally.faults.entry(fault).or_default();
        *survived += 1;
        *seen += u64::from(visible);
        self.tally.wrong += wrong.len() as u64;
        eprintln!(
            "{:>5} s  seed {seed:<10} {fault:<16} {:>7} reads, {:>5} writes, {} violations{}  {}",
            self.began.elapsed().as_secs(),
            report.reads,
            history.writes.len(),
            report.violated + wrong.len() as u64,
            if visible { "" } else { ", left no mark" },
            done.what,
        );
        let found =
            (report.violated > 0 || !wrong.is_empty()).then(|| self.found(seed, &report.violations, &wrong, &history));
        self.tally.report.absorb(report);
        self.world.former = None;
        found.transpose()
    }

    /// Writers and readers at work, and the fault.
    async fn load(&mut self, fault: Fault, rng: &mut StdRng) -> Result<Done> {
        let mut writers = JoinSet::new();
        let (told, mut attempts) = mpsc::channel(1024);
        self.world.open();
        for _ in 0..WRITERS {
            writers.spawn(writer::write(rng.random(), self.world.origin, self.world.phase.subscribe(), told.clone()));
        }
        drop(told);
        let notebook = self.nodes.notebook.clone();
        let noting = tokio::spawn(async move {
            while let Some(attempt) = attempts.recv().await {
                notebook.open().attempts.push(attempt);
            }
        });
        self.nodes.order(&Order::Go { panics: fault.panics(), storm: fault == Fault::Storm }).await?;
        sleep(Duration::from_millis(rng.random_range(300..900))).await;
        let done = fault.strike(&mut self.world, &mut self.nodes, rng).await?;
        sleep(Duration::from_millis(rng.random_range(300..1500))).await;
        self.world.stop_writers();
        let ended = async {
            while writers.join_next().await.is_some() {}
            noting.await
        };
        timeout(PATIENCE, ended).await.context("a writer does not end")??;
        Ok(done)
    }

    /// Adds up what the nodes counted since the last episode, and holds it against the bounds.
    fn count(&mut self, quiet: &[(NodeId, Quiet)], wrong: &mut Vec<String>) -> Counts {
        let mut all = Counts::default();
        for (id, quiet) in quiet {
            let before = self.counted.iter().find(|(of, _)| of == id).map(|(_, counts)| *counts).unwrap_or_default();
            all.add(&quiet.counts.since(&before));
            let memory = quiet.counts.memory;
            if memory > MEMORY_MAX {
                wrong.push(format!("node {id} takes {} MiB", memory >> 20));
            }
            self.tally.memory_max = self.tally.memory_max.max(memory);
            self.tally.recovery_max = self.tally.recovery_max.max(quiet.recovered);
        }
        self.counted = quiet.iter().map(|(id, quiet)| (*id, quiet.counts)).collect();
        self.tally.counts.add(&all);
        all
    }

    /// What the nodes have said on stderr.
    pub(super) fn logs(&self) -> String {
        let mut text = String::new();
        for log in fs::read_dir(self.directory.path()).into_iter().flatten().flatten() {
            let said = fs::read_to_string(log.path()).unwrap_or_default();
            if !said.is_empty() {
                text += &format!("{}:\n{said}\n", log.file_name().display());
            }
        }
        text
    }

    /// Saves the notes; returns what is printed.
    fn found(&self, seed: u64, violations: &[Violation], wrong: &[String], history: &History) -> Result<String> {
        let file = self.notes_in.join(format!("rowcache-torture-{seed}.txt"));
        let mut out =
            BufWriter::new(fs::File::create(&file).with_context(|| format!("cannot write {}", file.display()))?);
        for violation in violations {
            writeln!(out, "{violation}")?;
        }
        for wrong in wrong {
            writeln!(out, "{wrong}")?;
        }
        for write in &history.writes {
            writeln!(out, "{write:?}")?;
        }
        for note in &history.notes {
            writeln!(out, "{note:?}")?;
        }
        for read in &history.reads {
            writeln!(out, "{read:?}")?;
        }
        writeln!(out, "{}", self.logs())?;
        out.flush()?;
        let mut text = String::new();
        // The shortest stories first.
        let mut stories: Vec<_> = violations.iter().collect();
        stories.sort_by_key(|violation| violation.story.len());
        for violation in stories.iter().take(PRINTED) {
            text += &format!("{violation}\n");
        }
        for wrong in wrong.iter().take(PRINTED) {
            text += &format!("{wrong}\n");
        }
        Ok(text + &format!("notes: {}", file.display()))
    }
}

fn count_lines(notes: &Notes) -> u64 {
    notes.notes.iter().filter(|(.., note)| matches!(note, RawNote::LineLost)).count() as u64
}
