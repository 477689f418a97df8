//! The demo's screen: who the nodes are, how they fare, and the commits as they reach them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Style, Stylize as _},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Paragraph, Row, Table},
};
use tokio::{sync::mpsc, time::interval};

use super::{
    Invitation,
    board::{Board, Commit, NodeLine},
    nodes::DemoNode,
};
use crate::{
    Status,
    cli::{
        logs,
        text::{millis, number},
        watch::local,
    },
};

/// Between two drawings.
const REDRAW_EVERY: Duration = Duration::from_millis(250);

/// Between two looks at the keyboard, which also bound how long the thread that looks outlives the screen.
const KEYS_EVERY: Duration = Duration::from_millis(100);

/// Lines for the commits of who joins in.
const YOURS_LINES: u16 = 5;

/// The terminal as it was, whatever happens: also a panic restores it, by a hook that `ratatui` installs.
struct Restore(Arc<AtomicBool>);

impl Drop for Restore {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        ratatui::restore();
    }
}

/// Draws until somebody wants to leave.
pub(super) async fn show(board: &Board, nodes: &[Arc<DemoNode>], invitation: &Invitation) -> Result<()> {
    // Before the screen, so that what was kept back is written when the screen is gone.
    let _kept_back = logs::keep_back();
    let mut terminal = ratatui::try_init().context("cannot use the terminal as a screen; try --plain")?;
    let restore = Restore(Arc::default());
    let mut keys = read_keys(Arc::clone(&restore.0));
    let mut ticks = interval(REDRAW_EVERY);
    loop {
        let lines = board.nodes(nodes.iter().map(|node| node.now()));
        let commits = board.commits_from(0);
        terminal.draw(|frame| View { board, invitation, nodes: &lines, commits: &commits }.draw(frame))?;
        tokio::select! {
            _ = ticks.tick() => {}
            key = keys.recv() => match key {
                Some(Key::Leave) | None => return Ok(()),
                Some(Key::Redraw) => {}
            },
        }
    }
}

enum Key {
    Leave,
    Redraw,
}

/// A thread, because the terminal can only be waited for by blocking.
fn read_keys(end: Arc<AtomicBool>) -> mpsc::Receiver<Key> {
    let (sender, keys) = mpsc::channel(16);
    std::thread::spawn(move || {
        while !end.load(Relaxed) {
            let event = match event::poll(KEYS_EVERY) {
                Ok(true) => event::read(),
                Ok(false) => continue,
                Err(error) => Err(error),
            };
            let key = match event {
                Ok(Event::Key(key)) if key.kind == KeyEventKind::Release => continue,
                Ok(Event::Key(key)) => match key.code {
                    KeyCode::Char('q' | 'Q') | KeyCode::Esc => Key::Leave,
                    // The terminal does not turn it into a signal while the screen is up.
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::Leave,
                    _ => continue,
                },
                Ok(Event::Resize(..)) => Key::Redraw,
                Ok(_) => continue,
                // The terminal is gone.
                Err(_) => Key::Leave,
            };
            if sender.blocking_send(key).is_err() {
                return;
            }
        }
    });
    keys
}

struct View<'a> {
    board: &'a Board,
    invitation: &'a Invitation,
    nodes: &'a [NodeLine],
    commits: &'a [Commit],
}

