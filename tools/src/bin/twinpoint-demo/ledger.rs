//! Ledger: a volume in which every entry is written and flushed before the next. After the first node's death the
//! second one has to have every entry whose flush was answered.
//!
//! Invariants: entry `n` fills page `n % PAGES`; entries begin with 1, so a page of zeroes holds none.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crate::nbd_client::NbdClient;
use crate::trouble::{Difference, Trouble};

/// Pages of the ledger.
const PAGES: u64 = 1024;
const PAGE_BYTES: usize = 4096;
/// Bytes of the volume.
pub const LEDGER_BYTES: u64 = PAGES * PAGE_BYTES as u64;

/// Writes entries until the node is gone, or the ledger is dropped.
pub struct Ledger {
    flushed: Arc<AtomicU64>,
    is_closed: Arc<AtomicBool>,
    writer: Option<JoinHandle<()>>,
}

impl Ledger {
    /// Begins to write.
    ///
    /// # Errors
    /// If the volume cannot be opened.
    pub fn open(socket: PathBuf, volume: &str) -> Result<Ledger, Trouble> {
        let mut client = NbdClient::open(&socket, volume)?;
        let (flushed, is_closed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, end) = (Arc::clone(&flushed), Arc::clone(&is_closed));
        let writer = thread::spawn(move || {
            for entry in 1.. {
                let written =
                    client.write(offset(entry), &page(entry)).and_then(|()| client.flush());
                if written.is_err() || end.load(Ordering::Relaxed) {
                    return;
                }
                counter.store(entry, Ordering::Release);
            }
        });
        Ok(Ledger { flushed, is_closed, writer: Some(writer) })
    }

    /// The newest entry whose flush was answered.
    pub fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// Waits for the writer, whose node has been killed. Returns the newest entry whose flush was answered.
    pub fn close(mut self) -> u64 {
        if let Some(writer) = self.writer.take() {
            writer.join().expect("the writer does not panic");
        }
        self.flushed()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }
}

/// Reads the ledger back.
///
/// # Errors
/// If an entry up to `flushed` is missing, or one is there that was never written.
pub fn verify(client: &mut NbdClient, flushed: u64) -> Result<(), Trouble> {
    let mut bytes = vec![0; PAGE_BYTES];
    for number in 0..PAGES {
        client.read(number * PAGE_BYTES as u64, &mut bytes)?;
        let found = u64::from_le_bytes(bytes[..8].try_into().expect("a page is longer"));
        // The last entry may have been written without its answer.
        let last = newest_on(number, flushed);
        let is_next = found == flushed + 1 && found % PAGES == number;
        let is_whole = bytes.chunks_exact(8).all(|word| word == found.to_le_bytes());
        if !is_whole || (found != last && !is_next) {
            return Err(Trouble::Differs(Difference::Ledger {
                page: number,
                flushed: last,
                found,
            }));
        }
    }
    Ok(())
}

/// The newest entry up to `flushed` that belongs on a page; 0 if there is none.
fn newest_on(page: u64, flushed: u64) -> u64 {
    let behind = (flushed % PAGES + PAGES - page) % PAGES;
    flushed.saturating_sub(behind)
}

fn offset(entry: u64) -> u64 {
    entry % PAGES * PAGE_BYTES as u64
}

fn page(entry: u64) -> Vec<u8> {
    entry.to_le_bytes().repeat(PAGE_BYTES / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_entry_of_each_page() {
        assert_eq!(newest_on(0, 0), 0);
        assert_eq!(newest_on(5, 4), 0);
        assert_eq!(newest_on(4, 4), 4);
        assert_eq!(newest_on(0, PAGES), PAGES);
        assert_eq!(newest_on(1, PAGES), 1);
        assert_eq!(newest_on(2, PAGES + 2), PAGES + 2);
        assert_eq!(newest_on(3, PAGES + 2), 3);
        for flushed in 0..3 * PAGES {
            for page in [0, 1, 500, PAGES - 1] {
                let newest = newest_on(page, flushed);
                assert!(newest == 0 || newest % PAGES == page, "{page} {flushed}");
                assert!(newest <= flushed);
            }
        }
    }
}
