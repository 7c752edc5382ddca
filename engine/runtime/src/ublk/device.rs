//! A block device of the kernel: made, taken over from a process before, stopped, deleted.
//!
//! ```text
//!   add -> parameters -> open, map -> queues to the workers -> start         a new one
//!   start recovery    -> open, map -> queues to the workers -> end recovery   one whose server died
//! ```
//!
//! Invariants: a device is ours if it bears the mark of store and volume, and is taken over only in the term in which it
//! was made: in another term the volume may have been written elsewhere, behind the back of who has the device open.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use twinpoint_core::units::{StoreId, VolumeId};

use super::abi::{self, INFO_BYTES, Info, Parameters};
use super::error::UblkError;
use super::kernel::{ControlRing, Descriptions, open_character};
use super::request::{REQUEST_BYTES_MAX, UNMAP_BYTES_MAX};
use crate::cut::STRIPE;
use crate::nbd::Export;

/// Requests of one queue that the kernel sends at a time.
const QUEUE_DEPTH: u16 = 128;
/// How long a command that waits for nobody may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How long a device may take to start, and to be stopped: requests under way are answered first.
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long the kernel may take to let go of a process that died: at worst its time for a request, 30 seconds.
const DEATH_LIMIT: Duration = Duration::from_secs(45);
/// How long the character device's name may take to appear.
const NAME_LIMIT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(50);

const NEEDED: u64 =
    abi::FEATURE_RECOVERY | abi::FEATURE_REISSUE | abi::FEATURE_ENCODED | abi::FEATURE_USER_COPY;

/// What the workers need of a device. The last one to drop it closes it.
pub(crate) struct Device {
    pub id: u32,
    pub queues: u16,
    pub depth: u16,
    pub export: Export,
    /// Changes are answered when they are durable: then the device outlives its server.
    pub writes_through: bool,
    /// The descriptions of each queue; unmapped before the file is closed.
    pub(super) descriptions: Vec<Descriptions>,
    pub(super) file: File,
    /// It did not start: its queues are served by nobody.
    pub(super) is_given_up: AtomicBool,
}

impl Device {
    pub fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Acquire)
    }

    fn unless_given_up(
        self: Arc<Device>,
        started: Result<(), UblkError>,
    ) -> Result<Arc<Device>, UblkError> {
        self.is_given_up.store(started.is_err(), Ordering::Release);
        started.map(|()| self)
    }
}

/// Whose device it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mark {
    store_and_volume: u32,
    term: u32,
}

impl Mark {
    pub fn new(store: StoreId, volume: VolumeId, term: u64) -> Mark {
        let mut bytes = [0; 20];
        bytes[..16].copy_from_slice(&store.0);
        bytes[16..].copy_from_slice(&volume.0.to_le_bytes());
        // The low half of a term tells any two terms of one store apart that can meet.
        Mark { store_and_volume: crc_fast::crc32_iscsi(&bytes), term: term as u32 }
    }

    fn encode(self) -> u64 {
        u64::from(self.store_and_volume) << 32 | u64::from(self.term)
    }

    fn is_ours(self, info: &Info) -> bool {
        info.mark >> 32 == u64::from(self.store_and_volume)
    }
}

/// What a device is to be.
pub(super) struct Plan {
    pub id: Option<u32>,
    pub export: Export,
    pub mark: Mark,
    pub workers: u16,
    pub writes_through: bool,
}

/// Gives the queues of a device to the workers; false if there are none.
pub(super) type Attach<'a> = &'a dyn Fn(&Arc<Device>) -> bool;

/// The kernel's devices.
pub(super) struct Devices {
    ring: ControlRing,
}

impl Devices {
    /// Opens the driver.
    ///
    /// # Errors
    /// If it is not there, or too old.
    pub fn open() -> Result<Devices, UblkError> {
        let mut devices = Devices { ring: ControlRing::open()? };
        let mut bytes = [0; 8];
        match devices.ring.command(abi::GET_FEATURES, abi::ANY_ID, &mut bytes, 0, COMMAND_LIMIT)? {
            Some(0) if u64::from_ne_bytes(bytes) & NEEDED == NEEDED => Ok(devices),
            Some(errno) if -errno == libc::EPERM || -errno == libc::EACCES => {
                Err(UblkError::Forbidden(io::Error::from_raw_os_error(-errno)))
            }
            _ => Err(UblkError::TooOld),
        }
    }

