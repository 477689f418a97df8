//! Whom a throw-away Postgres runs as.
//!
//! Postgres refuses to run as root. So when we are root, its programs and files belong to another user: `postgres`
//! where a package has made one, else `nobody`. Otherwise everything runs as who we are.

use std::{
    fs::OpenOptions,
    io::Write as _,
    os::unix::{
        fs::{OpenOptionsExt as _, chown},
        process::CommandExt as _,
    },
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::{Uid, User};

/// The user of a server's processes and files.
#[derive(Clone, Debug)]
pub(super) struct Account {
    /// Whom to become; `None` when we stay who we are.
    user: Option<User>,
}

impl Account {
    pub(super) fn choose() -> Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self { user: None });
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name).with_context(|| format!("cannot look up the user {name}"))? {
                return Ok(Self { user: Some(user) });
            }
        }
        bail!("Postgres does not run as root, and there is neither a user `postgres` nor a user `nobody` to run it as")
    }

    /// Whether this is somebody else than we are.
    pub(super) fn is_other(&self) -> bool {
        self.user.is_some()
    }

    /// A command that runs as this user in `dir`, in a process group of its own, and says nothing on our terminal.
    pub(super) fn command(&self, program: &Path, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(dir).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // No PG* variable of ours may reach the server's programs; their messages are read by us, hence the locale.
        command.env_clear().env("LC_ALL", "C").envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        if let Some(user) = &self.user {
            command.uid(user.uid.into()).gid(user.gid.into());
        }
        command
    }

    /// Gives a file or directory to this user.
    pub(super) fn own(&self, path: &Path) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        chown(path, Some(user.uid.into()), Some(user.gid.into()))
            .with_context(|| format!("cannot give {} to the user {}", path.display(), user.name))
    }

    /// Writes a file that only this user may read (Postgres insists on that for keys).
    pub(super) fn write_private(&self, path: &Path, contents: &str) -> Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        file.and_then(|mut file| file.write_all(contents.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))?;
        self.own(path)
    }

    /// Fails with who cannot enter which directory, and the cure; the programs' own messages do not say.
    pub(super) async fn check_can_enter(&self, dir: &Path, cure: &str) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        let mut enter = self.command(Path::new("/bin/sh"), Path::new("/"));
        enter.args(["-c", "cd \"$0\""]).arg(dir);
        run(enter).await.with_context(|| {
            format!("we are root, the server runs as `{}`, which cannot enter {}: {cure}", user.name, dir.display())
        })
    }
}

/// Runs a program to its end; its output is in the error if it fails.
pub(super) async fn run(command: Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut command = tokio::process::Command::from(command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = command.output().await.with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
