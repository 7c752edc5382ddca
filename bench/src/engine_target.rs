//! The engine without a socket: a local client of a node in this process.

use std::time::{Duration, Instant};

use twinpoint_runtime::local::{Completion, LocalClient, LocalVolume, SubmitError};

use crate::failure::Failure;
use crate::load::Target;

/// How long the client polls before it sleeps: the common answer comes within it.
const POLL: Duration = Duration::from_micros(20);

/// See the module.
pub struct EngineTarget {
    client: LocalClient,
    volume: LocalVolume,
    completions: Vec<Completion>,
}

impl EngineTarget {
    /// A client that has a volume open.
    pub fn new(client: LocalClient, volume: LocalVolume) -> EngineTarget {
        EngineTarget { client, volume, completions: Vec::new() }
    }
}

impl Target for EngineTarget {
    fn write(&mut self, offset: u64, bytes: &[u8], id: usize) -> Result<bool, Failure> {
        taken(self.client.write(self.volume, offset, bytes, id as u64))
    }

    fn flush(&mut self, id: usize) -> Result<bool, Failure> {
        taken(self.client.flush(id as u64))
    }

    fn wait(&mut self, ended: &mut Vec<usize>) -> Result<(), Failure> {
        let before = ended.len();
        self.poll(ended)?;
        let until = Instant::now() + POLL;
        while ended.len() == before && Instant::now() < until {
            // The worker may have been put on the same core: then only giving way brings the answer.
            std::thread::yield_now();
            self.poll(ended)?;
        }
        if ended.len() == before {
            self.client.wait();
            self.poll(ended)?;
        }
        Ok(())
    }

    fn volume_bytes(&self) -> u64 {
        self.volume.size_bytes
    }
}

impl EngineTarget {
    fn poll(&mut self, ended: &mut Vec<usize>) -> Result<(), Failure> {
        self.client.poll(&mut self.completions);
        for completion in self.completions.drain(..) {
            completion.result.map_err(Failure::Command)?;
            ended.push(completion.user_data as usize);
        }
        if self.client.is_over() { Err(Failure::Submit(SubmitError::Over)) } else { Ok(()) }
    }
}

fn taken(result: Result<(), SubmitError>) -> Result<bool, Failure> {
    match result {
        Ok(()) => Ok(true),
        Err(SubmitError::NoMemory | SubmitError::TooMany) => Ok(false),
        Err(error) => Err(Failure::Submit(error)),
    }
}
