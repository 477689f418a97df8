//! Sees everything that one test logs, on all threads of its runtime.
//!
//! Not a global subscriber: tests of one process run side by side, and each must see its own lines only. Each thread of a
//! test's runtime installs the test's collector for itself when it starts.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    sync::{Arc, Mutex},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{Layer, Registry, layer::Context, layer::SubscriberExt as _};

/// One logged line.
#[derive(Clone, Debug)]
pub struct Line {
    pub level: Level,
    /// The module it comes from.
    pub target: String,
    /// The message, then every field as `name=value`.
    pub text: String,
}

/// The lines of one test, oldest first. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Logs(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    lines: Mutex<Vec<Line>>,
    /// Parts of lines that may be logged as WARN or ERROR.
    allowed: Mutex<Vec<String>>,
}

thread_local! {
    static GUARD: RefCell<Option<DefaultGuard>> = const { RefCell::new(None) };
}

impl Logs {
    /// Announces a WARN or ERROR: lines that contain `part` are no failure.
    pub fn allow(&self, part: &str) {
        self.0.allowed.lock().unwrap().push(part.to_owned());
    }

    /// All lines that contain `part`, of whatever level.
    pub fn containing(&self, part: &str) -> Vec<Line> {
        self.0.lines.lock().unwrap().iter().filter(|line| line.text.contains(part)).cloned().collect()
    }

    /// This crate's lines of WARN and ERROR.
    pub fn alarms(&self) -> Vec<Line> {
        let lines = self.0.lines.lock().unwrap();
        // Others' too would make a slow machine a failure: sqlx warns about statements that take a second.
        lines.iter().filter(|line| line.level <= Level::WARN && line.target.starts_with("rowcache")).cloned().collect()
    }

    /// Fails on every WARN and ERROR of this crate that was not announced.
    pub fn assert_nothing_unexpected(&self) {
        let allowed = self.0.allowed.lock().unwrap();
        let unexpected: Vec<_> =
            self.alarms().into_iter().filter(|line| !allowed.iter().any(|part| line.text.contains(part))).collect();
        assert!(unexpected.is_empty(), "unexpected alarms: {unexpected:#?}");
    }

    /// Collects what this thread logs, until the guard is dropped.
    #[must_use]
    pub fn witness_this_thread(&self) -> DefaultGuard {
        tracing::subscriber::set_default(Registry::default().with(self.clone()))
    }

    /// The same, until the thread ends.
    pub fn witness_this_thread_for_good(&self) {
        GUARD.with(|guard| *guard.borrow_mut() = Some(self.witness_this_thread()));
    }
}

impl fmt::Display for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.0.lines.lock().unwrap().iter() {
            writeln!(f, "{:5} {}: {}", line.level, line.target, line.text)?;
        }
        Ok(())
    }
}

impl<S: Subscriber> Layer<S> for Logs {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        // The drivers' own DEBUG and TRACE lines are many and say nothing about this crate.
        metadata.target().starts_with("rowcache") || *metadata.level() <= Level::INFO
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        let line = Line {
            level: *metadata.level(),
            target: metadata.target().to_owned(),
            text: format!("{}{}", text.message, text.fields),
        };
        self.0.lines.lock().unwrap().push(line);
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
        written.expect("writing to a String cannot fail");
    }
}
