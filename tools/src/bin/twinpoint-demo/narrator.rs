//! Narrator: tells what happens, with the time since the beginning, and hears of Ctrl-C.
//!
//! Invariant: whoever waits asks [`Narrator::check`] again and again, so that an interrupted demo ends like a failed
//! one: every process is killed and every file removed on the way out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::trouble::Trouble;

/// See the module.
#[derive(Clone)]
pub struct Narrator {
    began: Instant,
    is_interrupted: Arc<AtomicBool>,
}

impl Narrator {
    /// Begins to count the time, and to listen for signals.
    ///
    /// # Errors
    /// If the system refuses a signal handler.
    pub fn start() -> std::io::Result<Narrator> {
        let is_interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&is_interrupted))?;
        }
        Ok(Narrator { began: Instant::now(), is_interrupted })
    }

    /// A step.
    pub fn say(&self, text: &str) {
        println!("[{:6.1} s] {text}", self.elapsed().as_secs_f64());
    }

    /// How far a step is.
    pub fn detail(&self, text: &str) {
        println!("[{:6.1} s]   {text}", self.elapsed().as_secs_f64());
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Sleeps.
    ///
    /// # Errors
    /// If a signal came.
    pub fn pause(&self, time: Duration) -> Result<(), Trouble> {
        std::thread::sleep(time);
        self.check()
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// If a signal came.
    pub fn check(&self) -> Result<(), Trouble> {
        if self.is_interrupted.load(Ordering::Relaxed) { Err(Trouble::Interrupted) } else { Ok(()) }
    }
}
