#![no_main]

#[path = "../../crates/cli/src/json_field.rs"]
mod json_field;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| json_field::fuzz_check(bytes));
