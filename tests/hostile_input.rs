//! Keys, results and scopes from strangers who mean harm: limits hold, memory stays in its bounds, and nobody sees or
//! blocks what is another's.

#[path = "common/child.rs"]
mod child;
mod common;

use std::collections::{BTreeMap, HashSet};
use std::fmt::{Debug, Write as _};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use child::memory_growth;
use common::Bench;
use onlyonce::{
    Claim, Completion, Error, Key, KeyError, KeyStatus, LeaseState, OnInterrupt, Outcome, PriorAttempt, RecordOutcome,
    Resolution, RunOutcome, Store, StoredKey, Timestamp,
};
use siphasher::sip::SipHasher13;

const MIB: u64 = 1 << 20;
/// The smallest there is.
const BUDGET: u64 = 32 * MIB;
/// What a process takes beside the budget: RocksDB and its write buffers, the call under way, what the allocator keeps.
const BESIDE: u64 = 128 * MIB;

/// What people have put into keys to break things.
const ODD: [&[u8]; 16] = [
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

/// The rows of a column family of a store that is closed.
fn rows(store: &Path, family: impl Fn(&str) -> bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (options, path) = (rocksdb::Options::default(), store.join("db"));
    let names = rocksdb::DB::list_cf(&options, &path).unwrap();
    let db = rocksdb::DB::open_cf_for_read_only(&options, &path, &names, false).unwrap();
    let wanted = names.iter().filter(|name| family(name)).map(|name| db.cf_handle(name).unwrap());
    wanted.flat_map(|family| db.iterator_cf(&family, rocksdb::IteratorMode::Start)).map(|row| row.unwrap()).fold(
        Vec::new(),
        |mut rows, (key, value)| {
            rows.push((key.into_vec(), value.into_vec()));
            rows
        },
    )
}

/// Each key of the buckets, with the digest it lies under.
fn digests(store: &Path) -> BTreeMap<Vec<u8>, u64> {
    let rows = rows(store, |family| family.starts_with("bucket-"));
    rows.iter().map(|(row, _)| (row[8..].to_vec(), u64::from_be_bytes(row[..8].try_into().unwrap()))).collect()
}

fn secret(store: &Path) -> Vec<u8> {
    let rows = rows(store, |family| family == "meta");
    rows.into_iter().find(|(name, _)| name == b"secret").expect("a secret").1
}

/// How many of the digests share their most frequent byte in this place.
fn crowd<'d>(digests: impl IntoIterator<Item = &'d u64>, place: u32) -> usize {
    let mut counts = [0; 256];
    digests.into_iter().for_each(|digest| counts[(digest >> (8 * place) & 0xff) as usize] += 1);
    counts.into_iter().max().unwrap()
}

#[test]
fn keys_that_were_chosen_to_crowd_are_spread_by_each_store_in_a_way_of_its_own() {
    // All of them would lie in one place of 256, were the digest the same everywhere.
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
            assert!(found.iter().all(|(key, digest)| seeded.hash(key) == *digest), "the secret is what makes them");
            found
        })
        .collect();
    let [one, other] = stores.as_slice() else { panic!("two stores") };
    assert_eq!((one.len(), other.len()), (chosen.len(), chosen.len()));
    assert_eq!(crowd(&chosen.iter().map(|key| unseeded(key)).collect::<Vec<_>>(), 7), chosen.len());
    for place in 0..8 {
        for store in [one, other] {
            // Eight on average; that forty meet by chance does not happen.
            assert!(crowd(store.values(), place) < 40, "byte {place}");
        }
    }
    let values: HashSet<&u64> = one.values().collect();
    assert_eq!(other.values().filter(|digest| values.contains(digest)).count(), 0, "two stores agree on a digest");
}

