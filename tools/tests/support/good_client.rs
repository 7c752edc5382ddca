//! Good client: works all the time while others misbehave, and notices if that disturbs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::nbd_client::NbdClient;
use super::node::Node;
use super::pair::VOLUME;
use super::sector::{self, BLOCK_SECTORS, SECTOR_BYTES};

/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(1);

/// A client that writes, reads back and flushes all the time.
pub struct GoodClient {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

impl GoodClient {
    /// Connects and begins.
    pub fn start(node: &Node) -> GoodClient {
        let mut client = node.client(VOLUME);
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, done) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            while !stopping.load(Ordering::SeqCst) {
                let round = done.load(Ordering::SeqCst) + 1;
                good_round(&mut client, round)?;
                done.store(round, Ordering::SeqCst);
                // Without its peer the node keeps all versions since the last common CP: not too many of them.
                std::thread::sleep(PAUSE);
            }
            Ok(())
        });
        GoodClient { stop, rounds, thread }
    }

    /// Checks that it gets on.
    #[track_caller]
    pub fn assert_works(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(15);
        while self.rounds.load(Ordering::SeqCst) < before + 3 {
            assert!(!self.thread.is_finished(), "the good client failed");
            assert!(Instant::now() < deadline, "the good client hangs");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops it, and checks that it never failed.
    #[track_caller]
    pub fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let result = self.thread.join().expect("the good client does not panic");
        assert_eq!(result, Ok(()));
        println!("the good client did {} rounds", self.rounds.load(Ordering::SeqCst));
    }
}

fn good_round(client: &mut NbdClient, round: u64) -> Result<(), String> {
    let text = |error: std::io::Error| format!("round {round}: {error}");
    // Bad commands of these tests may write the first 16 KiB and the last sector, so this stays away from them.
    let block = 1024 + round % 500;
    let bytes = sector::fill(block * BLOCK_SECTORS, round, BLOCK_SECTORS);
    let offset = block * BLOCK_SECTORS * SECTOR_BYTES as u64;
    client.write(offset, &bytes).map_err(text)?;
    if round.is_multiple_of(16) {
        client.flush().map_err(text)?;
    }
    let found = client.read(offset, bytes.len()).map_err(text)?;
    if found == bytes { Ok(()) } else { Err(format!("round {round}: reads something else")) }
}
