//! A server of a test's own, that it can kill, and a standby of it.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::process::Command;

use tokio_postgres::Config;

pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    settings: String,
}

fn binary(name: &str) -> PathBuf {
    PathBuf::from(std::env::var("ONLYONCE_POSTGRES_BIN").expect("tests/postgres/run sets it")).join(name)
}

/// A command that runs as a user that is not root, which the server rejects.
fn command(name: &str, args: &[&str]) -> Command {
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
    let mut command = match is_root {
        true => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=nobody", "--regid=65534", "--clear-groups", "--"]).arg(binary(name));
            command
        }
        false => Command::new(binary(name)),
    };
    command.args(args).current_dir("/");
    command
}

fn run(name: &str, args: &[&str]) {
    let output = command(name, args).output().unwrap();
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Cluster {
    fn dir(name: &str) -> tempfile::TempDir {
        // Below the directory that tests/postgres/run removes, also if the test is killed.
        let scratch = std::env::var("ONLYONCE_POSTGRES_SCRATCH").unwrap_or_else(|_| "/tmp".to_owned());
        let dir = tempfile::Builder::new().prefix(&format!("{name}.")).tempdir_in(scratch).unwrap();
        // The server's user may not be this one.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(dir.path(), open).unwrap();
        dir
    }

    pub(crate) fn new(name: &str) -> Self {
        let dir = Self::dir(name);
        run("initdb", &["-D", path(&dir.path().join("data")), "-A", "trust", "-U", "postgres", "--no-sync"]);
        Self { dir, settings: String::new() }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn socket(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new();
        config.host_path(self.dir.path()).user("postgres").dbname("postgres");
        config
    }

    pub(crate) fn start(&mut self) {
        let settings = format!(
            "-c listen_addresses= -k {} -c log_min_messages=fatal -c wal_receiver_status_interval=1s {}",
            path(self.dir.path()),
            self.settings
        );
        let log = self.dir.path().join("log");
        run("pg_ctl", &["-D", path(&self.data()), "-l", path(&log), "-w", "-o", &settings, "start"]);
    }

    /// Stops it without a checkpoint, as a crash does.
    pub(crate) fn kill(&mut self) {
        run("pg_ctl", &["-D", path(&self.data()), "-m", "immediate", "-w", "stop"]);
    }

    /// Stops it with a checkpoint.
    pub(crate) fn stop(&mut self) {
        run("pg_ctl", &["-D", path(&self.data()), "-m", "fast", "-w", "stop"]);
    }

    /// A standby of this running server, which is not started yet.
    pub(crate) fn standby(&self, name: &str) -> Self {
        let dir = Self::dir(name);
        let data = dir.path().join("data");
        run(
            "pg_basebackup",
            &["-h", path(self.dir.path()), "-U", "postgres", "-D", path(&data), "-R", "-c", "fast", "--no-sync"],
        );
        Self { dir, settings: String::new() }
    }

    pub(crate) fn promote(&mut self) {
        run("pg_ctl", &["-D", path(&self.data()), "-w", "promote"]);
    }

    /// Commits wait for a standby from now on.
    pub(crate) fn require_standby(&self) {
        self.set("synchronous_standby_names", "*");
    }

    /// Commits wait for no standby from now on, as if a failover manager had found none.
    pub(crate) fn give_up_standby(&self) {
        self.set("synchronous_standby_names", "");
    }

    /// A standby receives nothing from now on.
    pub(crate) fn disconnect(&self) {
        self.set("primary_conninfo", "");
    }

    /// A standby receives from this primary again.
    pub(crate) fn reconnect(&self, primary: &Self) {
        self.set("primary_conninfo", &format!("host={} user=postgres", path(primary.dir.path())));
    }

    fn set(&self, setting: &str, value: &str) {
        let set = format!("ALTER SYSTEM SET {setting} = '{value}'");
        run("psql", &["-h", path(self.dir.path()), "-U", "postgres", "-c", &set, "-c", "SELECT pg_reload_conf()"]);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            // A test that fails has one panic already.
            let _ = command("pg_ctl", &["-D", path(&self.data()), "-m", "immediate", "-w", "stop"]).output();
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
