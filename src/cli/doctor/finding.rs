//! What was found: severity, a stable code, what, why it matters, and what cures it; and how that is printed.

use std::{collections::BTreeMap, io::Write as _, process::ExitCode};

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use serde::Serialize;

/// How bad it is. The process ends with the worst of them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// Looked at, and as it should be.
    Ok,
    /// Worth knowing; nothing has to be done.
    Note,
    /// Costs time, or will be an error one day.
    Warning,
    /// The cache cannot work, or a write can go unseen.
    Error,
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    /// Stays the same from release to release, for scripts.
    code: &'static str,
    severity: Severity,
    /// The table, role, setting or session it is about.
    about: Option<String>,
    what: String,
    why: Option<String>,
    cure: Option<String>,
    /// What was measured, by name and unit.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    figures: BTreeMap<&'static str, f64>,
}

impl Finding {
    pub(super) fn new(severity: Severity, code: &'static str, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { code, severity, about: None, what, why: None, cure: None, figures: BTreeMap::new() }
    }

    pub(super) fn ok(code: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Ok, code, what)
    }

    pub(super) fn note(code: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Note, code, what)
    }

    pub(super) fn warning(code: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Warning, code, what)
    }

    pub(super) fn error(code: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Error, code, what)
    }

    pub(super) fn about(mut self, name: impl Into<String>) -> Self {
        self.about = Some(name.into());
        self
    }

    pub(super) fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    pub(super) fn cure(mut self, cure: impl Into<String>) -> Self {
        self.cure = Some(cure.into());
        self
    }

    /// Rounded to thousandths.
    pub(super) fn figure(mut self, name: &'static str, value: f64) -> Self {
        self.figures.insert(name, (value * 1000.0).round() / 1000.0);
        self
    }

    /// Without line breaks and escape sequences: names come from whoever may create a role or open a session.
    fn line(&self) -> String {
        let (word, style) = match self.severity {
            Severity::Ok => ("ok", GOOD),
            Severity::Note => ("note", NOTE),
            Severity::Warning => ("warning", WARNING),
            Severity::Error => ("error", BAD),
        };
        let mut line = format!("{style}{word:7}{style:#}  {}", printable(&self.what));
        if let Some(why) = &self.why {
            line += &format!("; {}", printable(why));
        }
        if let Some(cure) = &self.cure {
            line += &format!("; {CURE}cure:{CURE:#} {}", printable(cure));
        }
        line + &format!("  {DIM}[{}]{DIM:#}", self.code)
    }
}

const DIM: Style = Style::new().dimmed();
const CURE: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const NOTE: Style = AnsiColor::Cyan.on_default();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// All that was found.
#[derive(Debug, Default)]
pub(super) struct Report(Vec<Finding>);

impl Report {
    pub(super) fn push(&mut self, finding: Finding) {
        self.0.push(finding);
    }

    /// Whether this code was found, in whatever severity.
    pub(super) fn has(&self, code: &str) -> bool {
        self.0.iter().any(|finding| finding.code == code)
    }

    /// The worst first; what is equally bad stays in the order in which it was looked at.
    pub(super) fn print(mut self, json: bool) -> Result<ExitCode> {
        self.0.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        let mut out = anstream::stdout().lock();
        if json {
            writeln!(out, "{}", serde_json::to_string_pretty(&self.0)?)?;
        } else {
            for finding in &self.0 {
                writeln!(out, "{}", finding.line())?;
            }
            writeln!(out, "\n{}", self.summary())?;
        }
        Ok(self.exit())
    }

    fn summary(&self) -> String {
        let count = |severity| self.0.iter().filter(|finding| finding.severity == severity).count();
        let counted = |severity, one: &str| match count(severity) {
            1 => format!("1 {one}"),
            n => format!("{n} {one}s"),
        };
        let [errors, warnings] = [counted(Severity::Error, "error"), counted(Severity::Warning, "warning")];
        format!("{errors}, {warnings}, {}, {} ok", counted(Severity::Note, "note"), count(Severity::Ok))
    }

    fn exit(&self) -> ExitCode {
        match self.0.iter().map(|finding| finding.severity).max() {
            Some(Severity::Error) => ExitCode::from(super::EXIT_ERROR),
            Some(Severity::Warning) => ExitCode::from(super::EXIT_WARNING),
            _ => ExitCode::SUCCESS,
        }
    }
}

/// Up to five names, and how many more there are.
pub(super) fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// `2 min`, `40 s`.
pub(super) fn age(seconds: f64) -> String {
    if seconds < 120.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_whatever_names_are_in_it() {
        let finding = Finding::error("x.y", "role \"a\nb\u{1b}[31m\"").why("because").cure("do it");
        let line = anstream::adapter::strip_str(&finding.line()).to_string();
        assert_eq!(line, "error    role \"a b [31m\"; because; cure: do it  [x.y]");
    }

    #[test]
    fn the_worst_decides_how_it_ends() {
        let ends = |findings: Vec<Finding>| format!("{:?}", Report(findings).exit());
        let code = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(ends(vec![Finding::ok("a", "")]), code(0));
        assert_eq!(ends(vec![Finding::ok("a", ""), Finding::note("b", "")]), code(0));
        assert_eq!(ends(vec![Finding::warning("a", ""), Finding::note("b", "")]), code(1));
        assert_eq!(ends(vec![Finding::note("b", ""), Finding::error("a", ""), Finding::warning("c", "")]), code(2));
    }

    #[test]
    fn many_names_are_counted() {
        let names: Vec<_> = (0..7).map(|n| n.to_string()).collect();
        assert_eq!(some_of(&names), "0, 1, 2, 3, 4 and 2 more");
        assert_eq!(some_of(&names[..2]), "0, 1");
    }
}
