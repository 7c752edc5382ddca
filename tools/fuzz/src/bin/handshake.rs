//! Fuzz target `handshake`: see `twinpoint_fuzz::TARGETS`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    twinpoint_fuzz::run("handshake", input);
});
