//! Runs the program, and `psql` beside it.

use std::{path::PathBuf, process::Stdio};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, ChildStdout, Command},
    time::timeout,
};

use crate::support::{PATIENCE, TestDb, Version, shared_server};

/// The program with these arguments; no variable of whoever runs the tests changes what it does.
pub fn rowcache(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rowcache"));
    command.args(args).env_remove("DATABASE_URL").env_remove("RUST_LOG").stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// The program against this database.
pub fn rowcache_on(url: &str, args: &[&str]) -> Command {
    let mut command = rowcache(args);
    if args.first() == Some(&"demo") {
        // It writes, and does so only where it is told to by name.
        command.args(["--database-url", url]);
    } else {
        command.env("DATABASE_URL", url);
    }
    command
}

/// What a program that has ended has left.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// The output of a program that must have succeeded without a complaint.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self:#?}");
        self.out
    }

    /// Fails unless the program said once what is wrong, and how to cure it.
    #[track_caller]
    pub fn failed_with(&self, wrong: &str, cure: &str) {
        assert_eq!((self.code, self.out.as_str()), (Some(1), ""), "{self:#?}");
        assert_eq!(self.err.matches("error:").count(), 1, "{self:#?}");
        assert_eq!(self.err.matches(wrong).count(), 1, "{wrong:?} must be said once: {self:#?}");
        assert!(self.err.contains(cure), "no {cure:?} in {self:#?}");
        assert!(self.err.lines().count() <= 2, "{self:#?}");
    }
}

/// Runs a program to its end.
pub async fn end(mut command: Command) -> Ended {
    let output = timeout(PATIENCE, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("still runs after {PATIENCE:?}: {command:?}")).expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("output is UTF-8");
    Ended { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}

/// Runs `rowcache` to its end.
pub async fn run(url: &str, args: &[&str]) -> Ended {
    end(rowcache_on(url, args)).await
}

/// The `psql` of this version's server, or another one.
pub async fn psql_path(version: Version) -> PathBuf {
    shared_server(version).await.bin("psql").expect("there is a psql")
}

/// Runs statements as a person would: by `psql`, and each by itself.
pub async fn psql(db: &TestDb, statements: &[&str]) -> String {
    let mut command = Command::new(psql_path(db.version).await);
    // Who terminates several backends may be told that one was faster.
    command.env("PGOPTIONS", "-c client_min_messages=error");
    command.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]);
    command.args(statements.iter().flat_map(|sql| ["--command", sql])).arg(&db.url);
    end(command).await.ok()
}

/// A program that runs, and is read line by line.
pub struct Running {
    pub child: Child,
    out: Lines<BufReader<ChildStdout>>,
    err: BufReader<ChildStderr>,
    /// What has been read so far.
    pub read: Vec<String>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let out = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let err = BufReader::new(child.stderr.take().expect("it is piped"));
        Self { child, out, err, read: Vec::new() }
    }

    /// The next line on stdout; `None` at its end.
    pub async fn line(&mut self) -> Option<String> {
        let line = timeout(PATIENCE, self.out.next_line()).await;
        let line = line.unwrap_or_else(|_| panic!("no line within {PATIENCE:?} after {:#?}", self.read));
        let line = line.expect("stdout can be read");
        self.read.extend(line.clone());
        line
    }

    /// The next line that holds all of these.
    pub async fn line_with(&mut self, parts: &[&str]) -> String {
        while let Some(line) = self.line().await {
            if parts.iter().all(|part| line.contains(part)) {
                return line;
            }
        }
        let err = self.stderr().await;
        panic!("ended without a line with {parts:?}: {:#?}\nstderr: {err}", self.read)
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("it runs");
        kill(Pid::from_raw(pid.try_into().expect("a pid")), signal).expect("it can be signalled");
    }

    async fn stderr(&mut self) -> String {
        let mut err = String::new();
        while timeout(PATIENCE, self.err.read_line(&mut err)).await.expect("stderr ends").expect("it can be read") > 0 {
        }
        err
    }

    /// The next line on stderr that holds this.
    pub async fn error_line_with(&mut self, part: &str) {
        let mut err = String::new();
        while !err.contains(part) {
            let read = timeout(PATIENCE, self.err.read_line(&mut err)).await;
            assert_ne!(read.expect("a line in time").expect("it can be read"), 0, "no {part:?} in {err}");
        }
    }

    /// Waits for its end, and reads the rest.
    pub async fn end(mut self) -> Ended {
        while self.line().await.is_some() {}
        let err = self.stderr().await;
        let status = timeout(PATIENCE, self.child.wait()).await;
        let status =
            status.unwrap_or_else(|_| panic!("still runs, after {:#?}", self.read)).expect("it can be waited for");
        Ended { code: status.code(), out: self.read.join("\n"), err }
    }

    /// Ctrl-C, and what follows.
    pub async fn interrupt(self) -> Ended {
        self.signal(Signal::SIGINT);
        self.end().await
    }
}