#[test]
fn the_secret_of_a_store_is_in_nothing_that_it_says() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold).in_flight_limit(3).held_limit(3));
    let store = bench.store();
    let mut said = String::new();
    let mut say = |what: &dyn Debug| writeln!(said, "{what:?} {what:#?}").unwrap();
    say(store);
    let claim = store.claim(Key::from("k").fingerprint("p")).wait().unwrap();
    say(&claim);
    say(&store.claim("k").wait());
    say(&store.claim(Key::from("k").fingerprint("q")).wait());
    say(&store.inspect("k").wait());
    drop(claim);
    say(&store.held().wait());
    say(&store.check_batch(["k", "new"]).wait());
    say(&store.resolve("k", Resolution::Completed(b"r".to_vec())).wait());
    say(&store.resolve("k", Resolution::Rerun).wait());
    say(&store.inspect("k").wait());
    say(&store.record_batch(["k", "other"]).wait());
    say(&store.claim("").wait());
    say(&store.claim("k".repeat(2_000)).wait());
    say(&store.claim_batch(["1", "2", "3", "4", "5"]).wait());
    say(&store.run("run", |lease| Err::<Vec<u8>, _>(format!("{lease:?}"))));
    store.flush().unwrap();
    say(&store.stats());
    say(&bench.builder().open(bench.path()));
    store.close().wait().unwrap();
    say(&store.claim("k").wait());

    let secret = secret(&bench.path());
    assert!(!secret.iter().all(|byte| *byte == 0));
    let list = |bytes: &[u8]| format!("{bytes:?}").trim_matches(['[', ']']).to_owned();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    // In all ways of writing it, and each half of it as the number that SipHash takes it for.
    for half in secret.chunks(8) {
        let number: [u8; 8] = half.try_into().unwrap();
        let (number, turned) = (u64::from_le_bytes(number), u64::from_be_bytes(number));
        let forms = [list(half), hex(half), format!("{}", half.escape_ascii()), number.to_string(), turned.to_string()];
        for form in forms.into_iter().chain([format!("{number:x}"), format!("{turned:x}")]) {
            assert!(!said.to_lowercase().contains(&form.to_lowercase()), "{form} is in {said}");
        }
        // On disk it lies in the database, which only the owner reads, and nowhere else.
        let holders = files(&bench.path())
            .into_iter()
            .filter(|file| fs::read(file).unwrap().windows(half.len()).any(|window| window == half));
        let holders: Vec<PathBuf> = holders.collect();
        assert!(!holders.is_empty(), "this test would not find it");
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
fn a_gigabyte_of_result_is_not_kept_and_not_copied() {
    // Zeros that nobody touches take no memory before somebody copies them.
    let huge = || vec![0_u8; 1 << 30];
    let growth = memory_growth("a_gigabyte_of_result_is_not_kept_and_not_copied", || {
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
        assert_eq!(result.len(), 1 << 30, "whoever did the work has the result");
        assert!(omitted("run"));
        drop(bench.acquire("held"));
        store.resolve("held", Resolution::Completed(huge())).wait().unwrap();
        assert!(omitted("held"));

        // Each of them would be kept, and all of them are too much for one call.
        let keys: Vec<String> = (0..17).map(|i| format!("batch-{i}")).collect();
        let leases = store.claim_batch(&keys).wait().unwrap().into_iter().map(|claim| match claim.unwrap() {
            Claim::Acquired(lease) => (lease, vec![0_u8; 64 << 20]),
            other => panic!("{other:?}"),
        });
        for refused in store.complete_batch(leases).wait() {
            let refused = refused.unwrap_err();
            assert!(matches!(refused.error(), Error::BatchTooLarge { limit, .. } if *limit == 1 << 30), "{refused}");
            assert_eq!(refused.outcome(), Outcome::NotWritten);
            let (_, completion, lease) = refused.into_parts();
            assert_eq!(completion.result().len(), 64 << 20);
            lease.expect("it is still good").complete("small").wait().unwrap();
        }
        assert!(keys.iter().all(|key| bench.completed(key).unwrap() == b"small"));
        store.close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE, "{growth}");
}

#[test]
fn a_flood_of_results_at_the_limit_stays_in_the_budget() {
    let growth = memory_growth("a_flood_of_results_at_the_limit_stays_in_the_budget", || {
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
fn a_million_new_keys_stay_in_the_budget() {
    let growth = memory_growth("a_million_new_keys_stay_in_the_budget", || {
        let bench = Bench::new();
        let key = |i: u32| format!("{i:032x}-of-a-stranger");
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
fn dropped_claims_take_no_memory_of_their_own() {
    let growth = memory_growth("dropped_claims_take_no_memory_of_their_own", || {
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
fn claims_that_nobody_completes_end_at_the_limit_and_take_their_keys_and_little_more() {
    const LIMIT: u64 = 100_000;
    const KEY: u64 = 1_024;
    let test = "claims_that_nobody_completes_end_at_the_limit_and_take_their_keys_and_little_more";
    let growth = memory_growth(test, || {
        let bench = Bench::with(|builder| builder.in_flight_limit(LIMIT as usize));
        let (mut acquired, mut refused) = (0, 0);
        for start in (0..2 * LIMIT).step_by(500) {
            for claim in bench.store().claim_batch((start..start + 500).map(|i| format!("{i:01024}"))).wait().unwrap() {
                match claim {
                    Ok(Claim::Acquired(lease)) => {
                        // Its work hangs.
                        std::mem::forget(lease);
                        acquired += 1;
                    }
                    Err(Error::TooManyInFlight { limit, .. }) if limit as u64 == LIMIT => refused += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!((acquired, refused), (LIMIT, LIMIT));
        assert_eq!(bench.store().stats().in_flight, LIMIT);
        bench.store().close().wait().unwrap();
    });
    assert!(growth < BUDGET + BESIDE + LIMIT * (6 * KEY + 250), "{growth}");
}

#[test]
fn a_call_of_a_million_keys_is_one_call_and_one_without_an_end_is_refused_unread() {
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
    assert_eq!(read.get(), 3 * ((1 << 30) / 65_536 + 1), "no more of it is read");
    assert_eq!(bench.store().check(&long).wait().unwrap(), KeyStatus::New);
    assert_eq!(bench.store().stats().in_flight, 0);
}

// ---------------------------------------------------------------------------------------------------------------
// Bytes of any kind
// ---------------------------------------------------------------------------------------------------------------

/// Every form a stranger's bytes can come in.
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
fn every_verb_takes_keys_of_any_bytes() {
    let mut bench = Bench::new();
    let keys: Vec<Key<'static>> = ODD.iter().flat_map(|bytes| forms(bytes)).collect();
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
        let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is free") };
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
fn a_held_key_of_any_bytes_is_listed_as_it_is_and_resolved_by_that_name() {
    let mut bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    let keys: HashSet<Key<'static>> = ODD.iter().flat_map(|bytes| forms(bytes)).collect();
    for claim in bench.store().claim_batch(&keys).wait().unwrap() {
        assert!(matches!(claim.unwrap(), Claim::Acquired(_)));
    }
    bench.reopen();
    let held = bench.store().held().wait().unwrap();
    assert_eq!(held.iter().map(|held| held.key.clone()).collect::<HashSet<_>>(), keys);
    for held in &held {
        let shown = format!("{} {:?}", held.key, held);
        assert!(!shown.contains(char::is_control), "{shown:?} does something to a terminal");
        bench.store().resolve(&held.key, Resolution::Completed(b"decided".to_vec())).wait().unwrap();
    }
    assert!(bench.store().held().wait().unwrap().is_empty());
    let checks = bench.store().check_batch(&keys).wait().unwrap();
    assert!(checks.into_iter().all(|check| matches!(check, Ok(KeyStatus::Completed(_)))));
}

#[test]
fn errors_show_odd_keys_escaped_and_cut() {
    let bench = Bench::with(|builder| builder.key_limit(100));
    for bytes in ODD {
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
fn no_scope_and_key_are_another_scope_and_key() {
    // Bytes that stand for lengths and tags of the encoding, in every order.
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
        let leases = claims.into_iter().enumerate().map(|(place, claim)| match claim.unwrap() {
            Claim::Acquired(lease) => (lease, (start * 4_000 + place).to_string()),
            other => panic!("{} is another: {other:?}", batch[place]),
        });
        assert!(bench.store().complete_batch(leases).wait().into_iter().all(|completed| completed.is_ok()));
    }
    bench.store().flush().unwrap();
    bench.reopen();
    for (place, check) in bench.store().check_batch(&keys).wait().unwrap().into_iter().enumerate() {
        let Ok(KeyStatus::Completed(completed)) = check else { panic!("{}: {check:?}", keys[place]) };
        assert_eq!(completed.result().unwrap(), place.to_string().as_bytes(), "{}", keys[place]);
    }
    assert!(keys.len() > 25_000, "{} keys", keys.len());
}

#[test]
fn a_scope_neither_sees_nor_blocks_what_is_in_another() {
    let mut bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    let key = |scope: &'static str| Key::from("order-1").scope(scope);
    let store = bench.store();
    let Claim::Acquired(theirs) = store.claim(key("theirs").fingerprint("their payload")).wait().unwrap() else {
        panic!()
    };
    // In progress there is new here, with any payload; whatever is done here changes nothing there.
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
fn a_scope_that_fills_the_store_keeps_others_from_new_claims_and_from_nothing_else() {
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
        "the limit is the store's"
    );
    assert!(matches!(bench.store().claim(Key::from("done").scope("ours")).wait().unwrap(), Claim::Completed(_)));
    assert_eq!(bench.store().check(new()).wait().unwrap(), KeyStatus::New);
    assert_eq!(bench.store().record(Key::from("recorded").scope("ours")).wait().unwrap(), RecordOutcome::First);
    at_work.complete("r").wait().unwrap();
    assert!(matches!(bench.store().claim(new()).wait().unwrap(), Claim::Acquired(_)), "there is room for one again");
}

// ---------------------------------------------------------------------------------------------------------------
// Limits
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn keys_at_the_limit_are_taken_by_every_verb_and_over_it_by_none() {
    for limit in [1, 300, 65_535] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::builder().key_limit(limit).open(dir.path().join("store")).unwrap();
        let bytes = |len: usize| vec![0xff; len];
        let (most, over) = (bytes(limit), bytes(limit + 1));
        let is_refused = |error: Error| match error {
            Error::Key(KeyError::TooLong { len, limit: said, .. }) => (len, said) == (limit + 1, limit),
            Error::Key(KeyError::Empty { .. }) => false,
            other => panic!("{other}"),
        };
        let mut too_long = vec![Key::from(&over)];
        if limit > 255 {
            // A scope counts with its key.
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
            // It may have been claimed when the limit was higher, though there is one for all stores.
            if limit == 65_535 {
                assert!(is_refused(store.inspect(&key).wait().unwrap_err()));
                assert!(is_refused(store.forget(&key).wait().unwrap_err()));
                assert!(is_refused(store.resolve(&key, Resolution::Rerun).wait().unwrap_err()));
            } else {
                assert_eq!(store.inspect(&key).wait().unwrap(), None);
                assert!(!store.forget(&key).wait().unwrap());
                assert!(matches!(store.resolve(&key, Resolution::Rerun).wait(), Err(Error::NotHeld { .. })));
            }
            assert!(store.run(&key, |_| -> Result<_, Error> { panic!("the work is not begun") }).is_err());
            // One of them refuses its batch, and nothing of it is done.
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
fn a_key_that_refuses_its_batch_is_named_by_its_place() {
    let bench = Bench::with(|builder| builder.key_limit(300));
    let stream = Bench::with(|builder| builder.key_limit(300).stream_time(Duration::from_secs(10)));
    let (long, scope) = ("k".repeat(301), "s".repeat(256));
    for bad in [Key::from(""), Key::from(&long), Key::from("k").scope(&scope)] {
        let key = || bad.clone();
        let said = |place: usize| {
            let batch = || (0..3).map(|i| if i == place { key() } else { Key::from(format!("key {i}")) });
            let messages = || batch().map(|key| (key, common::START_MS));
            let (store, stream) = (bench.store(), stream.store());
            [
                store.claim_batch(batch()).wait().unwrap_err(),
                store.record_batch(batch()).wait().unwrap_err(),
                store.check_batch(batch()).wait().unwrap_err(),
                stream
                    .claim_batch(
                        (messages()).into_iter().map(|(key, ms)| Key::from(key).at(Timestamp::from_unix_ms(ms))),
                    )
                    .wait()
                    .unwrap_err(),
                stream
                    .record_batch(
                        (messages()).into_iter().map(|(key, ms)| Key::from(key).at(Timestamp::from_unix_ms(ms))),
                    )
                    .wait()
                    .unwrap_err(),
                stream
                    .check_batch(
                        (messages()).into_iter().map(|(key, ms)| Key::from(key).at(Timestamp::from_unix_ms(ms))),
                    )
                    .wait()
                    .unwrap_err(),
            ]
        };
        for place in 0..3 {
            for error in said(place) {
                let (Error::Key(KeyError::Empty { index: at })
                | Error::Key(KeyError::TooLong { index: at, .. })
                | Error::Key(KeyError::ScopeTooLong { index: at, .. })) = &error
                else {
                    panic!("{error:?}")
                };
                assert_eq!(*at, Some(place), "{error}");
                assert!(error.to_string().contains(&format!(" at index {place} of the batch")), "{error}");
            }
        }
        for error in
            [bench.store().claim(key()).wait().unwrap_err(), bench.store().claim_batch([key()]).wait().unwrap_err()]
        {
            assert!(!error.to_string().contains("position"), "{error}");
        }
    }
    assert_eq!(bench.store().stats().in_flight, 0, "nothing of a batch that is refused is done");
}

#[test]
fn keys_and_results_that_are_over_a_limit_by_now_are_still_read() {
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
    store.resolve(&listed[0].key, Resolution::Completed(b"by hand".to_vec())).wait().unwrap();
    for (key, result) in [(&held, &b"by hand"[..]), (&done, &[7; 3_000])] {
        let stored = store.inspect(key).wait().unwrap();
        assert!(matches!(&stored, Some(StoredKey::Completed(first)) if first.result() == Some(result)), "{stored:?}");
        assert!(store.forget(key).wait().unwrap());
    }
}

#[test]
fn offsets_and_messages_with_names_of_any_length_are_read_back() {
    // A child of another test holds our locks from its fork to its exec.
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
fn a_payload_that_differs_is_told_nothing_of_the_first_one() {
    let mut bench = Bench::new();
    let guarded = |key: &'static str, payload: &'static [u8]| Key::from(key).fingerprint(payload);
    let lease = match bench.store().claim(guarded("k", b"amount=12")).wait().unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{other:?}"),
    };
    // The empty one is a payload, and so is one that differs in its end or its length alone.
    let others: [&[u8]; 5] = [b"", b"amount=13", b"amount=1", b"amount=12\0", b"\xffamount=12"];
    let refused = |bench: &Bench| {
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
    refused(&bench);
    lease.complete("a secret result").wait().unwrap();
    refused(&bench);
    bench.store().flush().unwrap();
    refused(&bench);
    bench.reopen();
    refused(&bench);
    let Claim::Completed(first) = bench.store().claim(guarded("k", b"amount=12")).wait().unwrap() else { panic!() };
    assert_eq!(first.result(), Some(&b"a secret result"[..]));
    assert_eq!(bench.completed("k").unwrap(), b"a secret result", "a call without a payload is not checked");
}

// ---------------------------------------------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------------------------------------------

/// Makes a store with all kinds of files in it, in a directory that anybody may enter.
fn fill(path: &Path) {
    let clock = onlyonce::ManualClock::at(Timestamp::from_unix_ms(common::START_MS));
    let open = || {
        let builder = Store::builder().window(Duration::from_secs(10)).bucket(Duration::from_secs(1));
        builder.clock(clock.clone()).open(path).unwrap()
    };
    for life in 0..2 {
        let store = open();
        for i in 0..3 {
            store.record(format!("key-{life}-{i}")).wait().unwrap();
            store.flush().unwrap();
            clock.advance(Duration::from_secs(1));
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while fs::read_dir(path.join("filters")).unwrap().count() < 2 {
            assert!(std::time::Instant::now() < deadline, "no filters are kept");
            std::thread::sleep(Duration::from_millis(20));
        }
        store.close().wait().unwrap();
    }
}

#[test]
fn a_store_lets_only_its_owner_in_whatever_the_mask_for_new_files() {
    let test = "a_store_lets_only_its_owner_in_whatever_the_mask_for_new_files";
    if child::is_child(test) {
        fill(Path::new(&std::env::var("ONLYONCE_TEST_STORE").unwrap()));
        return;
    }
    let as_root = fs::metadata("/proc/self").is_ok_and(|of| std::os::unix::fs::MetadataExt::uid(&of) == 0);
    for (mask, made_before) in [("000", false), ("000", true), ("022", false), ("077", false)] {
        let dir = tempfile::tempdir().unwrap();
        // Nothing above the store keeps anybody out.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let store = dir.path().join("store");
        if made_before {
            fs::create_dir(&store).unwrap();
            fs::set_permissions(&store, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let alone = child::command(test);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("umask {mask} && exec \"$0\" \"$@\"")).arg(alone.get_program());
        shell.args(alone.get_args()).envs(alone.get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.env("ONLYONCE_TEST_STORE", &store).stdout(Stdio::null());
        assert!(shell.status().unwrap().success());

        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        if !made_before {
            assert_eq!(mode(&store), 0o700, "with the mask {mask}");
        }
        let found = files(&store);
        let endings = ["sst", "filter", "lock", "files"];
        assert!(endings.iter().all(|ending| found.iter().any(|file| file.extension().is_some_and(|it| it == *ending))));
        for file in &found {
            let guard = file.parent().unwrap();
            if guard == store {
                assert_eq!(mode(file), 0o600, "{} with the mask {mask}", file.display());
            } else {
                // RocksDB makes its files readable as the mask lets it: the directory keeps others from them.
                assert_eq!(mode(guard), 0o700, "{} with the mask {mask}", guard.display());
            }
            if as_root {
                let mut stranger = Command::new("cat");
                stranger.arg(file).uid(65_534).gid(65_534).stdout(Stdio::null()).stderr(Stdio::null());
                assert!(!stranger.status().unwrap().success(), "a stranger read {}", file.display());
            }
        }
        if as_root {
            let probe = dir.path().join("probe");
            fs::write(&probe, "anybody may read this").unwrap();
            fs::set_permissions(&probe, fs::Permissions::from_mode(0o644)).unwrap();
            let mut stranger = Command::new("cat");
            stranger.arg(probe).uid(65_534).gid(65_534).stdout(Stdio::null());
            assert!(stranger.status().unwrap().success(), "a stranger can read nothing here at all");
        }
    }
}
