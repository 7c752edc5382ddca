//! The thread that has block devices made while this node serves their volumes, and unmade when it stops.
//!
//! Invariants: nothing here is on the data path; a device that cannot be made is told once and tried again; what a
//! device holds of the node (its volume, its workers) it holds of the same workers that serve its queues.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use twinpoint_core::units::StoreId;

use super::device::{Device, Devices, Mark, Plan};
use super::error::UblkError;
use crate::options::{UblkOptions, UblkVolume};
use crate::shared::Shared;

/// How often the thread looks whether a device is due, or gone.
const PAUSE: Duration = Duration::from_millis(200);
/// How long after a failure it tries again.
const RETRY: Duration = Duration::from_secs(5);
/// How long the workers may take to let go of a stopped device.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
const CLOSE_PAUSE: Duration = Duration::from_millis(5);
/// How long a node that stops waits for its devices.
const END_LIMIT: Duration = Duration::from_secs(30);

/// What this asks of the node.
pub(crate) trait UblkNode: Send + Sync {
    /// What the workers share that run now.
    fn shared(&self) -> Option<Arc<Shared>>;
    /// The store and its term.
    fn identity(&self) -> Option<(StoreId, u64)>;
    /// Gives a device's queues to the workers; false if there are none.
    fn attach(&self, device: &Arc<Device>) -> bool;
    /// Tells the operator.
    fn log(&self, text: String);
}

/// Ends the thread, from any other.
#[derive(Default)]
pub(crate) struct Switch {
    state: Mutex<SwitchState>,
    changed: Condvar,
}

#[derive(Default)]
struct SwitchState {
    running: bool,
    over: bool,
}

impl Switch {
    /// Has the devices unmade and waits for it.
    pub fn end_and_wait(&self) {
        let mut state = self.lock();
        state.over = true;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, END_LIMIT, |state| state.running);
        // Beyond the limit the node ends without it: the kernel keeps the device or ends it.
        drop(waited);
    }

    fn set_running(&self, running: bool) {
        self.lock().running = running;
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Waits a while; tells whether it is over.
    fn pause(&self) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), PAUSE, |state| !state.over);
        waited.expect("nobody panics with the switch").0.over
    }

    fn lock(&self) -> MutexGuard<'_, SwitchState> {
        self.state.lock().expect("nobody panics with the switch")
    }
}

/// The driver, found before the node starts, so that a lack is told first.
pub(crate) struct Driver(Devices);

impl Driver {
    /// Opens the driver, if a device is wanted.
    ///
    /// # Errors
    /// If it is not there, or too old.
    pub fn find(options: &UblkOptions) -> Result<Option<Driver>, UblkError> {
        if options.volumes.is_empty() {
            return Ok(None);
        }
        Devices::open().map(|devices| Some(Driver(devices)))
    }
}

/// The running thread.
pub(crate) struct UblkControl {
    switch: Arc<Switch>,
    thread: Option<JoinHandle<()>>,
}

impl UblkControl {
    /// Starts the thread and waits until the devices of the volumes that are served now are there. Gives their paths.
    ///
    /// # Errors
    /// Why one of them cannot be made.
    pub fn start(
        driver: Driver,
        node: Arc<dyn UblkNode>,
        options: &UblkOptions,
        workers: usize,
        switch: Arc<Switch>,
    ) -> Result<(UblkControl, Vec<String>), UblkError> {
        let keeper = Keeper {
            devices: driver.0,
            node,
            workers: u16::try_from(workers).expect("a node has a worker for each core at most"),
            keep: options.keep,
            writes_through: !options.volatile,
            units: options.volumes.iter().map(Unit::new).collect(),
            switch: Arc::clone(&switch),
        };
        let (sender, receiver): (_, Receiver<Result<Vec<String>, UblkError>>) = channel();
        switch.set_running(true);
        let thread = thread::Builder::new().name("ublk".to_owned());
        let thread = thread.spawn(move || keeper.run(&sender));
        let thread = thread.map_err(|error| {
            switch.set_running(false);
            UblkError::System(error)
        })?;
        let control = UblkControl { switch, thread: Some(thread) };
        let paths = receiver.recv().unwrap_or(Err(UblkError::NodeEnds))?;
        Ok((control, paths))
    }
}

impl Drop for UblkControl {
    fn drop(&mut self) {
        self.switch.end_and_wait();
        // A thread that waits for a kernel that does not answer ends with the process.
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            _ = thread.join();
        }
    }
}

struct Keeper {
    devices: Devices,
    node: Arc<dyn UblkNode>,
    workers: u16,
    keep: bool,
    writes_through: bool,
    units: Vec<Unit>,
    switch: Arc<Switch>,
}

/// A volume that is to be a block device.
struct Unit {
    volume: UblkVolume,
    /// Of the device that was made, also when it is down.
    id: Option<u32>,
    /// It waited for this process.
    is_taken_over: bool,
    state: State,
    retry_at: Option<Instant>,
    told: String,
}

enum State {
    Down,
    Up {
        shared: Arc<Shared>,
        device: Arc<Device>,
    },
    /// Another program removed it: that was somebody's will.
    Removed,
}

impl Unit {
    fn new(volume: &UblkVolume) -> Unit {
        Unit {
            volume: volume.clone(),
            id: None,
            is_taken_over: false,
            state: State::Down,
            retry_at: None,
            told: String::new(),
        }
    }
}

