//! `onlyonce get` and `stats`: what a store holds, for people and tools.

use std::io::{ErrorKind, Write};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use humantime::{format_duration, format_rfc3339_millis};
use indicatif::{HumanBytes, HumanCount};
use onlyonce::{Completed, Phase, Prior, Stats, Stored};
use serde_json::{Map, Value, json};

use crate::named_key::{NamedKey, hex};
use crate::{NOTHING, args, opening};

/// Prints what is stored of a key.
pub(crate) fn get(args: &args::Get) -> anyhow::Result<u8> {
    let named = NamedKey::of(args)?;
    let key = named.key();
    let store = opening::existing(&args.store)?;
    let stored = store.get(&key)?;
    store.close()?;
    let Some(stored) = stored else {
        let hint = if args.content || args.json {
            ""
        } else {
            "; a line that was filtered without --key is found with --content"
        };
        let _ = writeln!(std::io::stderr(), "onlyonce: nothing is stored of {key}{hint}");
        return Ok(NOTHING);
    };
    print(&harmless(&Value::Object(described(&named, &stored))))?;
    Ok(0)
}

/// Prints the figures of a store. What the library counts from the opening on would always be zero here, and its
/// filters are only being rebuilt: both are left out.
pub(crate) fn stats(args: &args::Stats) -> anyhow::Result<u8> {
    let store = opening::existing(&args.store)?;
    let stats = store.stats();
    store.close()?;
    if args.json {
        print(&figures(&stats).to_string())?
    } else {
        print(&lines(&stats))?
    }
    Ok(0)
}

fn described(named: &NamedKey, stored: &Stored) -> Map<String, Value> {
    let mut members = named.members();
    let described = match stored {
        Stored::Completed(completed) => {
            let (form, result) = result(completed);
            json!({
                "state": "completed",
                "completed_at": time(completed.completed_at_ms()),
                "completed_at_ms": completed.completed_at_ms(),
                "token": completed.token(),
                "result_form": form,
                "result": result,
            })
        }
        Stored::Processing { token, attempt, phase, .. } => {
            let (phase, prior, remaining) = match *phase {
                Phase::Leased(remaining) => ("leased", None, Some(remaining)),
                Phase::Backoff(remaining, prior) => ("backoff", Some(prior), Some(remaining)),
                Phase::Free(prior) => ("free", Some(prior), None),
                Phase::Held(prior) => ("held", Some(prior), None),
            };
            json!({
                "state": "processing",
                "token": token,
                "attempt": attempt,
                "phase": phase,
                "prior": prior.map(prior_name),
                "remaining_ms": remaining.map(millis),
            })
        }
        _ => json!({ "state": "unknown to this version" }),
    };
    if let Value::Object(described) = described {
        members.extend(described);
    }
    members
}

/// A value as JSON that does nothing to a terminal: the control characters that JSON lets stand, which can only be in its
/// text, are escaped as well.
fn harmless(value: &Value) -> String {
    let mut text = String::new();
    for char in value.to_string().chars() {
        if char.is_control() {
            text.push_str(&format!("\\u{:04x}", u32::from(char)));
        } else {
            text.push(char);
        }
    }
    text
}

/// How the result is given, and the result.
fn result(completed: &Completed) -> (&'static str, Value) {
    match completed.result() {
        None if completed.is_omitted() => ("omitted", Value::Null),
        None => ("none", Value::Null),
        Some(bytes) => match str::from_utf8(bytes) {
            Ok(text) => ("text", text.into()),
            Err(_) => ("hex", hex(bytes).into()),
        },
    }
}

fn prior_name(prior: Prior) -> &'static str {
    match prior {
        Prior::Released => "released",
        Prior::LeaseExpired => "lease_expired",
        Prior::Dropped => "dropped",
        Prior::Crashed => "crashed",
    }
}

fn figures(stats: &Stats) -> Value {
    let buckets: Vec<Value> = stats
        .buckets
        .iter()
        .map(|bucket| json!({ "start_ms": bucket.start_ms, "end_ms": bucket.end_ms, "keys": bucket.keys }))
        .collect();
    json!({
        "now_ms": stats.now_ms,
        "window_ms": millis(stats.window),
        "remembers_since_ms": stats.remembers_since_ms,
        "in_flight": stats.in_flight,
        "held": stats.held,
        "unsealed": stats.unsealed,
        "sealed": sealed(stats),
        "buckets": buckets,
        "disk_bytes": stats.disk_bytes,
    })
}

fn lines(stats: &Stats) -> String {
    let mut lines = vec![
        ("window", format_duration(stats.window).to_string()),
        ("remembers since", time(stats.remembers_since_ms)),
        ("in flight", HumanCount(stats.in_flight).to_string()),
        ("held", HumanCount(stats.held).to_string()),
        ("unsealed keys", HumanCount(stats.unsealed).to_string()),
        ("sealed keys", HumanCount(sealed(stats)).to_string()),
        ("on disk", HumanBytes(stats.disk_bytes).to_string()),
        ("buckets", stats.buckets.len().to_string()),
    ];
    for bucket in &stats.buckets {
        let width = format_duration(Duration::from_millis(bucket.end_ms.saturating_sub(bucket.start_ms)));
        lines.push(("", format!("{} {width}, {} keys", time(bucket.start_ms), HumanCount(bucket.keys))));
    }
    lines.iter().map(|(name, figure)| format!("{name:<16} {figure}")).collect::<Vec<_>>().join("\n")
}

/// Completed keys that are in buckets.
fn sealed(stats: &Stats) -> u64 {
    stats.buckets.iter().map(|bucket| bucket.keys).sum()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A time for people. A program's own clock may say any, also one that has no date.
fn time(since_epoch_ms: u64) -> String {
    const YEAR_10000_MS: u64 = 253_402_300_800_000;
    match UNIX_EPOCH.checked_add(Duration::from_millis(since_epoch_ms)) {
        Some(time) if since_epoch_ms < YEAR_10000_MS => format_rfc3339_millis(time).to_string(),
        _ => format!("{since_epoch_ms} ms since 1970"),
    }
}

/// Prints a line. That nobody reads it is no error.
fn print(line: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}