impl View<'_> {
    fn draw(&self, frame: &mut Frame<'_>) {
        let invitation = self.invitation.lines();
        let heights = [
            Constraint::Length(1),
            Constraint::Length(u16::try_from(invitation.len()).unwrap_or(4)),
            Constraint::Length(u16::try_from(self.nodes.len() + 2).unwrap_or(5)),
            Constraint::Length(YOURS_LINES),
            Constraint::Fill(1),
            Constraint::Length(1),
        ];
        let [title, join, nodes, yours, others, foot] = Layout::vertical(heights).areas(frame.area());
        frame.render_widget(self.title(), title);
        let invitation: Vec<_> = invitation.into_iter().map(|line| Line::from(line).cyan()).collect();
        frame.render_widget(Paragraph::new(invitation), join);
        self.draw_nodes(frame, nodes);
        let (for_you, for_all): (Vec<_>, Vec<_>) = self.commits.iter().rev().partition(|commit| commit.yours);
        self.draw_commits(frame, yours, " your changes to the table, newest first ", &for_you);
        self.draw_commits(frame, others, " the writers' changes to the table ", &for_all);
        let commits = number(self.board.commits.load(Relaxed));
        let writers = || format!("q leaves   writers: {}, {commits} commits", self.invitation.writers);
        let trouble = self.board.trouble().map(|trouble| Line::from(format!("q leaves   {trouble}")).red());
        let foot_text = trouble.unwrap_or_else(|| Line::from(writers()).dim());
        frame.render_widget(foot_text, foot);
    }

    fn title(&self) -> Paragraph<'_> {
        let seconds = self.board.started.elapsed().as_secs();
        let stale = self.board.findings.stale.load(Relaxed) > 0;
        let checks = Span::from(self.board.checks());
        Paragraph::new(Line::from_iter([
            Span::from("rowcache demo").bold(),
            format!("   {} rows   {:02}:{:02}   ", number(self.invitation.rows), seconds / 60, seconds % 60).into(),
            if stale { checks.red().bold() } else { checks.green() },
        ]))
    }

    fn draw_nodes(&self, frame: &mut Frame<'_>, area: Rect) {
        let head = ["node", "entries", "hits", "misses", "hit %", "invalid.", "p50", "p99", "max ms", "status"];
        let widths = [4, 8, 11, 9, 6, 8, 5, 5, 6];
        let widths = widths.map(Constraint::Length).into_iter().chain([Constraint::Fill(1)]);
        let rows = self.nodes.iter().enumerate().map(|(n, node)| {
            let latency = |of: fn(&super::board::Latency) -> Duration| millis1(node.latency.as_ref().map(of));
            let (status, style) = match &node.status {
                Status::Coherent { .. } => ("coherent".to_owned(), Style::new().green()),
                Status::Bypassed { why, .. } => (format!("bypassed: {why}"), Style::new().red()),
            };
            Row::new([
                right((n + 1).to_string()),
                right(number(node.stats.entries)),
                right(number(node.stats.hits)),
                right(number(node.stats.misses)),
                right(node.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.2}", ratio * 100.0))),
                right(number(node.stats.invalidations)),
                right(latency(|it| it.p50)),
                right(latency(|it| it.p99)),
                right(latency(|it| it.max)),
                Cell::from(status).style(style),
            ])
        });
        let head = head.map(|name| if name == "status" { Cell::from(name) } else { right(name.to_owned()) });
        let block = Block::new().borders(Borders::TOP).title(" nodes; commit to evicted over the last minute ");
        frame.render_widget(Table::new(rows, widths).header(Row::new(head).dim()).block(block), area);
    }

    fn draw_commits(&self, frame: &mut Frame<'_>, area: Rect, title: &'static str, commits: &[&Commit]) {
        let keys_width = usize::from(area.width).saturating_sub(12 + 10 + 5 + 9 + 5);
        let widths = [12, 10, 5, 9].map(Constraint::Length).into_iter().chain([Constraint::Fill(1)]);
        let rows = commits.iter().take(area.height.into()).map(|commit| {
            let nodes = format!("{}/{}", commit.nodes(), self.nodes.len());
            Row::new([
                Cell::from(local(commit.at)),
                Cell::from(commit.xid.map_or_else(|| "-".to_owned(), |xid| format!("xid {xid}"))),
                right(nodes),
                right(format!("{} ms", millis(commit.latency))),
                Cell::from(commit.rows(keys_width)),
            ])
        });
        let block = Block::new().borders(Borders::TOP).title(title);
        frame.render_widget(Table::new(rows, widths).block(block), area);
    }
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned())
}

/// `0.4`; columns are narrow.
fn millis1(latency: Option<Duration>) -> String {
    latency.map_or_else(|| "-".to_owned(), |latency| format!("{:.1}", latency.as_secs_f64() * 1000.0))
}
