//! The torture run: finds nothing where nothing is wrong, and leaves nothing behind.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn torture(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rowcache-verify"));
    command.arg("torture").args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The processes that this one has started. Each is listed under the thread that did.
fn children(of: &Child) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", of.id())).into_iter().flatten().flatten();
    let listed = threads.map(|thread| std::fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    listed.flat_map(|pids| numbers(&pids)).collect()
}

fn numbers(text: &str) -> Vec<i32> {
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let mut run = torture(&["--episodes", "2", "--seed", "1", "--nodes", "3", "--faults", "calm,terminate"]);
    let output = run.output().expect("runs");
    let (out, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{told}");
    assert!(out.contains("nothing found in 2 episodes, seed 1"), "{out}");
    for what in ["0 violations", "terminate", "rules tried", "Quiet", "Applied"] {
        assert!(told.contains(what), "{what}: {told}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_run_that_is_interrupted_leaves_no_process() {
    let mut run = torture(&["--minutes", "5", "--faults", "calm"]).spawn().expect("starts");
    let mut told = BufReader::new(run.stderr.take().expect("piped")).lines();
    // After the first episode all that it ever starts has been started.
    let line =
        told.find(|line| line.as_ref().is_ok_and(|line| line.contains(" reads"))).expect("an episode").expect("text");
    assert!(line.contains("0 violations"), "{line}");
    let started = children(&run);
    assert!(started.len() >= 5, "nodes, a server and its watchdog: {started:?}");
    kill(Pid::from_raw(i32::try_from(run.id()).expect("a pid")), Signal::SIGINT).expect("interrupts");
    let ended = run.wait().expect("ends");
    assert_eq!(ended.code(), Some(130));
    for pid in started {
        assert!(kill(Pid::from_raw(pid), None).is_err(), "process {pid} is still there");
    }
}

#[test]
fn a_fault_that_there_is_not_is_named_with_those_that_there_are() {
    let output = torture(&["--faults", "earthquake"]).output().expect("runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(told.contains("`earthquake`") && told.contains("promote"), "{told}");
}
