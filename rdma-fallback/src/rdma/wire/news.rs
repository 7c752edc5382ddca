//! News: what a waiting wire learns from its three sources, beside completions themselves.
//!
//! Step 4 of the flow, when there is nothing to do.
//!
//! Invariant: a source that was heard is asked again only when the watch says so.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Instant;

use super::super::cause::Cause;
use super::super::manager::ManagerEvent;
use super::super::watch::News;
use super::{BELL, COMPLETIONS, MANAGER, RdmaWire, is_flushed, system};
use crate::CloseReason;

impl RdmaWire {
    /// Asks all sources for news.
    pub(super) fn look(&mut self) -> Result<(), CloseReason> {
        let News { sources, has_ticked } = self.watch.look().map_err(system)?;
        let only_ticked = has_ticked && sources == 0;
        self.counters.watch_calls += u64::from(!only_ticked);
        self.counters.clock_calls += u64::from(has_ticked) + u64::from(only_ticked);
        if sources & (1 << COMPLETIONS) != 0 {
            self.counters.watch_calls += 1;
            if self.queues()?.take_event().map_err(system)? {
                self.counters.wake_ups += 1;
                self.is_armed = false;
            }
        } else if has_ticked && self.found_since_armed {
            // The card has forgotten to announce it, and would never announce another: it is asked anew.
            self.is_armed = false;
        }
        if sources & (1 << BELL) != 0 {
            self.hear_bell()?;
        }
        if sources & (1 << MANAGER) != 0 {
            self.hear_manager()?;
        }
        Ok(())
    }

    /// The connection has ended. The first reason counts, unless it was only that there was one before.
    pub(super) fn end(&mut self, reason: CloseReason) {
        if self.ending.is_none_or(is_flushed) {
            self.ending = Some(reason);
            self.ended_at.get_or_insert_with(Instant::now);
        }
    }

    fn hear_bell(&mut self) -> Result<(), CloseReason> {
        self.counters.watch_calls += 1;
        let queues = self.queues()?;
        // One byte or several: the cause is kept elsewhere.
        let _ = queues.bell().read(&mut [0; 16]);
        if let Some(cause) = queues.alarm().cause() {
            self.end(CloseReason::Rdma(cause));
        }
        Ok(())
    }

    fn hear_manager(&mut self) -> Result<(), CloseReason> {
        let link = self.link.as_ref().expect("the connection lasts until the wire is closed");
        let channel = Arc::clone(link.id.channel());
        loop {
            self.counters.watch_calls += 1;
            match channel.next() {
                Ok(ManagerEvent::Disconnected) => {
                    self.end(CloseReason::Peer);
                }
                Ok(ManagerEvent::DeviceRemoved) => {
                    self.end(CloseReason::Rdma(Cause::DeviceRemoved));
                }
                // Somebody who found the listener's port before it closed.
                Ok(ManagerEvent::Request(id, _)) => id.reject(),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(system(error)),
            }
        }
    }
}
