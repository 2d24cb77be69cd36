//! Redis: a server process that runs during the benchmark.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use redis::{Client, Connection, Pipeline, Value};

use crate::keys::Key;
use crate::machine;
use crate::subject::{Durability, Setup, Subject};

pub const PROGRAM: &str = "redis-server";

/// The number of commands in one write to the server.
const PIPELINE: usize = 64;

/// How long the server remembers a key, in seconds.
const WINDOW_S: u64 = 24 * 60 * 60;

pub struct Redis {
    client: Client,
    /// Idle connections.
    idle: Mutex<Vec<Connection>>,
    server: Server,
}

/// The running servers. An early exit of the process must stop them.
static RUNNING: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Stops every server.
pub fn stop_all() {
    if let Ok(mut running) = RUNNING.lock() {
        running.drain(..).for_each(stop);
    }
}

fn stop(mut server: Child) {
    // The server has no data to keep, and may have exited already.
    let _ = server.kill();
    let _ = server.wait();
}

/// The process id of a server, which is stopped on drop.
struct Server(u32);

impl Server {
    fn start(mut command: Command) -> Result<Self> {
        let server = command.spawn().context("redis-server does not start")?;
        let id = server.id();
        RUNNING.lock().map_err(|_| anyhow!("another thread panicked"))?.push(server);
        Ok(Self(id))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(mut running) = RUNNING.lock()
            && let Some(at) = running.iter().position(|server| server.id() == self.0)
        {
            stop(running.swap_remove(at));
        }
    }
}

impl Redis {
    pub fn start(setup: &Setup) -> Result<Self> {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let everysec_or_always = match setup.durability {
            Durability::Process => "everysec",
            Durability::Disk => "always",
        };
        let mut command = Command::new(PROGRAM);
        command
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", ""])
            .args(["--appendonly", "yes", "--appendfsync", everysec_or_always, "--dir"])
            .arg(setup.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = Server::start(command)?;
        let client = Client::open(format!("redis://127.0.0.1:{port}/"))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        let first = loop {
            match client.get_connection() {
                Ok(connection) => break connection,
                Err(error) if Instant::now() > deadline => return Err(error).context("redis-server does not answer"),
                Err(_) => {}
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Ok(Self { client, idle: Mutex::new(vec![first]), server })
    }

    fn connection(&self) -> Result<Connection> {
        let idle = self.idle.lock().map_err(|_| anyhow!("another thread panicked"))?.pop();
        Ok(match idle {
            Some(connection) => connection,
            None => self.client.get_connection()?,
        })
    }

    fn give_back(&self, connections: impl IntoIterator<Item = Connection>) -> Result<()> {
        self.idle.lock().map_err(|_| anyhow!("another thread panicked"))?.extend(connections);
        Ok(())
    }

    /// Sends a command per key and returns the number of positive answers. Two connections alternate, so that the server works on
    /// the next pipeline while the answers of the last one are read.
    fn ask(&self, keys: &[Key], command: impl Fn(&mut Pipeline, &Key)) -> Result<usize> {
        let ways = if keys.len() > PIPELINE { 2 } else { 1 };
        let mut connections = (0..ways).map(|_| self.connection()).collect::<Result<Vec<_>>>()?;
        let mut pending = vec![0; ways];
        let mut yes = 0;
        for (number, keys) in keys.chunks(PIPELINE).enumerate() {
            let way = number % ways;
            yes += answers(&mut connections[way], &mut pending[way])?;
            let mut pipeline = redis::pipe();
            for key in keys {
                command(&mut pipeline, key);
            }
            connections[way].send_packed_command(&pipeline.get_packed_pipeline())?;
            pending[way] = keys.len();
        }
        for (connection, pending) in connections.iter_mut().zip(&mut pending) {
            yes += answers(connection, pending)?;
        }
        self.give_back(connections)?;
        Ok(yes)
    }
}

fn answers(connection: &mut Connection, pending: &mut usize) -> Result<usize> {
    let mut yes = 0;
    for _ in 0..std::mem::take(pending) {
        match connection.recv_response()? {
            Value::Okay | Value::Int(1) => yes += 1,
            Value::Nil | Value::Int(0) => {}
            other => bail!("redis answered {other:?}"),
        }
    }
    Ok(yes)
}

impl Subject for Redis {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        self.ask(keys, |pipeline, key| {
            pipeline.cmd("SET").arg(&key[..]).arg(result).arg("NX").arg("EX").arg(WINDOW_S);
        })
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        self.ask(keys, |pipeline, key| {
            pipeline.cmd("EXISTS").arg(&key[..]);
        })
    }

    fn finish_background_work(&self) -> Result<()> {
        Ok(())
    }

    fn memory_bytes(&self) -> Option<u64> {
        let mut connection = self.connection().ok()?;
        let info: String = redis::cmd("INFO").arg("memory").query(&mut connection).ok()?;
        self.give_back([connection]).ok()?;
        info.lines().find_map(|line| line.strip_prefix("used_memory:"))?.trim().parse().ok()
    }

    fn bytes_written(&self) -> Result<u64> {
        machine::bytes_dirtied_by(self.server.0)
    }

    fn cpu_s(&self) -> Result<f64> {
        Ok(machine::cpu_s("self")? + machine::cpu_s(&self.server.0.to_string())?)
    }
}
