//! Keys, results and scopes of hostile callers: limits hold, memory is bounded, and a caller can neither see nor block
//! the keys of another scope.

use std::collections::{BTreeMap, HashSet};
use std::fmt::{Debug, Write as _};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::child::memory_growth;
use crate::common::{Bench, START_MS};
use onlyonce::{
    Claim, Completion, Error, Key, KeyError, KeyStatus, LeaseState, OnInterrupt, Outcome, PriorAttempt, RecordOutcome,
    Resolution, RunOutcome, Store, StoredKey, Timestamp,
};
use siphasher::sip::SipHasher13;

const MIB: u64 = 1 << 20;
/// The smallest budget.
const BUDGET: u64 = 32 * MIB;
/// Memory of a process besides the budget: RocksDB with its write buffers, the current call, the free memory of the
/// allocator.
const BESIDE: u64 = 128 * MIB;

/// Keys of known attacks.
const HOSTILE: [&[u8]; 16] = [
    b"\0",
    b"\0\0",
    b"a\0",
    b"\0a",
    b"a\0b",
    b"\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\x80\x01a",
    b"\n",
    b"\x1b[2J\x07",
    b"\xc2\x9b31m",
    b"\xe2\x80\xae",
    b"' OR 1=1; --",
];

// ---------------------------------------------------------------------------------------------------------------
// Digests
// ---------------------------------------------------------------------------------------------------------------

/// The entries of the column families of a closed store.
fn entries(store: &Path, family: impl Fn(&str) -> bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (options, path) = (rocksdb::Options::default(), store.join("db"));
    let names = rocksdb::DB::list_cf(&options, &path).unwrap();
    let db = rocksdb::DB::open_cf_for_read_only(&options, &path, &names, false).unwrap();
    let wanted = names.iter().filter(|name| family(name)).map(|name| db.cf_handle(name).unwrap());
    wanted.flat_map(|family| db.iterator_cf(&family, rocksdb::IteratorMode::Start)).map(|entry| entry.unwrap()).fold(
        Vec::new(),
        |mut entries, (key, value)| {
            entries.push((key.into_vec(), value.into_vec()));
            entries
        },
    )
}

/// Each key of the buckets, with the digest under which it is stored.
fn digests(store: &Path) -> BTreeMap<Vec<u8>, u64> {
    let entries = entries(store, |family| family.starts_with("bucket-"));
    entries.iter().map(|(entry, _)| (entry[8..].to_vec(), u64::from_be_bytes(entry[..8].try_into().unwrap()))).collect()
}

fn secret(store: &Path) -> Vec<u8> {
    let entries = entries(store, |family| family == "meta");
    entries.into_iter().find(|(name, _)| name == b"secret").expect("a secret").1
}

/// How many digests share the most frequent value of this byte.
fn most_frequent<'d>(digests: impl IntoIterator<Item = &'d u64>, byte: u32) -> usize {
    let mut counts = [0; 256];
    digests.into_iter().for_each(|digest| counts[(digest >> (8 * byte) & 0xff) as usize] += 1);
    counts.into_iter().max().unwrap()
}

#[test]
fn keys_chosen_to_collide_are_spread_by_the_secret_of_each_store() {
    // If all stores used the same digest, these keys would share its highest byte.
    let unseeded = |key: &str| SipHasher13::new_with_key(&[0; 16]).hash(format!("\0{key}").as_bytes());
    let chosen: Vec<String> =
        (0..).map(|i| format!("key-{i}")).filter(|key| unseeded(key) >> 56 == 0).take(2_048).collect();
    let stores: Vec<BTreeMap<Vec<u8>, u64>> = (0..2)
        .map(|_| {
            let bench = Bench::new();
            bench.store().record_batch(&chosen).wait().unwrap();
            bench.store().flush().unwrap();
            bench.store().close().wait().unwrap();
            let (found, secret) = (digests(&bench.path()), secret(&bench.path()));
            let seeded = SipHasher13::new_with_key(&secret.try_into().unwrap());
            assert!(found.iter().all(|(key, digest)| seeded.hash(key) == *digest), "the secret determines the digests");
            found
        })
        .collect();
    let [one, other] = stores.as_slice() else { panic!("two stores") };
    assert_eq!((one.len(), other.len()), (chosen.len(), chosen.len()));
    assert_eq!(most_frequent(&chosen.iter().map(|key| unseeded(key)).collect::<Vec<_>>(), 7), chosen.len());
    for byte in 0..8 {
        for store in [one, other] {
            // Eight on average; forty by chance is practically impossible.
            assert!(most_frequent(store.values(), byte) < 40, "byte {byte}");
        }
    }
    let values: HashSet<&u64> = one.values().collect();
    assert_eq!(other.values().filter(|digest| values.contains(digest)).count(), 0, "two stores agree on a digest");
}

