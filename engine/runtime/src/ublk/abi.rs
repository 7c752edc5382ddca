//! The kernel's ublk interface (`linux/ublk_cmd.h`, Linux 6.5 and newer) in numbers and bytes.
//!
//! Invariant: what the kernel says is decoded without trust and without `unsafe`; lengths and places are those of its
//! header, of which the fields that are left out are zero.

/// The misc device that takes control commands.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";
/// Bytes of one request's description in the memory that the kernel shares.
pub(super) const DESCRIPTOR_BYTES: usize = 24;
/// Bytes of a device's information.
pub(super) const INFO_BYTES: usize = 64;
/// The kernel's limit for the depth of a queue; the memory of each queue lies this many descriptions behind the last.
const QUEUE_DEPTH_MAX: usize = 4096;
/// A control command that is for no queue.
const NO_QUEUE: u16 = u16::MAX;
/// "Choose an id".
pub(super) const ANY_ID: u32 = u32::MAX;
/// What a waiting fetch ends with when its device goes.
pub(super) const ABORTED: i32 = -libc::ENODEV;

/// Features, as bits of a device's flags.
pub(super) const FEATURE_RECOVERY: u64 = 1 << 3;
pub(super) const FEATURE_REISSUE: u64 = 1 << 4;
pub(super) const FEATURE_ENCODED: u64 = 1 << 6;
pub(super) const FEATURE_USER_COPY: u64 = 1 << 7;

const READ_WRITE: u32 = 3;
const READ: u32 = 2;

/// A command of type `u`, in the form of an ioctl's number.
const fn command(direction: u32, number: u32, bytes: u32) -> u32 {
    direction << 30 | bytes << 16 | (b'u' as u32) << 8 | number
}

const CONTROL_BYTES: u32 = 32;
pub(super) const ADD_DEVICE: u32 = command(READ_WRITE, 0x04, CONTROL_BYTES);
pub(super) const DELETE_DEVICE: u32 = command(READ_WRITE, 0x05, CONTROL_BYTES);
pub(super) const START_DEVICE: u32 = command(READ_WRITE, 0x06, CONTROL_BYTES);
pub(super) const STOP_DEVICE: u32 = command(READ_WRITE, 0x07, CONTROL_BYTES);
pub(super) const SET_PARAMETERS: u32 = command(READ_WRITE, 0x08, CONTROL_BYTES);
pub(super) const START_RECOVERY: u32 = command(READ_WRITE, 0x10, CONTROL_BYTES);
pub(super) const END_RECOVERY: u32 = command(READ_WRITE, 0x11, CONTROL_BYTES);
pub(super) const GET_INFO: u32 = command(READ, 0x02, CONTROL_BYTES);
pub(super) const GET_FEATURES: u32 = command(READ, 0x13, CONTROL_BYTES);

const IO_BYTES: u32 = 16;
pub(crate) const FETCH: u32 = command(READ_WRITE, 0x20, IO_BYTES);
pub(crate) const COMMIT_AND_FETCH: u32 = command(READ_WRITE, 0x21, IO_BYTES);

/// State of a device.
pub(super) const STATE_LIVE: u16 = 1;
pub(super) const STATE_QUIESCED: u16 = 2;

/// The payload of a control command. `address` and `length` tell what the kernel reads or writes, if anything.
pub(super) fn control(id: u32, address: u64, length: u16, data: u64) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[0..4].copy_from_slice(&id.to_ne_bytes());
    bytes[4..6].copy_from_slice(&NO_QUEUE.to_ne_bytes());
    bytes[6..8].copy_from_slice(&length.to_ne_bytes());
    bytes[8..16].copy_from_slice(&address.to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    bytes
}

/// The payload of a fetch, which ends the request of the same tag before, if there is one. Its address is zero, as the
/// kernel wants it where the server copies.
pub(crate) fn fetch(queue: u16, tag: u16, result: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes
}

/// Where byte `offset` of a request's data lies in the character device.
pub(super) fn data_position(queue: u16, tag: u16, offset: u32) -> u64 {
    0x8000_0000 + (u64::from(queue) << 41 | u64::from(tag) << 25 | u64::from(offset))
}

/// Where a queue's descriptions lie in the character device, and how many bytes to map.
pub(super) fn descriptions(queue: u16, depth: u16) -> (u64, usize) {
    let stride = (QUEUE_DEPTH_MAX * DESCRIPTOR_BYTES).next_multiple_of(PAGE_BYTES);
    let length = (usize::from(depth) * DESCRIPTOR_BYTES).next_multiple_of(PAGE_BYTES);
    (u64::from(queue) * stride as u64, length)
}

/// Of the processors that this runs on.
const PAGE_BYTES: usize = 4096;

/// A device's information, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Info {
    pub queues: u16,
    pub depth: u16,
    pub state: u16,
    pub request_bytes_max: u32,
    pub id: u32,
    pub process: i32,
    pub flags: u64,
    /// The server's own; the kernel keeps it.
    pub mark: u64,
}

impl Info {
    pub fn encode(&self) -> [u8; INFO_BYTES] {
        let mut bytes = [0; INFO_BYTES];
        bytes[0..2].copy_from_slice(&self.queues.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.depth.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.state.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.request_bytes_max.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.id.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.process.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.mark.to_ne_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; INFO_BYTES]) -> Info {
        Info {
            queues: u16::from_ne_bytes(part(bytes, 0)),
            depth: u16::from_ne_bytes(part(bytes, 2)),
            state: u16::from_ne_bytes(part(bytes, 4)),
            request_bytes_max: u32::from_ne_bytes(part(bytes, 8)),
            id: u32::from_ne_bytes(part(bytes, 12)),
            process: i32::from_ne_bytes(part(bytes, 16)),
            flags: u64::from_ne_bytes(part(bytes, 24)),
            mark: u64::from_ne_bytes(part(bytes, 32)),
        }
    }
}

