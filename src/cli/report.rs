//! How the program tells its user that something failed: `error:`, every cause once, and below it the cure.

use std::{error::Error as StdError, io, process::ExitCode};

use sqlx::postgres::PgDatabaseError;

/// Tells the user, and says how the process ends.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(is_broken_pipe) {
        // Whoever read our output has seen enough (`| head`).
        return ExitCode::SUCCESS;
    }
    anstream::eprintln!("{}error:{} {}", RED.render(), RED.render_reset(), with_causes(error));
    if let Some(cure) = cure(error) {
        anstream::eprintln!("{}help:{} {cure}", BOLD.render(), BOLD.render_reset());
    }
    ExitCode::FAILURE
}

const BOLD: anstyle::Style = anstyle::Style::new().bold();
const RED: anstyle::Style = anstyle::AnsiColor::Red.on_default().bold();

fn is_broken_pipe(cause: &(dyn StdError + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The chain on one line. Both drivers repeat their cause in their own text; what was said is not said again.
pub(crate) fn with_causes(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain() {
        let server = database_error(cause);
        let text = server.map_or_else(|| cause.to_string(), |server| server.message().to_owned());
        if said.is_empty() {
            said = text;
        } else if !said.contains(&text) {
            said = format!("{said}: {text}");
        }
        if server.is_some() {
            // What lies below is the same, in the driver's words.
            break;
        }
    }
    said
}

fn database_error<'a>(cause: &'a (dyn StdError + 'static)) -> Option<&'a PgDatabaseError> {
    let error = cause.downcast_ref::<sqlx::Error>()?;
    error.as_database_error()?.try_downcast_ref()
}

/// What to do about it. Errors of the library, and ours, say that themselves; this is for what the server says.
fn cure(error: &anyhow::Error) -> Option<String> {
    let server = error.chain().find_map(database_error);
    if let Some(server) = server {
        if let Some(hint) = server.hint() {
            return Some(hint.to_owned());
        }
        let about_us = ["rowcache.", "\"rowcache\""].iter().any(|name| server.message().contains(name));
        return Some(
            match server.code() {
                "3F000" | "42883" | "42P01" if about_us => "run: rowcache migrate up",
                "28P01" | "28000" => "check the user and the password in the database URL",
                "3D000" => "create the database, or name another one in the database URL",
                "42501" => "connect as a role that may do this",
                _ => return None,
            }
            .to_owned(),
        );
    }
    let unreachable = error.chain().any(|cause| matches!(cause.downcast_ref(), Some(sqlx::Error::Io(_))));
    unreachable.then(|| "is Postgres running there? Name it with --database-url, or DATABASE_URL".to_owned())
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn every_cause_is_said_once() {
        let io = io::Error::new(io::ErrorKind::ConnectionRefused, "refused");
        let error = anyhow!(sqlx::Error::Io(io)).context("cannot connect to h:1");
        let text = with_causes(&error);
        assert!(text.starts_with("cannot connect to h:1: "), "{text}");
        assert_eq!(text.matches("refused").count(), 1, "{text}");
        assert!(cure(&error).expect("a cure").contains("--database-url"));
    }
}
