//! A program that uses this crate starts on a host without rdma-core: the libraries are opened when RDMA is first asked
//! for. Alone in its file, because other tests of one process ask for it.

use std::fs;
use std::sync::Arc;

use rdma_fallback::rdma::{Choice, RdmaOptions, Transports, probe};
use rdma_fallback::{Region, Span, Wire, memory_pair};

const LIBRARIES: [&str; 2] = ["libibverbs", "librdmacm"];

#[test]
fn the_libraries_are_opened_only_when_rdma_is_asked_for() {
    let region = Arc::new(Region::new(4096).unwrap());
    let options = RdmaOptions::default();
    // Everything that a verb could be called from is linked into this program.
    let transports = Transports::new(Choice::Auto, options, Arc::clone(&region)).unwrap();
    let (wire, _) =
        memory_pair(Arc::clone(&region), Span::default(), region, Span::default()).unwrap();
    assert!(matches!(wire, Wire::Memory(_)), "{transports:?}");
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    for library in LIBRARIES {
        assert!(!maps.contains(library), "the program needs {library} to start");
    }
    match probe() {
        Ok(devices) => println!("{devices:?}"),
        Err(error) => println!("{error}"),
    }
}
