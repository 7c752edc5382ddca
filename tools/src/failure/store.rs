//! What a store's errors mean to whoever runs a command: exit code, kind, and the way out.
//!
//! Invariant: one meaning in all commands; `serve` and `verify` say the same of the same store.

use std::io::ErrorKind;

use twinpoint_core::codec::FormatErrorKind;
use twinpoint_core::geometry::GeometryError;
use twinpoint_core::recovery::{RecoveryError, Structure};
use twinpoint_core::units::BLOCK_BYTES;
use twinpoint_runtime::device::{DeviceError, PassthroughFault, Step};
use twinpoint_runtime::status::bytes_text;
use twinpoint_runtime::store::StoreError;

use super::{Exit, Failure};
use crate::quantity::bytes_flag;

const MIB: u64 = 1 << 20;

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        match &error {
            StoreError::Device(device) => device_failure(device, &error),
            StoreError::Recovery { path, error: cause, device } => {
                let is_short = matches!(device, Some(DeviceError::OutOfRange { .. }));
                let advice = recovery_advice(cause, is_short);
                let Some(advice) = advice else {
                    let text = format!(
                        "{} holds no store, or both copies of its superblock are damaged: check the path; a new \
                         store is made with `twinpoint format`",
                        path.display()
                    );
                    return Failure::new(Exit::Damaged, "damaged", text);
                };
                Failure::new(Exit::Damaged, "damaged", format!("{error}: {advice}"))
            }
            StoreError::HoldsData { .. } => Failure::new(Exit::Refused, "holds-data", &error),
            StoreError::NotSecondary { .. } => Failure::new(Exit::Refused, "not-secondary", &error),
            StoreError::OtherSize { .. } => Failure::new(Exit::Usage, "other-size", &error),
            StoreError::Missing { .. } => Failure::failed("missing", &error),
            StoreError::Geometry { error } => geometry_failure(error),
            StoreError::Random(_) => {
                Failure::failed("random", format!("{error}: see that it is there and readable"))
            }
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Failure {
        StoreError::Device(error).into()
    }
}

/// What to do about a store that recovery does not take; nothing if there never was one, as far as can be seen.
/// `is_short`: what was to be read lies behind the store's end.
fn recovery_advice(cause: &RecoveryError, is_short: bool) -> Option<&'static str> {
    let superblock = match cause {
        RecoveryError::Damaged(Structure::Superblock, cause) => cause.map(|cause| cause.kind),
        _ => None,
    };
    match (cause, superblock) {
        (_, Some(FormatErrorKind::Magic)) => None,
        // All else is inside the size that the superblock tells.
        (RecoveryError::Read(_), _) if is_short => None,
        (_, Some(FormatErrorKind::Version)) => {
            Some("another release made it: use that release's twinpoint")
        }
        (RecoveryError::BeforeCheckpoint(_) | RecoveryError::BeforeBase(..), _) => {
            Some("it cannot go back so far")
        }
        _ => Some("see `twinpoint inspect`, and use the other store of the pair"),
    }
}

/// The layout that the flags ask for does not fit the store: of the numbers, the one to change.
fn geometry_failure(error: &GeometryError) -> Failure {
    let text = match error {
        GeometryError::StoreTooSmall { store_blocks_min, .. } => {
            let least = store_blocks_min.saturating_mul(BLOCK_BYTES as u64).div_ceil(MIB);
            let least = bytes_flag(least.saturating_mul(MIB));
            format!(
                "the store is too small for so many shards, journals and segments: it needs {least}; give a \
                 larger --size or device, or fewer --shards"
            )
        }
        GeometryError::ShardsTooFew { shards_min } if *shards_min <= 64 => {
            format!("the store is too large for so few shards: give --shards {shards_min} or more")
        }
        GeometryError::ShardsTooFew { .. } => "the store is too large: 64 shards hold less than \
             256 TiB; give a smaller --size, or a part of the device"
            .to_owned(),
        error => format!("{error}: change --size, --shards, --journal or --segments"),
    };
    Failure::new(Exit::Usage, "geometry", text)
}

pub(super) fn device_failure(device: &DeviceError, error: &StoreError) -> Failure {
    match device {
        DeviceError::InUse { .. } => Failure::new(Exit::Refused, "in-use", error),
        DeviceError::WrongSize { bytes } => {
            let text = format!(
                "a store of {bytes} bytes ({}): choose another --size, a multiple of 4KiB",
                bytes_text(*bytes)
            );
            Failure::new(Exit::Usage, "size", text)
        }
        DeviceError::Ended { .. } => {
            let text = format!("{error}: it was cut short; use the other store of the pair");
            Failure::new(Exit::Damaged, "damaged", text)
        }
        DeviceError::Passthrough { fault, .. } => {
            let text = format!("{error}: {}", passthrough_advice(*fault));
            Failure::new(Exit::Usage, "device-mode", text)
        }
        DeviceError::NoDirect { .. } => Failure::failed("device", error),
        DeviceError::WrongKind { .. } => {
            let text = format!("{error}: give the path of a store");
            Failure::failed("device", text)
        }
        DeviceError::WrongSector { .. } => {
            Failure::failed("device", format!("{error}: use another device"))
        }
        DeviceError::OutOfRange { .. } => {
            Failure::failed("device", format!("{error}: see `twinpoint inspect`"))
        }
        DeviceError::System { step, source, .. } => {
            let advice = system_advice(*step, source.kind());
            Failure::failed("device", format!("{error}: {advice}"))
        }
    }
}

/// What to do about a store that takes no NVMe commands.
fn passthrough_advice(fault: PassthroughFault) -> &'static str {
    match fault {
        PassthroughFault::NotNvme => {
            "give a namespace, such as /dev/nvme0n1, or leave --device-mode away"
        }
        PassthroughFault::Partition => "give the whole namespace, or leave --device-mode away",
        PassthroughFault::NoPollQueues => {
            "give the kernel nvme.poll_queues=N, N the threads of --cores, or leave --device-poll away"
        }
        PassthroughFault::OtherNode => {
            "compare /dev with /sys/class/nvme-generic, or leave --device-mode away"
        }
        PassthroughFault::NoGeneric => {
            "see /dev and /sys/class/nvme-generic, or leave --device-mode away"
        }
        PassthroughFault::OtherSize
        | PassthroughFault::Metadata { .. }
        | PassthroughFault::TooShort => "leave --device-mode away",
    }
}

fn system_advice(step: Step, kind: ErrorKind) -> &'static str {
    match (kind, step) {
        (ErrorKind::NotFound, Step::Create) => "check the path: its folder is not there",
        (ErrorKind::NotFound, _) => "check the path; a new store is made with `twinpoint format`",
        (ErrorKind::PermissionDenied, _) => "check its permissions, or run as the user who owns it",
        (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, _) => {
            "make room there, or give a smaller --size"
        }
        (ErrorKind::FileTooLarge, _) => {
            "its file system takes no file so large: give a smaller --size"
        }
        (_, Step::Read | Step::Write | Step::Flush) => {
            "the device or its file system is at fault: see dmesg, and use the other store of the pair"
        }
        _ => "check the path and its permissions",
    }
}