    /// Makes the device, or takes over the one that is there. Tells whether it was taken over.
    pub fn bring_up(
        &mut self,
        plan: &Plan,
        attach: Attach<'_>,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(Arc<Device>, bool), UblkError> {
        let Some(found) = self.find(plan)? else { return self.add(plan, attach) };
        if !plan.mark.is_ours(&found) {
            return Err(UblkError::IdInUse { id: found.id, process: found.process });
        }
        let info = self.wait_for_death(found, is_over)?;
        let same_term = info.mark == plan.mark.encode();
        if info.state == abi::STATE_QUIESCED && same_term {
            let device = self.recover(&info, plan.export, attach)?;
            return Ok((device, true));
        }
        if info.state == abi::STATE_QUIESCED {
            eprintln!(
                "twinpoint: /dev/ublkb{}: the volume was served elsewhere since: whoever has it open gets errors, \
                 and it is made anew",
                info.id
            );
        }
        self.delete(info.id)?;
        self.add(plan, attach)
    }

    /// Ends a device: requests under way are answered, later ones fail. Delete it when nobody has its file open.
    pub fn stop(&mut self, id: u32) -> Result<(), UblkError> {
        self.command("stop", abi::STOP_DEVICE, id, 0, STOP_LIMIT)
    }

    /// Deletes a device that nobody serves.
    pub fn delete(&mut self, id: u32) -> Result<(), UblkError> {
        self.command("delete", abi::DELETE_DEVICE, id, 0, STOP_LIMIT)
    }

    /// The device of the plan's id, or, without one, any of the same volume.
    fn find(&mut self, plan: &Plan) -> Result<Option<Info>, UblkError> {
        if let Some(id) = plan.id {
            return self.info(id);
        }
        let Ok(entries) = std::fs::read_dir(Path::new("/sys/class/ublk-char")) else {
            return Ok(None);
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.strip_prefix("ublkc")?.parse().ok());
            let Some(id) = id else { continue };
            if let Some(info) = self.info(id)?.filter(|info| plan.mark.is_ours(info)) {
                return Ok(Some(info));
            }
        }
        Ok(None)
    }

    fn info(&mut self, id: u32) -> Result<Option<Info>, UblkError> {
        let mut bytes = [0; INFO_BYTES];
        match self.ring.command(abi::GET_INFO, id, &mut bytes, 0, COMMAND_LIMIT)? {
            Some(0) => Ok(Some(Info::decode(&bytes))),
            Some(errno) if -errno == libc::ENODEV => Ok(None),
            Some(errno) => Err(UblkError::Command { what: "describe", id, errno: -errno }),
            None => Err(UblkError::Silent { what: "describe", id }),
        }
    }

    /// One node alone has the store, so the server of a live device of ours is dying: the kernel is to notice.
    fn wait_for_death(
        &mut self,
        mut info: Info,
        is_over: &dyn Fn() -> bool,
    ) -> Result<Info, UblkError> {
        let began = Instant::now();
        while info.state == abi::STATE_LIVE {
            if began.elapsed() > DEATH_LIMIT || is_over() {
                return Err(UblkError::Held { id: info.id });
            }
            thread::sleep(PAUSE);
            let gone = UblkError::Command { what: "describe", id: info.id, errno: libc::ENODEV };
            info = self.info(info.id)?.ok_or(gone)?;
        }
        Ok(info)
    }

    fn add(&mut self, plan: &Plan, attach: Attach<'_>) -> Result<(Arc<Device>, bool), UblkError> {
        let recovery = abi::FEATURE_RECOVERY | abi::FEATURE_REISSUE;
        let id = plan.id.unwrap_or(abi::ANY_ID);
        let wanted = Info {
            queues: plan.workers,
            depth: QUEUE_DEPTH,
            request_bytes_max: REQUEST_BYTES_MAX,
            id,
            process: std::process::id() as i32,
            flags: abi::FEATURE_USER_COPY
                | abi::FEATURE_ENCODED
                | if plan.writes_through { recovery } else { 0 },
            mark: plan.mark.encode(),
            ..Info::default()
        };
        let mut bytes = wanted.encode();
        checked("add", id, self.ring.command(abi::ADD_DEVICE, id, &mut bytes, 0, COMMAND_LIMIT)?)?;
        let info = Info::decode(&bytes);
        let started = self.start(&info, plan.export, attach);
        if started.is_err() {
            // The first error is the one to tell; the node's own part of the device is closed by now, or soon.
            _ = self.stop(info.id);
            _ = self.delete(info.id);
        }
        started.map(|device| (device, false))
    }

    fn start(
        &mut self,
        info: &Info,
        export: Export,
        attach: Attach<'_>,
    ) -> Result<Arc<Device>, UblkError> {
        let parameters = Parameters {
            size_bytes: export.size_bytes,
            request_bytes_max: REQUEST_BYTES_MAX,
            stripe_bytes: STRIPE as u32,
            unmap_bytes_max: UNMAP_BYTES_MAX,
            is_volatile: info.flags & abi::FEATURE_RECOVERY == 0,
        };
        let mut bytes = parameters.encode();
        let done = self.ring.command(abi::SET_PARAMETERS, info.id, &mut bytes, 0, COMMAND_LIMIT)?;
        checked("set up", info.id, done)?;
        let device = open(info, export)?;
        if !attach(&device) {
            return Err(UblkError::NodeEnds);
        }
        let process = u64::from(std::process::id());
        let started = self.command("start", abi::START_DEVICE, info.id, process, START_LIMIT);
        device.unless_given_up(started)
    }

    fn recover(
        &mut self,
        info: &Info,
        export: Export,
        attach: Attach<'_>,
    ) -> Result<Arc<Device>, UblkError> {
        let began = Instant::now();
        loop {
            match self.command("take over", abi::START_RECOVERY, info.id, 0, COMMAND_LIMIT) {
                Err(UblkError::Command { errno: libc::EBUSY, .. })
                    if began.elapsed() < DEATH_LIMIT =>
                {
                    thread::sleep(PAUSE);
                }
                done => break done?,
            }
        }
        let device = open(info, export)?;
        if !attach(&device) {
            return Err(UblkError::NodeEnds);
        }
        let process = u64::from(std::process::id());
        let ended = self.command("take over", abi::END_RECOVERY, info.id, process, START_LIMIT);
        device.unless_given_up(ended)
    }

    fn command(
        &mut self,
        what: &'static str,
        command: u32,
        id: u32,
        number: u64,
        limit: Duration,
    ) -> Result<(), UblkError> {
        let done = self.ring.command(command, id, &mut [], number, limit)?;
        checked(what, id, done)
    }
}

