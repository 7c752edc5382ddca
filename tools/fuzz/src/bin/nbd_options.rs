//! Fuzz target `nbd_options`: see `twinpoint_fuzz::TARGETS`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    twinpoint_fuzz::run("nbd_options", input);
});
