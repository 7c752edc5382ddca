//! Options: what an operator may say about RDMA, and what a host has to offer.
//!
//! Beside the flow: set-up reads it once for each connection.
//!
//! Invariant: options that passed [`RdmaOptions::check`] are possible ones; whether a device can keep them, it says
//! when it is opened.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use super::credit::{RECEIVES_MAX, RECEIVES_MIN};
use super::library::{self, LibraryMissing};
use super::manager::EventChannel;
use super::setup_frame::ip_of_gid;
use super::verbs::{Context, device_names};

/// Addresses of a port that are looked at.
const GIDS_MAX: u32 = 256;

/// Which transport to use: `--transport`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// RDMA where both sides can, else TCP.
    #[default]
    Auto,
    /// RDMA, or no session.
    Rdma,
    /// TCP.
    Tcp,
}

/// How RDMA is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RdmaOptions {
    /// Name of the device, as `rdma link` shows it; none: the one on the way to the peer.
    pub device: Option<String>,
    /// Index of the device's own address to use, of its first port; none: the address that the peer was dialled from
    /// or at. Needs `device`.
    pub gid_index: Option<u32>,
    /// Most payload bytes of a packet: 256, 512, 1024, 2048 or 4096; none: what the network allows.
    pub mtu_bytes: Option<u32>,
    /// Requests to send that a card holds for one connection: 64 to 16384.
    pub send_requests: u32,
    /// Receives that wait for the peer: 16 to 4096. Each takes 8 KiB of locked memory.
    pub receive_requests: u32,
    /// Longest message, head included, that goes inside its request: 0 to 1024 bytes. A card may allow less.
    pub inline_bytes: u32,
    /// How long a card waits for the peer's acknowledgement before it sends again; rounded up to 4.096 us times a
    /// power of two.
    pub acknowledgement_time: Duration,
    /// How often it sends again before the connection is lost: 0 to 7.
    pub retries: u8,
    /// The time that finding the peer, and then calling it, may take over RDMA before TCP is used; less if the set-up
    /// has less. The kernel calls again after about 4 seconds when a call was lost.
    pub connect_limit: Duration,
}

impl Default for RdmaOptions {
    fn default() -> RdmaOptions {
        RdmaOptions {
            device: None,
            gid_index: None,
            mtu_bytes: None,
            send_requests: 256,
            receive_requests: 128,
            inline_bytes: 128,
            acknowledgement_time: Duration::from_millis(400),
            retries: 6,
            connect_limit: Duration::from_secs(6),
        }
    }
}

impl RdmaOptions {
    /// Whether the options are possible.
    ///
    /// # Errors
    /// [`OptionFault`] names the one that is not.
    pub fn check(&self) -> Result<(), OptionFault> {
        let mtu_is_one = |bytes: u32| bytes.is_power_of_two() && (256..=4096).contains(&bytes);
        if self.gid_index.is_some() && self.device.is_none() {
            return Err(OptionFault::GidWithoutDevice);
        }
        if self.mtu_bytes.is_some_and(|bytes| !mtu_is_one(bytes)) {
            return Err(OptionFault::Mtu);
        }
        if !(64..=16_384).contains(&self.send_requests) {
            return Err(OptionFault::SendRequests);
        }
        if !(RECEIVES_MIN..=RECEIVES_MAX).contains(&self.receive_requests) {
            return Err(OptionFault::ReceiveRequests);
        }
        if self.inline_bytes > 1024 {
            return Err(OptionFault::InlineBytes);
        }
        if self.retries > 7 {
            return Err(OptionFault::Retries);
        }
        Ok(())
    }

    /// The acknowledgement time as cards want it: 4.096 us times two to this power.
    pub(super) fn timeout_exponent(&self) -> u8 {
        let units = self.acknowledgement_time.as_nanos().div_ceil(4096).max(2);
        let units = u64::try_from(units).unwrap_or(u64::MAX).min(1 << 31);
        units.next_power_of_two().ilog2() as u8
    }
}

/// An option that is not possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptionFault {
    /// A GID index names an address of a device.
    GidWithoutDevice,
    /// [`RdmaOptions::mtu_bytes`].
    Mtu,
    /// [`RdmaOptions::send_requests`].
    SendRequests,
    /// [`RdmaOptions::receive_requests`].
    ReceiveRequests,
    /// [`RdmaOptions::inline_bytes`].
    InlineBytes,
    /// [`RdmaOptions::retries`].
    Retries,
}

impl fmt::Display for OptionFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptionFault::GidWithoutDevice => "a GID index needs the name of its device",
            OptionFault::Mtu => "the RDMA MTU is 256, 512, 1024, 2048 or 4096 bytes",
            OptionFault::SendRequests => "64 to 16384 requests to send are possible",
            OptionFault::ReceiveRequests => "16 to 4096 receives are possible",
            OptionFault::InlineBytes => "at most 1024 bytes go inside a request",
            OptionFault::Retries => "at most 7 retries are possible",
        })
    }
}