fn checked(what: &'static str, id: u32, result: Option<i32>) -> Result<(), UblkError> {
    match result {
        None => Err(UblkError::Silent { what, id }),
        Some(result) if result < 0 => Err(UblkError::Command { what, id, errno: -result }),
        Some(_) => Ok(()),
    }
}

/// Opens and maps a device, whose name may take a moment to appear.
fn open(info: &Info, export: Export) -> Result<Arc<Device>, UblkError> {
    let failed = |error| UblkError::Device { id: info.id, error };
    let began = Instant::now();
    let file = loop {
        match open_character(info.id) {
            Err(_) if began.elapsed() < NAME_LIMIT => thread::sleep(PAUSE),
            file => break file.map_err(failed)?,
        }
    };
    let map = |queue| Descriptions::map(&file, queue, info.depth);
    let descriptions = (0..info.queues).map(map).collect::<io::Result<Vec<_>>>().map_err(failed)?;
    Ok(Arc::new(Device {
        id: info.id,
        queues: info.queues,
        depth: info.depth,
        export,
        writes_through: info.flags & abi::FEATURE_RECOVERY != 0,
        descriptions,
        file,
        is_given_up: AtomicBool::new(false),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_tells_store_volume_and_term() {
        let store = StoreId([7; 16]);
        let mark = Mark::new(store, VolumeId(1), 3);
        let info = Info { mark: mark.encode(), ..Info::default() };
        assert!(mark.is_ours(&info));
        let later = Mark::new(store, VolumeId(1), 4);
        assert!(later.is_ours(&info) && later.encode() != mark.encode());
        assert!(!Mark::new(store, VolumeId(2), 3).is_ours(&info));
        assert!(!Mark::new(StoreId([8; 16]), VolumeId(1), 3).is_ours(&info));
    }
}