impl Keeper {
    fn run(mut self, first: &Sender<Result<Vec<String>, UblkError>>) {
        let done = self.bring_up_all();
        let failed = done.is_err();
        let paths = self.units.iter().filter_map(|unit| unit.id).map(path).collect();
        // The node waits for it.
        _ = first.send(done.map(|()| paths));
        let is_unknown = |unit: &&Unit| !failed && unit.id.is_none() && unit.told.is_empty();
        for unit in self.units.iter().filter(is_unknown) {
            self.node.log(format!(
                "volume {} is no block device yet: this node serves no volume of that name",
                unit.volume.name
            ));
        }
        while !failed && !self.switch.pause() {
            for index in 0..self.units.len() {
                if let Err(error) = self.step(index) {
                    self.try_again_later(index, &error);
                }
            }
        }
        for index in 0..self.units.len() {
            if !(failed && self.units[index].is_taken_over) {
                self.end(index);
            }
        }
        if failed {
            self.leave_taken_over();
        }
        self.switch.set_running(false);
    }

    /// The first look after all devices. What may pass holds nobody else up: it is tried again.
    fn bring_up_all(&mut self) -> Result<(), UblkError> {
        for index in 0..self.units.len() {
            match self.step(index) {
                Err(error) if error.may_pass() => self.try_again_later(index, &error),
                done => done?,
            }
        }
        Ok(())
    }

    fn try_again_later(&mut self, index: usize, error: &UblkError) {
        let unit = &mut self.units[index];
        unit.retry_at = Some(Instant::now() + RETRY);
        let text = format!("volume {}: {error}", unit.volume.name);
        if text != unit.told {
            self.node.log(text.clone());
            unit.told = text;
        }
    }

    /// A start that fails leaves the devices that it took over as they were: their users wait for the next one.
    fn leave_taken_over(&mut self) {
        for index in 0..self.units.len() {
            if let State::Up { shared, .. } = &self.units[index].state
                && self.units[index].is_taken_over
            {
                shared.set_keeping();
                self.close(index);
                self.units[index].id = None;
            }
        }
    }

    /// Looks after one device.
    fn step(&mut self, index: usize) -> Result<(), UblkError> {
        let unit = &mut self.units[index];
        match &unit.state {
            State::Removed => Ok(()),
            State::Down => {
                if unit.retry_at.is_some_and(|at| Instant::now() < at) {
                    return Ok(());
                }
                self.bring_up(index)
            }
            State::Up { shared, device } => {
                let is_let_go = Arc::strong_count(device) == 1;
                let is_served = shared.exports.offers(device.export.volume);
                let now = self.node.shared();
                let same_workers = now.is_some_and(|now| Arc::ptr_eq(&now, shared));
                if is_let_go {
                    let id = device.id;
                    self.close(index);
                    // With new workers it is taken over, or made anew.
                    if same_workers && is_served && !self.switch.is_over() {
                        self.units[index].state = State::Removed;
                        self.units[index].id = None;
                        self.node.log(format!("{} was removed by another program", path(id)));
                    }
                } else if same_workers && !is_served {
                    return self.take_down(index);
                }
                Ok(())
            }
        }
    }

    fn bring_up(&mut self, index: usize) -> Result<(), UblkError> {
        let unit = &mut self.units[index];
        let Some(shared) = self.node.shared() else { return Ok(()) };
        let Some(export) = shared.exports.open(&unit.volume.name) else { return Ok(()) };
        let Some((store, term)) = self.node.identity() else {
            shared.exports.close(export.volume);
            return Ok(());
        };
        let plan = Plan {
            id: unit.volume.id.or(unit.id),
            export,
            mark: Mark::new(store, export.volume, term),
            workers: self.workers,
            writes_through: self.writes_through,
        };
        let (node, switch) = (&self.node, &self.switch);
        let made =
            self.devices.bring_up(&plan, &|device| node.attach(device), &|| switch.is_over());
        let (device, taken_over) = made.inspect_err(|_| shared.exports.close(export.volume))?;
        unit.id = Some(device.id);
        unit.is_taken_over = taken_over;
        unit.told.clear();
        let taken_over = if taken_over { ", taken over as it was" } else { "" };
        let name = &unit.volume.name;
        self.node.log(format!("volume {name} is {}{taken_over}", path(device.id)));
        unit.state = State::Up { shared, device };
        Ok(())
    }

    /// Unmakes a device: first the kernel ends it, then the workers close it, then its id is free.
    fn take_down(&mut self, index: usize) -> Result<(), UblkError> {
        let unit = &self.units[index];
        let Some(id) = unit.id else { return Ok(()) };
        self.devices.stop(id)?;
        if let State::Up { device, .. } = &unit.state {
            let began = Instant::now();
            while Arc::strong_count(device) > 1 && began.elapsed() < CLOSE_LIMIT {
                thread::sleep(CLOSE_PAUSE);
            }
        }
        self.close(index);
        self.units[index].id = None;
        self.devices.delete(id)
    }

    /// Lets go of a device that nobody serves any more.
    fn close(&mut self, index: usize) {
        if let State::Up { shared, device } =
            std::mem::replace(&mut self.units[index].state, State::Down)
        {
            shared.exports.close(device.export.volume);
        }
    }

    fn end(&mut self, index: usize) {
        if self.keep {
            // The workers end its queues: the kernel keeps what it was not answered.
            return self.close(index);
        }
        if let Err(error) = self.take_down(index) {
            let name = self.units[index].volume.name.clone();
            self.node
                .log(format!("volume {name}: {error}; the kernel does it, or keeps it, later"));
            self.close(index);
        }
    }
}

fn path(id: u32) -> String {
    format!("/dev/ublkb{id}")
}
