//! Offsets and messages of a completion: all of them are stored with it or none is, also if the process is killed.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::Bench;
use onlyonce::{Claim, Completion, Durability, Error, Lease, Store};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const DIR: &str = "ONLYONCE_OUTBOX_CHILD";
const OPEN: &str = "the store is open";

#[test]
fn offsets_and_messages_are_stored_with_the_completion_and_survive_a_restart() {
    let mut bench = Bench::new();
    assert_eq!(bench.store().offset("orders", 0).wait().unwrap(), None);
    let completion = Completion::new("done")
        .offset("orders", 0, 17)
        .offset("orders", 300, 4)
        .message("charges", "a", "12 EUR")
        .message("mails", "", "");
    bench.acquire("a").complete(completion).wait().unwrap();
    bench.acquire("b").complete(Completion::new("").offset("orders", 0, 16)).wait().unwrap();
    // After a run of duplicates.
    bench.store().set_offset("orders", 0, 18).wait().unwrap();
    bench.acquire("c").complete(Completion::new("").message("charges", "c", "7 EUR")).wait().unwrap();
    for restarted in [false, true] {
        let store = bench.store();
        assert!(store.outbox(0).wait().unwrap().is_empty(), "a limit of 0 skips no message");
        assert_eq!(store.offset("orders", 0).wait().unwrap(), Some(18));
        assert_eq!(store.offset("orders", 300).wait().unwrap(), Some(4));
        assert_eq!(store.offset("order", 0).wait().unwrap(), None);
        let outbox = store.outbox(10).wait().unwrap();
        let shown: Vec<_> = outbox.iter().map(|it| (&it.topic[..], &it.key[..], &it.payload[..])).collect();
        let expected: [(&[u8], &[u8], &[u8]); 3] =
            [(b"charges", b"a", b"12 EUR"), (b"mails", b"", b""), (b"charges", b"c", b"7 EUR")];
        assert_eq!(shown, expected, "restarted: {restarted}");
        assert_eq!(store.outbox(1).wait().unwrap(), outbox[..1]);
        store.flush().unwrap();
        if restarted {
            store.remove_messages([outbox[1].id, outbox[0].id]).wait().unwrap();
            assert_eq!(store.outbox(10).wait().unwrap(), outbox[2..]);
            store.remove_messages([outbox[2].id]).wait().unwrap();
            assert!(store.outbox(10).wait().unwrap().is_empty());
        }
        bench.reopen();
    }
    assert!(bench.store().outbox(10).wait().unwrap().is_empty());
    let messages = (0..5).fold(Completion::new(""), |all, i| all.message("charges", i.to_string(), ""));
    bench.acquire("d").complete(messages).wait().unwrap();
    let keys = bench.store().outbox(10).wait().unwrap().into_iter().map(|message| message.key);
    assert_eq!(keys.collect::<Vec<_>>(), [b"0", b"1", b"2", b"3", b"4"]);
}

#[test]
fn a_superseded_completion_stores_no_offset_and_no_message() {
    let bench = Bench::new();
    let late = bench.acquire("k");
    bench.advance_ms(1_000);
    let _taken = bench.acquire("k");
    let failed = late.complete(Completion::new("late").offset("orders", 0, 1).message("charges", "k", "")).wait();
    assert!(matches!(failed.unwrap_err().error(), Error::Superseded { .. }));
    assert_eq!(bench.store().offset("orders", 0).wait().unwrap(), None);
    assert!(bench.store().outbox(10).wait().unwrap().is_empty());
}

#[test]
fn after_a_superseded_lease_a_batch_stores_messages_but_no_offsets() {
    let (bench, other) = (Bench::new(), Bench::new());
    let late = bench.acquire("b");
    bench.advance_ms(1_000);
    let _taken = bench.acquire("b");
    let done =
        |number: u64| Completion::new("done").offset("orders", 0, number).message("charges", number.to_string(), "");
    let complete = |batch: Vec<(Lease, u64)>| -> Vec<bool> {
        let batch = batch.into_iter().map(|(lease, number)| (lease, done(number)));
        bench.store().complete_batch(batch).wait().iter().map(Result::is_ok).collect()
    };
    let batch = vec![(bench.acquire("a"), 1), (late, 2), (bench.acquire("c"), 3), (bench.acquire("d"), 4)];
    assert_eq!(complete(batch), [true, false, true, true]);
    assert_eq!(bench.store().offset("orders", 0).wait().unwrap(), Some(1), "the second message is not completed");
    let keys = || bench.store().outbox(10).wait().unwrap().into_iter().map(|message| message.key).collect::<Vec<_>>();
    assert_eq!(keys(), [b"1", b"3", b"4"]);

    let batch = vec![(bench.acquire("e"), 5), (other.acquire("f"), 6), (bench.acquire("g"), 7)];
    assert_eq!(complete(batch), [true, false, true], "a lease of a different store");
    assert_eq!(bench.store().offset("orders", 0).wait().unwrap(), Some(5));
    // The next batch stores offsets again.
    assert_eq!(complete(vec![(bench.acquire("h"), 8), (bench.acquire("i"), 9)]), [true, true]);
    assert_eq!(bench.store().offset("orders", 0).wait().unwrap(), Some(9));
    assert_eq!(keys(), [b"1", b"3", b"4", b"5", b"7", b"8", b"9"]);
    assert_eq!(bench.completed("d").unwrap(), b"done");
}

