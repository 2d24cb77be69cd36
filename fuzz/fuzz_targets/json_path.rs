#![no_main]

#[path = "../../src/bin/onlyonce/json_field.rs"]
mod json_field;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| json_field::law(bytes));