impl std::error::Error for OptionFault {}

/// A device that could be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// As `rdma link` shows it.
    pub name: String,
    /// Whether its first port is up.
    pub is_active: bool,
    /// Largest payload of a packet now, in bytes.
    pub mtu_bytes: u32,
    /// Its own addresses, with their GID index.
    pub addresses: Vec<(u32, IpAddr)>,
}

/// The devices of a host: at least one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Devices {
    /// In the library's order.
    pub devices: Vec<Device>,
}

/// Why RDMA cannot be used on this host: one line, for the log.
#[derive(Debug)]
pub enum ProbeError {
    /// rdma-core is not installed.
    Library(LibraryMissing),
    /// The kernel's connection manager is not there.
    Manager(io::Error),
    /// The devices cannot be listed.
    List(io::Error),
    /// There is none.
    NoDevice,
    /// None has a port that is up.
    NoPort,
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeError::Library(missing) => missing.fmt(f),
            ProbeError::Manager(error) => {
                write!(f, "no RDMA connection manager ({error}): modprobe rdma_ucm")
            }
            ProbeError::List(error) => write!(f, "RDMA devices cannot be listed: {error}"),
            ProbeError::NoDevice => write!(f, "this host has no RDMA device"),
            ProbeError::NoPort => write!(f, "no RDMA device of this host has a port that is up"),
        }
    }
}

impl std::error::Error for ProbeError {}

/// What this host has to offer. Takes a millisecond or so; nothing stays open.
///
/// # Errors
/// [`ProbeError`]: why there is no RDMA here.
pub fn probe() -> Result<Devices, ProbeError> {
    library::load().map_err(ProbeError::Library)?;
    let names = device_names().map_err(|error| match error.raw_os_error() {
        // The kernel has no verbs at all.
        Some(libc::ENOSYS) => ProbeError::NoDevice,
        _ => ProbeError::List(error),
    })?;
    if names.is_empty() {
        return Err(ProbeError::NoDevice);
    }
    EventChannel::open().map_err(ProbeError::Manager)?;
    // A device that cannot be opened is not one to offer.
    let devices = names.iter().filter_map(|name| describe(name).ok()).collect::<Vec<_>>();
    if !devices.iter().any(|device| device.is_active) {
        return Err(ProbeError::NoPort);
    }
    Ok(Devices { devices })
}

fn describe(name: &str) -> io::Result<Device> {
    let context = Context::open(name)?;
    let port = context.port(1)?;
    let address = |index| Some((index, ip_of_gid(context.gid(1, index).ok()?)?));
    let addresses = (0..port.gids.min(GIDS_MAX)).filter_map(address).collect();
    let (is_active, mtu_bytes) = (port.is_active, port.mtu_bytes);
    Ok(Device { name: name.to_owned(), is_active, mtu_bytes, addresses })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_possible_and_impossible_ones_are_named() {
        let good = RdmaOptions::default();
        assert_eq!(good.check(), Ok(()));
        let fault = |change: fn(&mut RdmaOptions)| {
            let mut options = good.clone();
            change(&mut options);
            options.check().unwrap_err()
        };
        assert_eq!(fault(|options| options.gid_index = Some(1)), OptionFault::GidWithoutDevice);
        assert_eq!(fault(|options| options.mtu_bytes = Some(1500)), OptionFault::Mtu);
        assert_eq!(fault(|options| options.send_requests = 63), OptionFault::SendRequests);
        assert_eq!(fault(|options| options.receive_requests = 15), OptionFault::ReceiveRequests);
        assert_eq!(fault(|options| options.inline_bytes = 1025), OptionFault::InlineBytes);
        assert_eq!(fault(|options| options.retries = 8), OptionFault::Retries);
    }

    #[test]
    fn acknowledgement_time_is_rounded_up_to_what_cards_know() {
        let exponent = |time| {
            RdmaOptions { acknowledgement_time: time, ..RdmaOptions::default() }.timeout_exponent()
        };
        assert_eq!(exponent(Duration::ZERO), 1);
        assert_eq!(exponent(Duration::from_nanos(8192)), 1);
        assert_eq!(exponent(Duration::from_nanos(8193)), 2);
        assert_eq!(exponent(Duration::from_millis(400)), 17);
        assert_eq!(exponent(Duration::MAX), 31);
    }

    #[test]
    fn a_host_says_in_one_line_why_it_has_no_rdma() {
        match probe() {
            Ok(devices) => assert!(!devices.devices.is_empty()),
            Err(error) => assert!(!error.to_string().contains('\n')),
        }
    }
}
