#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| onlyonce_journal::fuzz_checks::recovery(bytes));
