//! `onlyonce get` and `stats`.

use std::io::{ErrorKind, Write};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use humantime::{format_duration, format_rfc3339_millis};
use indicatif::{HumanBytes, HumanCount};
use onlyonce::{Completed, LeaseState, PriorAttempt, Stats, StoredKey, Timestamp};
use serde_json::{Map, Value, json};

use crate::named_key::{NamedKey, hex};
use crate::{NOT_FOUND, args, opening};

/// Prints the entry of a key.
pub(crate) fn get(args: &args::Get) -> anyhow::Result<u8> {
    let named = NamedKey::of(args)?;
    let key = named.key();
    let store = opening::existing(&args.store)?;
    let stored = store.inspect(&key).wait().map_err(opening::explain)?;
    store.close().wait()?;
    let Some(stored) = stored else {
        // If standard error is closed, only the exit code reports it.
        let _ = writeln!(std::io::stderr(), "onlyonce: no entry for {key}{}", hint(args, named.has_scope()));
        return Ok(NOT_FOUND);
    };
    print(&printable(&Value::Object(described(&named, &stored))))?;
    Ok(0)
}

/// How else the key may be stored.
fn hint(args: &args::Get, has_scope: bool) -> &'static str {
    match (args.content || args.json, has_scope) {
        (false, false) => {
            "; for a line filtered without --key give --content, for a key filtered with --scope give the same --scope"
        }
        (false, true) => "; for a line filtered without --key give --content",
        (true, false) => "; for a key filtered with --scope give the same --scope",
        (true, true) => "",
    }
}

/// Prints the figures of a store. Counters start at zero when the store is opened, and filters may still be rebuilding, so both are
/// left out.
pub(crate) fn stats(args: &args::Stats) -> anyhow::Result<u8> {
    let store = opening::existing(&args.store)?;
    let stats = store.stats();
    store.close().wait()?;
    if args.json {
        print(&figures(&stats).to_string())?
    } else {
        print(&lines(&stats))?
    }
    Ok(0)
}

fn described(named: &NamedKey, stored: &StoredKey) -> Map<String, Value> {
    let mut members = named.members();
    let described = match stored {
        StoredKey::Completed(completed) => {
            let (form, result) = result(completed);
            json!({
                "state": "completed",
                "completed_at": time(completed.completed_at()),
                "completed_at_ms": completed.completed_at().as_unix_ms(),
                "remembered_until": time(completed.remembered_until()),
                "remembered_until_ms": completed.remembered_until().as_unix_ms(),
                "token": completed.token().get(),
                "result_form": form,
                "result": result,
            })
        }
        StoredKey::Processing { token, attempt, state, .. } => {
            let (lease, prior, remaining) = match *state {
                LeaseState::Leased(remaining) => ("leased", None, Some(remaining)),
                LeaseState::Backoff(remaining, prior) => ("backoff", Some(prior), Some(remaining)),
                LeaseState::Free(prior) => ("free", Some(prior), None),
                LeaseState::Held(prior) => ("held", Some(prior), None),
            };
            json!({
                "state": "processing",
                "token": token.get(),
                "attempt": attempt,
                "lease": lease,
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

/// A value as JSON with all control characters escaped, so that none acts on a terminal. JSON itself leaves DEL and the C1
/// control characters in strings unescaped.
fn printable(value: &Value) -> String {
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

/// The form of the result, and the result.
fn result(completed: &Completed) -> (&'static str, Value) {
    match completed.result() {
        None if completed.is_result_too_large() => ("too_large", Value::Null),
        None => ("none", Value::Null),
        Some(bytes) => match str::from_utf8(bytes) {
            Ok(text) => ("text", text.into()),
            Err(_) => ("hex", hex(bytes).into()),
        },
    }
}

fn prior_name(prior: PriorAttempt) -> &'static str {
    match prior {
        PriorAttempt::Released => "released",
        PriorAttempt::LeaseExpired => "lease_expired",
        PriorAttempt::Dropped => "dropped",
        PriorAttempt::Crashed => "crashed",
    }
}

fn figures(stats: &Stats) -> Value {
    let buckets: Vec<Value> = stats
        .buckets
        .iter()
        .map(|bucket| json!({ "start_ms": bucket.start.as_unix_ms(), "end_ms": bucket.end.as_unix_ms(), "keys": bucket.keys }))
        .collect();
    json!({
        "now_ms": stats.now.as_unix_ms(),
        "window_ms": millis(stats.window),
        "remembers_since_ms": stats.remembers_since.as_unix_ms(),
        "in_flight": stats.in_flight,
        "held": stats.held,
        "unflushed": stats.unflushed,
        "flushed": flushed(stats),
        "buckets": buckets,
        "disk_bytes": stats.disk_bytes,
    })
}

fn lines(stats: &Stats) -> String {
    let mut lines = vec![
        ("window", format_duration(stats.window).to_string()),
        ("remembers since", time(stats.remembers_since)),
        ("in flight", HumanCount(stats.in_flight).to_string()),
        ("held", HumanCount(stats.held).to_string()),
        ("unflushed keys", HumanCount(stats.unflushed).to_string()),
        ("flushed keys", HumanCount(flushed(stats)).to_string()),
        ("on disk", HumanBytes(stats.disk_bytes).to_string()),
        ("buckets", stats.buckets.len().to_string()),
    ];
    for bucket in &stats.buckets {
        let width = format_duration(bucket.end.saturating_since(bucket.start));
        lines.push(("", format!("{} {width}, {} keys", time(bucket.start), HumanCount(bucket.keys))));
    }
    lines.iter().map(|(name, figure)| format!("{name:<16} {figure}")).collect::<Vec<_>>().join("\n")
}

/// The number of completed keys in buckets.
fn flushed(stats: &Stats) -> u64 {
    stats.buckets.iter().map(|bucket| bucket.keys).sum()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A date and time. The clock of a program may return times beyond the year 9999, which have no such form.
fn time(at: Timestamp) -> String {
    const YEAR_10000_MS: u64 = 253_402_300_800_000;
    let since_epoch_ms = at.as_unix_ms();
    match UNIX_EPOCH.checked_add(Duration::from_millis(since_epoch_ms)) {
        Some(time) if since_epoch_ms < YEAR_10000_MS => format_rfc3339_millis(time).to_string(),
        _ => format!("{since_epoch_ms} ms since 1970"),
    }
}

/// Prints a line. A closed output is not an error.
fn print(line: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}
