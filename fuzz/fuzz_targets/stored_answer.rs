#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| onlyonce::laws::stored_answer(bytes));