#[test]
fn no_answer_error_or_debug_text_contains_the_secret_of_the_store() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold).in_flight_limit(3).held_limit(3));
    let store = bench.store();
    let mut output = String::new();
    let mut print = |what: &dyn Debug| writeln!(output, "{what:?} {what:#?}").unwrap();
    print(store);
    let claim = store.claim(Key::from("k").fingerprint("p")).wait().unwrap();
    print(&claim);
    print(&store.claim("k").wait());
    print(&store.claim(Key::from("k").fingerprint("q")).wait());
    print(&store.inspect("k").wait());
    drop(claim);
    print(&store.held().wait());
    print(&store.check_batch(["k", "new"]).wait());
    print(&store.resolve("k", Resolution::Completed(b"r".to_vec())).wait());
    print(&store.resolve("k", Resolution::Rerun).wait());
    print(&store.inspect("k").wait());
    print(&store.record_batch(["k", "other"]).wait());
    print(&store.claim("").wait());
    print(&store.claim("k".repeat(2_000)).wait());
    print(&store.claim_batch(["1", "2", "3", "4", "5"]).wait());
    print(&store.run("run", |lease| Err::<Vec<u8>, _>(format!("{lease:?}"))));
    store.flush().unwrap();
    print(&store.stats());
    print(&bench.builder().open(bench.path()));
    store.close().wait().unwrap();
    print(&store.claim("k").wait());

    let secret = secret(&bench.path());
    assert!(!secret.iter().all(|byte| *byte == 0));
    let list = |bytes: &[u8]| format!("{bytes:?}").trim_matches(['[', ']']).to_owned();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    // In every notation, and each half as the number that SipHash uses.
    for half in secret.chunks(8) {
        let number: [u8; 8] = half.try_into().unwrap();
        let (number, turned) = (u64::from_le_bytes(number), u64::from_be_bytes(number));
        let forms = [list(half), hex(half), format!("{}", half.escape_ascii()), number.to_string(), turned.to_string()];
        for form in forms.into_iter().chain([format!("{number:x}"), format!("{turned:x}")]) {
            assert!(!output.to_lowercase().contains(&form.to_lowercase()), "{form} is in the output: {output}");
        }
        // On disk only the database has it, which only the owner can read.
        let holders = files(&bench.path())
            .into_iter()
            .filter(|file| fs::read(file).unwrap().windows(half.len()).any(|window| window == half));
        let holders: Vec<PathBuf> = holders.collect();
        assert!(!holders.is_empty(), "no file has the secret, so that this test proves nothing");
        let stray: Vec<_> = holders
            .iter()
            .filter(|file| {
                !file.parent().unwrap().ends_with("db") || file.ends_with("LOG") || file.ends_with("IDENTITY")
            })
            .collect();
        assert!(stray.is_empty(), "{stray:?}");
    }
}

/// All files below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

// ---------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn a_result_of_a_gigabyte_is_neither_stored_nor_copied() {
    // Untouched zero pages take no memory before they are copied.
    let huge = || vec![0_u8; 1 << 30];
    let growth = memory_growth("hostile_input::a_result_of_a_gigabyte_is_neither_stored_nor_copied", || {
        let bench = Bench::with(|builder| builder.result_limit(64 << 20).on_interrupt(OnInterrupt::Hold));
        let store = bench.store();
        let omitted = |key| match store.check(key).wait().unwrap() {
            KeyStatus::Completed(completed) => completed.is_result_too_large() && completed.result().is_none(),
            other => panic!("{key} is {other:?}"),
        };
        bench.acquire("completed").complete(huge()).wait().unwrap();
        assert!(omitted("completed"));
        let RunOutcome::First(result) = store.run("run", |_| Ok::<_, Error>(huge())).unwrap() else {
            panic!("run is new")
        };
        assert_eq!(result.len(), 1 << 30, "`run` returns the result to the caller");
        assert!(omitted("run"));
        drop(bench.acquire("held"));
        store.resolve("held", Resolution::Completed(huge())).wait().unwrap();
        assert!(omitted("held"));

        // Each result is within its limit, but together they are too large for one call.
        let keys: Vec<String> = (0..17).map(|i| format!("batch-{i}")).collect();
        let leases = store.claim_batch(&keys).wait().unwrap().into_iter().map(|claim| match claim.unwrap() {
            Claim::Acquired(lease) => (lease, vec![0_u8; 64 << 20]),
            other => panic!("{other:?}"),
        });
        for rejected in store.complete_batch(leases).wait() {
            let rejected = rejected.unwrap_err();
            assert!(matches!(rejected.error(), Error::BatchTooLarge { limit, .. } if *limit == 1 << 30), "{rejected}");
            assert_eq!(rejected.outcome(), Outcome::NotWritten);
            let (_, completion, lease) = rejected.into_parts();
            assert_eq!(completion.result().len(), 64 << 20);
            lease.expect("the lease is still good").complete("small").wait().unwrap();
        }
        assert!(keys.iter().all(|key| bench.completed(key).unwrap() == b"small"));
        store.close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE, "{growth}");
}