/// What a block device is like.
pub(super) struct Parameters {
    pub size_bytes: u64,
    pub request_bytes_max: u32,
    /// A request that crosses a multiple of it is cut by the kernel.
    pub stripe_bytes: u32,
    pub unmap_bytes_max: u32,
    /// Answered writes need a flush to be kept.
    pub is_volatile: bool,
}

/// Bytes of [`Parameters::encode`]: the header, the basic parameters and those of discards.
pub(super) const PARAMETERS_BYTES: usize = 60;

impl Parameters {
    pub fn encode(&self) -> [u8; PARAMETERS_BYTES] {
        const BASIC_AND_DISCARD: u32 = 3;
        const VOLATILE_CACHE_AND_FUA: u32 = 1 << 2 | 1 << 3;
        const SECTOR_SHIFT: u32 = 9;
        const BLOCK_SHIFT: u8 = 12;
        let mut bytes = [0; PARAMETERS_BYTES];
        let mut put = |at: usize, value: u32| {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        };
        put(0, PARAMETERS_BYTES as u32);
        put(4, BASIC_AND_DISCARD);
        put(8, if self.is_volatile { VOLATILE_CACHE_AND_FUA } else { 0 });
        put(16, self.request_bytes_max >> SECTOR_SHIFT);
        put(20, self.stripe_bytes >> SECTOR_SHIFT);
        put(44, 1 << BLOCK_SHIFT);
        put(48, self.unmap_bytes_max >> SECTOR_SHIFT);
        put(52, self.unmap_bytes_max >> SECTOR_SHIFT);
        // Logical and physical block, best and least request.
        bytes[12..16].copy_from_slice(&[SECTOR_SHIFT as u8, BLOCK_SHIFT, BLOCK_SHIFT, BLOCK_SHIFT]);
        bytes[24..32].copy_from_slice(&(self.size_bytes >> SECTOR_SHIFT).to_ne_bytes());
        // Segments of a discard.
        bytes[56..58].copy_from_slice(&1_u16.to_ne_bytes());
        bytes
    }
}

/// A request as the kernel describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Descriptor {
    /// Kind in the low 8 bits, then flags.
    pub kind_and_flags: u32,
    pub sectors: u32,
    pub first_sector: u64,
}

pub(super) const KIND_READ: u32 = 0;
pub(super) const KIND_WRITE: u32 = 1;
pub(super) const KIND_FLUSH: u32 = 2;
pub(super) const KIND_DISCARD: u32 = 3;
pub(super) const KIND_WRITE_ZEROES: u32 = 5;
pub(super) const FLAG_FUA: u32 = 1 << 13;
pub(super) const FLAG_NO_UNMAP: u32 = 1 << 15;

impl Descriptor {
    pub fn decode(bytes: &[u8; DESCRIPTOR_BYTES]) -> Descriptor {
        Descriptor {
            kind_and_flags: u32::from_ne_bytes(part(bytes, 0)),
            sectors: u32::from_ne_bytes(part(bytes, 4)),
            first_sector: u64::from_ne_bytes(part(bytes, 8)),
        }
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a part lies inside")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        // As _IOWR('u', 0x04, struct ublksrv_ctrl_cmd) and its kin come out of the C compiler.
        assert_eq!(ADD_DEVICE, 0xc020_7504);
        assert_eq!(GET_FEATURES, 0x8020_7513);
        assert_eq!(FETCH, 0xc010_7520);
        assert_eq!(COMMIT_AND_FETCH, 0xc010_7521);
        assert_eq!(data_position(2, 5, 4096), 0x8000_0000 + (2 << 41) + (5 << 25) + 4096);
        assert_eq!(descriptions(1, 128), (98304, 4096));
        assert_eq!(descriptions(0, 256), (0, 8192));
    }

    #[test]
    fn information_comes_back() {
        let info = Info {
            queues: 2,
            depth: 64,
            state: STATE_QUIESCED,
            request_bytes_max: 1 << 19,
            id: 7,
            process: 4711,
            flags: FEATURE_USER_COPY | 1 << 40,
            mark: 0x1234_5678_9abc_def0,
        };
        assert_eq!(Info::decode(&info.encode()), info);
        assert_eq!(info.encode()[24], 1 << 7);
    }

    #[test]
    fn parameters_lie_where_the_kernel_reads_them() {
        let parameters = Parameters {
            size_bytes: 1 << 30,
            request_bytes_max: 512 << 10,
            stripe_bytes: 2 << 20,
            unmap_bytes_max: 32 << 20,
            is_volatile: true,
        };
        let bytes = parameters.encode();
        let at = |at: usize| u32::from_ne_bytes(part(&bytes, at));
        assert_eq!((at(0), at(4), at(8)), (60, 3, 12));
        assert_eq!(bytes[12..16], [9, 12, 12, 12]);
        assert_eq!((at(16), at(20), at(24), at(28)), (1024, 4096, 1 << 21, 0));
        assert_eq!((at(44), at(48), at(52), at(56)), (4096, 1 << 16, 1 << 16, 1));
    }
}