#[test]
fn a_message_of_a_slower_completion_is_not_skipped() {
    const THREADS: u64 = 8;
    const EACH: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"));
    let mut got = BTreeSet::new();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let store = &store;
            scope.spawn(move || {
                for i in thread * EACH..(thread + 1) * EACH {
                    let Claim::Acquired(lease) = store.claim(i.to_string()).wait().unwrap() else {
                        panic!("{i} is new")
                    };
                    lease.complete(Completion::new("").message("t", i.to_string(), "")).wait().unwrap();
                }
            });
        }
        // Reads and removes messages concurrently: a message that it has not read must be returned later.
        while got.len() < (THREADS * EACH) as usize {
            for message in store.outbox(7).wait().unwrap() {
                assert!(got.insert(message.key.clone()), "{message:?} was returned twice");
                store.remove_messages([message.id]).wait().unwrap();
            }
        }
    });
    assert!(store.outbox(1).wait().unwrap().is_empty());
}

fn open(path: &Path) -> Store {
    let builder = Store::builder().durability(Durability::Process).memory_budget(32 << 20);
    builder.lock_wait(Duration::from_secs(20)).open(path).unwrap()
}

/// A consumer that stores its offset, and publishes its messages to a file. The test below kills it.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let store = open(&dir.join("store"));
    println!("{OPEN}");
    let mut published = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("published")).unwrap();
    for next in store.offset("orders", 0).wait().unwrap().unwrap_or(0).. {
        // Each completion stores its offset, so that no order is read twice.
        let Claim::Acquired(lease) = store.claim(format!("order-{next}")).wait().unwrap() else {
            panic!("{next} was read twice")
        };
        let completion = Completion::new("charged").offset("orders", 0, next + 1).message(
            "charges",
            next.to_string(),
            format!("charge of {next}"),
        );
        lease.complete(completion).wait().unwrap();
        if next % 16 == 0 {
            let messages = store.outbox(100).wait().unwrap();
            let mut lines = String::new();
            for message in &messages {
                lines += &format!("{} {}\n", message.id, String::from_utf8_lossy(&message.key));
            }
            published.write_all(lines.as_bytes()).unwrap();
            store.remove_messages(messages.iter().map(|message| message.id)).wait().unwrap();
        }
        if next % 400 == 0 {
            store.flush().unwrap();
        }
    }
}

#[test]
fn a_killed_consumer_processes_each_order_once_and_loses_no_message() {
    let seed: u64 = match std::env::var("ONLYONCE_OUTBOX_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::random(),
    };
    eprintln!("ONLYONCE_OUTBOX_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    let mut moved = 0;
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["outbox::child", "--exact", "--ignored", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Some are killed during the open, most during the work.
        if rng.random_bool(0.8) {
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.map_while(Result::ok).any(|line| line.ends_with(OPEN)), "round {round} did not open");
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(1..80)));
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself, in round {round}");
        child.kill().unwrap();
        child.wait().unwrap();
        let store = open(&dir.path().join("store"));
        let offset = store.offset("orders", 0).wait().unwrap().unwrap_or(0);
        assert!(offset >= last, "the offset went back from {last} to {offset}");
        moved += usize::from(offset > last);
        last = offset;
        let published = std::fs::read_to_string(dir.path().join("published")).unwrap_or_default();
        // The message of a line that the kill truncated is still in the outbox.
        let complete = published.rsplit_once('\n').map_or("", |(complete, _)| complete);
        let mut messages: BTreeSet<(String, u64)> = complete
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(id, key)| (id.to_owned(), key.parse().unwrap()))
            .collect();
        for message in store.outbox(usize::MAX).wait().unwrap() {
            messages.insert((message.id.to_string(), String::from_utf8(message.key).unwrap().parse().unwrap()));
        }
        let orders: Vec<u64> = messages.iter().map(|(_, order)| *order).collect();
        let distinct: BTreeSet<u64> = orders.iter().copied().collect();
        assert_eq!(
            (orders.len() as u64, distinct.len() as u64),
            (offset, offset),
            "a message for each order, round {round}"
        );
        assert!(distinct.last().is_none_or(|last| *last == offset - 1));
        let step = (offset / 50).max(1) as usize;
        for order in (0..offset).step_by(step) {
            assert!(
                matches!(store.claim(format!("order-{order}")).wait().unwrap(), Claim::Completed(_)),
                "order {order}"
            );
        }
        // Truncates the torn line, as a reader of the file does.
        std::fs::write(dir.path().join("published"), complete.to_owned() + if complete.is_empty() { "" } else { "\n" })
            .unwrap();
    }
    eprintln!("20 kills, {last} orders, progress in {moved} rounds");
    assert!(moved > 5, "too few children were killed after they had made progress");
}

#[test]
fn an_offset_is_on_disk_before_it_is_returned() {
    for (durability, syncs) in [(Durability::Disk, 1), (Durability::Process, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::builder().durability(durability).open(dir.path().join("store")).unwrap();
        store.set_offset("orders", 0, 17).wait().unwrap();
        let before = store.stats().journal_syncs;
        // As if another thread had written the offset and waited for its sync: a claim is not synced.
        let _lease = store.claim("k").wait().unwrap();
        assert_eq!(store.offset("orders", 0).wait().unwrap(), Some(17));
        assert_eq!(store.stats().journal_syncs - before, syncs, "{durability:?}");
        assert_eq!(store.offset("others", 0).wait().unwrap(), None);
        assert_eq!(store.stats().journal_syncs - before, syncs, "everything is synced already");
    }
}