#[test]
fn many_results_at_the_limit_stay_in_the_memory_budget() {
    let growth = memory_growth("hostile_input::many_results_at_the_limit_stay_in_the_memory_budget", || {
        let bench = Bench::new();
        let key = |i: u32| format!("key-{i}");
        let result = |i: u32| vec![i as u8; 1 << 20];
        (0..300).for_each(|i| bench.acquire(&key(i)).complete(result(i)).wait().unwrap());
        assert!((0..300).step_by(7).all(|i| bench.completed(&key(i)).unwrap() == result(i)));
        bench.store().close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE, "{growth}");
}

#[test]
fn a_million_new_keys_stay_in_the_memory_budget() {
    let growth = memory_growth("hostile_input::a_million_new_keys_stay_in_the_memory_budget", || {
        let bench = Bench::new();
        let key = |i: u32| format!("{i:032x}-of-a-other_user");
        for start in (0..1_000_000).step_by(1_000) {
            let keys = (start..start + 1_000).map(key);
            if start % 2_000 == 0 {
                let recorded = bench.store().record_batch(keys).wait().unwrap();
                assert!(recorded.into_iter().all(|recorded| recorded.unwrap() == RecordOutcome::First));
                continue;
            }
            let leases =
                bench.store().claim_batch(keys).wait().unwrap().into_iter().map(|claim| match claim.unwrap() {
                    Claim::Acquired(lease) => (lease, b"thirty bytes of a short result".to_vec()),
                    other => panic!("{other:?}"),
                });
            assert!(bench.store().complete_batch(leases).wait().into_iter().all(|completed| completed.is_ok()));
        }
        let checks = bench.store().check_batch((0..1_000_000).step_by(97).map(key)).wait().unwrap();
        assert!(checks.into_iter().all(|check| matches!(check.unwrap(), KeyStatus::Completed(_))));
        bench.store().close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE, "{growth}");
}

#[test]
fn dropped_claims_take_no_memory() {
    let growth = memory_growth("hostile_input::dropped_claims_take_no_memory", || {
        let bench = Bench::with(|builder| builder.in_flight_limit(1_000));
        for start in (0..200_000).step_by(500) {
            let claims = bench.store().claim_batch((start..start + 500).map(|i| format!("{i:01024}"))).wait().unwrap();
            assert!(claims.iter().all(|claim| matches!(claim, Ok(Claim::Acquired(_)))));
        }
        assert_eq!(bench.store().stats().in_flight, 0);
        bench.store().close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE, "{growth}");
}

#[test]
fn claims_that_are_never_completed_stop_at_the_limit_with_bounded_memory() {
    const LIMIT: u64 = 100_000;
    const KEY: u64 = 1_024;
    let test = "hostile_input::claims_that_are_never_completed_stop_at_the_limit_with_bounded_memory";
    let growth = memory_growth(test, || {
        let bench = Bench::with(|builder| builder.in_flight_limit(LIMIT as usize));
        let (mut acquired, mut rejected) = (0, 0);
        for start in (0..2 * LIMIT).step_by(500) {
            for claim in bench.store().claim_batch((start..start + 500).map(|i| format!("{i:01024}"))).wait().unwrap() {
                match claim {
                    Ok(Claim::Acquired(lease)) => {
                        // The work hangs.
                        std::mem::forget(lease);
                        acquired += 1;
                    }
                    Err(Error::TooManyInFlight { limit, .. }) if limit as u64 == LIMIT => rejected += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!((acquired, rejected), (LIMIT, LIMIT));
        assert_eq!(bench.store().stats().in_flight, LIMIT);
        bench.store().close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE + LIMIT * (6 * KEY + 250), "{growth}");
}

#[test]
fn a_call_of_a_million_keys_succeeds_and_an_endless_call_is_rejected_early() {
    let bench = Bench::with(|builder| builder.key_limit(65_535).memory_budget(256 << 20));
    let keys: Vec<String> = (0..1_000_000).map(|i| format!("key-{i}")).collect();
    let recorded = bench.store().record_batch(&keys).wait().unwrap();
    assert!(recorded.into_iter().all(|recorded| recorded.unwrap() == RecordOutcome::First));
    let again = bench.store().claim_batch(&keys).wait().unwrap();
    assert!(again.into_iter().all(|claim| matches!(claim.unwrap(), Claim::Completed(_))));

    let long = "k".repeat(65_535);
    let read = std::cell::Cell::new(0);
    let endless = || std::iter::repeat_with(|| long.as_str()).inspect(|_| read.set(read.get() + 1));
    let too_large = |error| matches!(error, Error::BatchTooLarge { limit, .. } if limit == 1 << 30);
    assert!(too_large(bench.store().record_batch(endless()).wait().unwrap_err()));
    assert!(too_large(bench.store().claim_batch(endless()).wait().unwrap_err()));
    assert!(too_large(bench.store().check_batch(endless()).wait().unwrap_err()));
    assert_eq!(read.get(), 3 * ((1 << 30) / 65_536 + 1), "the call reads no further");
    assert_eq!(bench.store().check(&long).wait().unwrap(), KeyStatus::New);
    assert_eq!(bench.store().stats().in_flight, 0);
}

// ---------------------------------------------------------------------------------------------------------------
// Arbitrary bytes
// ---------------------------------------------------------------------------------------------------------------

/// Every kind of key that hostile bytes can have.
fn forms(bytes: &[u8]) -> [Key<'static>; 5] {
    [
        Key::from(bytes.to_vec()),
        Key::from(bytes.to_vec()).scope(bytes).into_owned(),
        Key::composite([bytes, b"", bytes]),
        Key::content(bytes),
        Key::content(bytes).scope(bytes).into_owned(),
    ]
}

#[test]
fn every_call_accepts_keys_of_any_bytes() {
    let mut bench = Bench::new();
    let keys: Vec<Key<'static>> = HOSTILE.iter().flat_map(|bytes| forms(bytes)).collect();
    let result = |key: &Key<'_>| [key.as_bytes(), b"\0\xff"].concat();
    let store = bench.store();
    for key in &keys {
        assert_eq!(store.inspect(key).wait().unwrap(), None);
        assert_eq!(store.check(key).wait().unwrap(), KeyStatus::New);
        let Claim::Acquired(mut lease) = store.claim(key).wait().unwrap() else { panic!("{key} is new") };
        lease.renew().unwrap();
        assert!(matches!(store.check(key).wait().unwrap(), KeyStatus::InProgress(other) if other.attempt == 1));
        assert!(matches!(
            store.inspect(key).wait().unwrap(),
            Some(StoredKey::Processing { state: LeaseState::Leased(_), .. })
        ));
        assert_eq!(store.record(key).wait().unwrap(), RecordOutcome::Duplicate { in_flight: true });
        assert!(matches!(store.forget(key).wait(), Err(Error::InUse { .. })));
        lease.release().wait().unwrap();
        let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is unclaimed") };
        assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Released)));
        lease.complete(result(key)).wait().unwrap();
        assert_eq!(store.record(key).wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    }
    store.flush().unwrap();
    bench.reopen();
    let store = bench.store();
    for (key, check) in keys.iter().zip(store.check_batch(&keys).wait().unwrap()) {
        assert!(
            matches!(&check, Ok(KeyStatus::Completed(it)) if it.result() == Some(&result(key))),
            "{key}: {check:?}"
        );
        assert!(matches!(store.run(key, |_| Err::<Vec<u8>, _>("again")), Ok(RunOutcome::Replayed(_))));
        assert!(store.forget(key).wait().unwrap() && !store.forget(key).wait().unwrap());
        assert!(matches!(store.run(key, |_| Ok::<_, Error>(vec![0])), Ok(RunOutcome::First(_))));
    }
    store.close().wait().unwrap();
}

#[test]
fn a_held_key_of_any_bytes_is_listed_unchanged_and_can_be_resolved() {
    let mut bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    let keys: HashSet<Key<'static>> = HOSTILE.iter().flat_map(|bytes| forms(bytes)).collect();
    for claim in bench.store().claim_batch(&keys).wait().unwrap() {
        assert!(matches!(claim.unwrap(), Claim::Acquired(_)));
    }
    bench.reopen();
    let held = bench.store().held().wait().unwrap();
    assert_eq!(held.iter().map(|held| held.key.clone()).collect::<HashSet<_>>(), keys);
    for held in &held {
        let shown = format!("{} {:?}", held.key, held);
        assert!(!shown.contains(char::is_control), "{shown:?} has control characters");
        bench.store().resolve(&held.key, Resolution::Completed(b"decided".to_vec())).wait().unwrap();
    }
    assert!(bench.store().held().wait().unwrap().is_empty());
    let checks = bench.store().check_batch(&keys).wait().unwrap();
    assert!(checks.into_iter().all(|check| matches!(check, Ok(KeyStatus::Completed(_)))));
}

#[test]
fn errors_show_keys_escaped_and_truncated() {
    let bench = Bench::with(|builder| builder.key_limit(100));
    for bytes in HOSTILE {
        let guarded = |payload: &'static str| Key::from(bytes).scope(bytes).fingerprint(payload);
        let _lease = bench.store().claim(guarded("one")).wait().unwrap();
        let long = bytes.repeat(1_000);
        let errors = [
            bench.store().claim(guarded("other")).wait().unwrap_err(),
            bench.store().forget(guarded("one")).wait().unwrap_err(),
            bench.store().resolve(bytes, Resolution::Rerun).wait().unwrap_err(),
            bench.store().claim(&long).wait().unwrap_err(),
            bench.store().claim(Key::from("k").scope(&long)).wait().unwrap_err(),
        ];
        for error in errors {
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains(char::is_control), "{shown:?}");
            assert!(shown.len() < 1_500, "{shown}");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Scopes
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn different_scopes_and_keys_never_have_the_same_encoding() {
    // Bytes that are lengths and tags in the encoding, in every order.
    let alphabet = [0_u8, 1, 2, 0x80, b'a'];
    let mut words: Vec<Vec<u8>> = vec![vec![]];
    for len in 0..3 {
        let longer = words
            .iter()
            .filter(|word| word.len() == len)
            .flat_map(|word| alphabet.iter().map(move |byte| [word.as_slice(), &[*byte]].concat()));
        words.extend(longer.collect::<Vec<_>>());
    }
    let mut keys: Vec<Key<'_>> = Vec::new();
    for scope in &words {
        for body in words.iter().filter(|body| !body.is_empty()) {
            keys.push(Key::from(body).scope(scope));
        }
        for (one, other) in words
            .iter()
            .filter(|part| part.len() < 2)
            .flat_map(|one| words.iter().filter(|part| part.len() < 2).map(move |other| (one, other)))
        {
            keys.push(Key::composite([one, other]).scope(scope));
        }
    }
    let mut bench = Bench::new();
    for (start, batch) in keys.chunks(4_000).enumerate() {
        let claims = bench.store().claim_batch(batch).wait().unwrap();
        let leases = claims.into_iter().enumerate().map(|(index, claim)| match claim.unwrap() {
            Claim::Acquired(lease) => (lease, (start * 4_000 + index).to_string()),
            other => panic!("{} has the encoding of another key: {other:?}", batch[index]),
        });
        assert!(bench.store().complete_batch(leases).wait().into_iter().all(|completed| completed.is_ok()));
    }
    bench.store().flush().unwrap();
    bench.reopen();
    for (index, check) in bench.store().check_batch(&keys).wait().unwrap().into_iter().enumerate() {
        let Ok(KeyStatus::Completed(completed)) = check else { panic!("{}: {check:?}", keys[index]) };
        assert_eq!(completed.result().unwrap(), index.to_string().as_bytes(), "{}", keys[index]);
    }
    assert!(keys.len() > 25_000, "{} keys", keys.len());
}

#[test]
fn a_scope_neither_sees_nor_blocks_the_keys_of_another() {
    let mut bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    let key = |scope: &'static str| Key::from("order-1").scope(scope);
    let store = bench.store();
    let Claim::Acquired(theirs) = store.claim(key("theirs").fingerprint("their payload")).wait().unwrap() else {
        panic!()
    };
    // A key in progress in their scope is new in ours, with any payload; calls in our scope do not change theirs.
    for scope in ["ours", "", "their", "theirs\0", "theirs2"] {
        assert_eq!(store.check(key(scope)).wait().unwrap(), KeyStatus::New, "{scope}");
        assert_eq!(store.inspect(key(scope)).wait().unwrap(), None, "{scope}");
        assert!(!store.forget(key(scope)).wait().unwrap());
        assert!(matches!(store.resolve(key(scope), Resolution::Rerun).wait(), Err(Error::NotHeld { .. })));
        let Claim::Acquired(lease) = store.claim(key(scope).fingerprint("ours")).wait().unwrap() else {
            panic!("{scope}")
        };
        lease.complete(format!("of {scope}")).wait().unwrap();
    }
    assert!(matches!(store.check(key("theirs")).wait().unwrap(), KeyStatus::InProgress(_)));
    drop(theirs);
    let held: Vec<String> = store.held().wait().unwrap().iter().map(|held| held.key.to_string()).collect();
    assert_eq!(held, ["\"order-1\" in \"theirs\""]);
    store.resolve(key("theirs"), Resolution::Completed(b"of theirs".to_vec())).wait().unwrap();
    assert!(store.forget(key("ours")).wait().unwrap());
    store.flush().unwrap();
    bench.reopen();
    assert_eq!(bench.store().check(key("ours")).wait().unwrap(), KeyStatus::New);
    for scope in ["", "their", "theirs", "theirs\0", "theirs2"] {
        let KeyStatus::Completed(completed) = bench.store().check(key(scope)).wait().unwrap() else {
            panic!("{scope}")
        };
        assert_eq!(completed.result().unwrap(), format!("of {scope}").as_bytes());
    }
}

#[test]
fn a_scope_that_fills_the_store_blocks_only_new_claims_of_other_scopes() {
    let bench = Bench::with(|builder| builder.in_flight_limit(100));
    bench.store().record(Key::from("done").scope("ours")).wait().unwrap();
    let Claim::Acquired(at_work) = bench.store().claim(Key::from("at work").scope("ours")).wait().unwrap() else {
        panic!()
    };
    let flood: Vec<String> = (0..1_000).map(|i| format!("flood-{i}")).collect();
    let claims = bench.store().claim_batch(flood.iter().map(|key| Key::from(key).scope("theirs"))).wait().unwrap();
    assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 99);
    let new = || Key::from("new").scope("ours");
    assert!(
        matches!(bench.store().claim(new()).wait(), Err(Error::TooManyInFlight { .. })),
        "the limit applies to the whole store"
    );
    assert!(matches!(bench.store().claim(Key::from("done").scope("ours")).wait().unwrap(), Claim::Completed(_)));
    assert_eq!(bench.store().check(new()).wait().unwrap(), KeyStatus::New);
    assert_eq!(bench.store().record(Key::from("recorded").scope("ours")).wait().unwrap(), RecordOutcome::First);
    at_work.complete("r").wait().unwrap();
    assert!(
        matches!(bench.store().claim(new()).wait().unwrap(), Claim::Acquired(_)),
        "one more claim is within the limit again"
    );
}

// ---------------------------------------------------------------------------------------------------------------
// Limits
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn every_call_accepts_keys_at_the_limit_and_rejects_longer_ones() {
    for limit in [1, 300, 65_535] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::builder().key_limit(limit).open(dir.path().join("store")).unwrap();
        let bytes = |len: usize| vec![0xff; len];
        let (most, over) = (bytes(limit), bytes(limit + 1));
        let is_refused = |error: Error| match error {
            Error::Key(KeyError::TooLong { len, limit: reported, .. }) => (len, reported) == (limit + 1, limit),
            Error::Key(KeyError::Empty { .. }) => false,
            other => panic!("{other}"),
        };
        let mut too_long = vec![Key::from(&over)];
        if limit > 255 {
            // A scope counts as part of its key.
            too_long.push(Key::from(&over[..limit + 1 - 255]).scope(&over[..255]));
            assert!(matches!(
                store.claim(Key::from(&most[..limit - 255]).scope(&most[..255])).wait(),
                Ok(Claim::Acquired(_))
            ));
            assert!(matches!(
                store.claim(Key::from("k").scope(&most[..256])).wait(),
                Err(Error::Key(KeyError::ScopeTooLong { len: 256, .. }))
            ));
        }
        for key in too_long {
            assert!(is_refused(store.claim(&key).wait().unwrap_err()));
            assert!(is_refused(store.check(&key).wait().unwrap_err()));
            assert!(is_refused(store.record(&key).wait().unwrap_err()));
            // These calls accept it, because it may have been claimed when the limit was higher; but there is a limit
            // for all stores.
            if limit == 65_535 {
                assert!(is_refused(store.inspect(&key).wait().unwrap_err()));
                assert!(is_refused(store.forget(&key).wait().unwrap_err()));
                assert!(is_refused(store.resolve(&key, Resolution::Rerun).wait().unwrap_err()));
            } else {
                assert_eq!(store.inspect(&key).wait().unwrap(), None);
                assert!(!store.forget(&key).wait().unwrap());
                assert!(matches!(store.resolve(&key, Resolution::Rerun).wait(), Err(Error::NotHeld { .. })));
            }
            assert!(store.run(&key, |_| -> Result<_, Error> { panic!("the work must not start") }).is_err());
            // A single one fails its batch, which has no effect then.
            let batch = || [Key::from("a"), key.clone()];
            assert!(is_refused(store.claim_batch(batch()).wait().unwrap_err()));
            assert!(is_refused(store.record_batch(batch()).wait().unwrap_err()));
            assert!(is_refused(store.check_batch(batch()).wait().unwrap_err()));
            assert_eq!(store.check("a").wait().unwrap(), KeyStatus::New);
        }
        for empty in [Key::from(""), Key::from("").scope("s"), Key::composite([""; 0])] {
            assert!(matches!(store.claim(&empty).wait(), Err(Error::Key(KeyError::Empty { .. }))));
            assert!(matches!(
                store.record_batch([Key::from("a"), empty]).wait(),
                Err(Error::Key(KeyError::Empty { .. }))
            ));
        }
        let Claim::Acquired(lease) = store.claim(&most).wait().unwrap() else { panic!("it is new") };
        lease.complete("r").wait().unwrap();
        store.flush().unwrap();
        assert_eq!(store.record(&most).wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
        assert!(matches!(store.inspect(&most).wait().unwrap(), Some(StoredKey::Completed(_))));
        assert!(store.forget(&most).wait().unwrap());
    }
}

#[test]
fn an_error_names_the_index_of_the_invalid_key_in_its_batch() {
    let bench = Bench::with(|builder| builder.key_limit(300));
    let stream = Bench::with(|builder| builder.key_limit(300).stream_time(Duration::from_secs(10)));
    let (long, scope) = ("k".repeat(301), "s".repeat(256));
    for bad in [Key::from(""), Key::from(&long), Key::from("k").scope(&scope)] {
        let key = || bad.clone();
        let errors = |index: usize| {
            let batch = || (0..3).map(|i| if i == index { key() } else { Key::from(format!("key {i}")) });
            let messages = || batch().map(|key| key.at(Timestamp::from_unix_ms(START_MS)));
            let (store, stream) = (bench.store(), stream.store());
            [
                store.claim_batch(batch()).wait().unwrap_err(),
                store.record_batch(batch()).wait().unwrap_err(),
                store.check_batch(batch()).wait().unwrap_err(),
                stream.claim_batch(messages()).wait().unwrap_err(),
                stream.record_batch(messages()).wait().unwrap_err(),
                stream.check_batch(messages()).wait().unwrap_err(),
            ]
        };
        for index in 0..3 {
            for error in errors(index) {
                let (Error::Key(KeyError::Empty { index: at })
                | Error::Key(KeyError::TooLong { index: at, .. })
                | Error::Key(KeyError::ScopeTooLong { index: at, .. })) = &error
                else {
                    panic!("{error:?}")
                };
                assert_eq!(*at, Some(index), "{error}");
                assert!(error.to_string().contains(&format!(" at index {index} of the batch")), "{error}");
            }
        }
        for error in
            [bench.store().claim(key()).wait().unwrap_err(), bench.store().claim_batch([key()]).wait().unwrap_err()]
        {
            assert!(!error.to_string().contains("at index"), "{error}");
        }
    }
    assert_eq!(bench.store().stats().in_flight, 0, "a rejected batch has no effect");
}

#[test]
fn keys_and_results_over_a_lowered_limit_are_still_read() {
    let dir = tempfile::tempdir().unwrap();
    let open = |key_limit: usize, result_limit: usize| {
        let builder = Store::builder().key_limit(key_limit).result_limit(result_limit).memory_budget(32 << 20);
        builder.on_interrupt(OnInterrupt::Hold).open(dir.path().join("store")).unwrap()
    };
    let (held, done) = ("h".repeat(5_000), "d".repeat(5_000));
    let store = open(5_000, 3_000);
    for key in [&held, &done] {
        let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("it is new") };
        if key == &done { lease.complete(vec![7; 3_000]).wait().unwrap() } else { drop(lease) }
    }
    store.close().wait().unwrap();
    let store = open(10, 10);
    let listed = store.held().wait().unwrap();
    assert_eq!(listed.iter().map(|held| held.key.as_bytes()).collect::<Vec<_>>(), [held.as_bytes()]);
    assert!(matches!(
        store.inspect(&held).wait().unwrap(),
        Some(StoredKey::Processing { state: LeaseState::Held(_), .. })
    ));
    store.resolve(&listed[0].key, Resolution::Completed(b"resolved".to_vec())).wait().unwrap();
    for (key, result) in [(&held, &b"resolved"[..]), (&done, &[7; 3_000])] {
        let stored = store.inspect(key).wait().unwrap();
        assert!(matches!(&stored, Some(StoredKey::Completed(first)) if first.result() == Some(result)), "{stored:?}");
        assert!(store.forget(key).wait().unwrap());
    }
}

#[test]
fn offsets_and_messages_with_names_of_any_length_are_read_back() {
    // A child process of another test holds the locks of this process from its fork to its exec.
    let mut bench = Bench::with(|builder| builder.lock_wait(Duration::from_secs(30)));
    let names = [Vec::new(), vec![0], vec![0xff; 300], vec![b'n'; 100_000], vec![0x80; 9 << 20]];
    for (i, name) in names.iter().enumerate() {
        let lease = bench.acquire(&i.to_string());
        let completion = Completion::new("r").offset(name.as_slice(), u32::MAX, i as u64).message(
            name.as_slice(),
            name.as_slice(),
            name.as_slice(),
        );
        lease.complete(completion).wait().unwrap();
        bench.store().set_offset(name.as_slice(), 0, u64::MAX).wait().unwrap();
    }
    for round in 0..3 {
        for (i, name) in names.iter().enumerate() {
            assert_eq!(bench.store().offset(name.as_slice(), u32::MAX).wait().unwrap(), Some(i as u64), "{round}");
            assert_eq!(bench.store().offset(name.as_slice(), 0).wait().unwrap(), Some(u64::MAX));
            assert_eq!(bench.store().offset(name.as_slice(), 1).wait().unwrap(), None);
        }
        let outbox = bench.store().outbox(10).wait().unwrap();
        assert_eq!(outbox.len(), names.len());
        assert!(
            outbox.iter().zip(&names).all(|(it, name)| &it.topic == name && &it.key == name && &it.payload == name)
        );
        if round == 0 { bench.store().flush().unwrap() } else { bench.reopen() }
    }
}

#[test]
fn an_error_about_a_different_payload_reveals_nothing_of_the_first_one() {
    let mut bench = Bench::new();
    let guarded = |key: &'static str, payload: &'static [u8]| Key::from(key).fingerprint(payload);
    let lease = match bench.store().claim(guarded("k", b"amount=12")).wait().unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{other:?}"),
    };
    // The empty payload counts, and so does one that differs only in its end or its length.
    let others: [&[u8]; 5] = [b"", b"amount=13", b"amount=1", b"amount=12\0", b"\xffamount=12"];
    let assert_rejected = |bench: &Bench| {
        for payload in others {
            let batch = bench.store().claim_batch([guarded("k", payload), guarded("other", payload)]).wait().unwrap();
            let [Err(error @ Error::PayloadMismatch { .. }), Ok(Claim::Acquired(_))] = batch.as_slice() else {
                panic!("{batch:?}")
            };
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("secret") && !shown.contains("amount"), "{shown}");
            drop(batch);
            bench.store().forget("other").wait().unwrap();
            assert!(matches!(bench.store().check(guarded("k", payload)).wait(), Err(Error::PayloadMismatch { .. })));
            assert!(matches!(bench.store().record(guarded("k", payload)).wait(), Err(Error::PayloadMismatch { .. })));
        }
    };
    assert_rejected(&bench);
    lease.complete("a secret result").wait().unwrap();
    assert_rejected(&bench);
    bench.store().flush().unwrap();
    assert_rejected(&bench);
    bench.reopen();
    assert_rejected(&bench);
    let Claim::Completed(first) = bench.store().claim(guarded("k", b"amount=12")).wait().unwrap() else { panic!() };
    assert_eq!(first.result(), Some(&b"a secret result"[..]));
    assert_eq!(bench.completed("k").unwrap(), b"a secret result", "a call without a payload is not checked");
}

// ---------------------------------------------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------------------------------------------

/// Creates a store with files of all kinds, in a directory that is open to every user.
fn fill(path: &Path) {
    let clock = onlyonce::ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let open = || {
        let builder = Store::builder().window(Duration::from_secs(10)).bucket(Duration::from_secs(1));
        builder.clock(clock.clone()).open(path).unwrap()
    };
    for round in 0..2 {
        let store = open();
        for i in 0..3 {
            store.record(format!("key-{round}-{i}")).wait().unwrap();
            store.flush().unwrap();
            clock.advance(Duration::from_secs(1));
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while fs::read_dir(path.join("filters")).unwrap().count() < 2 {
            assert!(std::time::Instant::now() < deadline, "no filter file was written");
            std::thread::sleep(Duration::from_millis(20));
        }
        store.close().wait().unwrap();
    }
}

#[test]
fn only_its_owner_can_read_a_store_whatever_the_umask() {
    let test = "hostile_input::only_its_owner_can_read_a_store_whatever_the_umask";
    if crate::child::is_child(test) {
        fill(Path::new(&std::env::var("ONLYONCE_TEST_STORE").unwrap()));
        return;
    }
    let as_root = fs::metadata("/proc/self").is_ok_and(|of| std::os::unix::fs::MetadataExt::uid(&of) == 0);
    for (mask, made_before) in [("000", false), ("000", true), ("022", false), ("077", false)] {
        let dir = tempfile::tempdir().unwrap();
        // The directories above the store are open to every user.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let store = dir.path().join("store");
        if made_before {
            fs::create_dir(&store).unwrap();
            fs::set_permissions(&store, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let alone = crate::child::command(test);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("umask {mask} && exec \"$0\" \"$@\"")).arg(alone.get_program());
        shell.args(alone.get_args()).envs(alone.get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.env("ONLYONCE_TEST_STORE", &store).stdout(Stdio::null());
        assert!(shell.status().unwrap().success());

        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        if !made_before {
            assert_eq!(mode(&store), 0o700, "with umask {mask}");
        }
        let found = files(&store);
        let endings = ["sst", "filter", "lock", "journal"];
        assert!(endings.iter().all(|ending| found.iter().any(|file| file.extension().is_some_and(|it| it == *ending))));
        for file in &found {
            let guard = file.parent().unwrap();
            if guard == store {
                assert_eq!(mode(file), 0o600, "{} with umask {mask}", file.display());
            } else {
                // RocksDB creates its files with the umask's permissions: the directory protects them.
                assert_eq!(mode(guard), 0o700, "{} with umask {mask}", guard.display());
            }
            if as_root {
                let mut other_user = Command::new("cat");
                other_user.arg(file).uid(65_534).gid(65_534).stdout(Stdio::null()).stderr(Stdio::null());
                assert!(!other_user.status().unwrap().success(), "another user read {}", file.display());
            }
        }
        if as_root {
            let probe = dir.path().join("probe");
            fs::write(&probe, "readable by every user").unwrap();
            fs::set_permissions(&probe, fs::Permissions::from_mode(0o644)).unwrap();
            let mut other_user = Command::new("cat");
            other_user.arg(probe).uid(65_534).gid(65_534).stdout(Stdio::null());
            assert!(
                other_user.status().unwrap().success(),
                "the other user cannot read a public file either, so that this test proves nothing"
            );
        }
    }
}
