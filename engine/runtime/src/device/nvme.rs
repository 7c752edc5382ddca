//! NVMe commands byte by byte, as the kernel's passthrough takes them, and what a device answers. Step 4 of the flow,
//! for a store that is driven by commands; nothing here speaks with a device.
//!
//! Invariants: reserved bytes are zero; a command that cannot be (no blocks, or more than its field holds) is never
//! encoded; what a device says of itself is checked before it is used.

use std::fmt;

/// Bytes of a command in an entry of the io_uring; the kernel's structure, filled up with zeroes.
pub(crate) const ENTRY_BYTES: usize = 80;
/// Bytes of an administrator's command as its ioctl takes it.
pub(crate) const ADMIN_BYTES: usize = 72;
/// Bytes that a namespace tells of itself.
pub(crate) const IDENTIFY_BYTES: usize = 4096;
/// The io_uring's command for one run of memory: `_IOWR('N', 0x80, struct nvme_uring_cmd)`.
pub(crate) const URING_IO: u32 = 0xC048_4E80;
/// The same for a list of runs: `_IOWR('N', 0x81, struct nvme_uring_cmd)`.
pub(crate) const URING_IO_LIST: u32 = 0xC048_4E81;
/// `_IO('N', 0x40)`: asks for the namespace's number.
pub(crate) const IOCTL_ID: u64 = 0x4E40;
/// `_IOWR('N', 0x41, struct nvme_passthru_cmd)`: a command for the controller.
pub(crate) const IOCTL_ADMIN: u64 = 0xC048_4E41;

/// Most logical blocks of one read or write: its field has 16 bits and counts from zero.
pub(crate) const LOGICAL_BLOCKS_MAX: u32 = 1 << 16;

/// What a command does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Deed {
    Read,
    Write,
    Flush,
}

impl Deed {
    fn opcode(self) -> u8 {
        match self {
            Deed::Flush => 0x00,
            Deed::Write => 0x01,
            Deed::Read => 0x02,
        }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Deed::Read => "read",
            Deed::Write => "write",
            Deed::Flush => "flush",
        })
    }
}

/// A command on a namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Command {
    pub deed: Deed,
    /// The namespace's number.
    pub namespace: u32,
    /// First logical block.
    pub first: u64,
    /// How many; none for a flush.
    pub count: u32,
    /// Where the bytes are, or the list of their runs.
    pub address: u64,
    /// Their length in bytes, or the entries of the list.
    pub length: u32,
}

impl Command {
    /// The kernel's `struct nvme_uring_cmd`. Double words 10 and 11 are the first block, 12 the count less one.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &[self.deed.opcode()]);
        put(4, &self.namespace.to_le_bytes());
        if self.deed == Deed::Flush {
            return bytes;
        }
        let count = self.count;
        assert!((1..=LOGICAL_BLOCKS_MAX).contains(&count), "a command for {count} blocks");
        put(24, &self.address.to_le_bytes());
        put(36, &self.length.to_le_bytes());
        put(40, &self.first.to_le_bytes());
        put(48, &(count - 1).to_le_bytes());
        bytes
    }
}

/// Asks for what a namespace says of itself, into [`IDENTIFY_BYTES`] at `address`: `struct nvme_passthru_cmd`.
pub(crate) fn identify(namespace: u32, address: u64) -> [u8; ADMIN_BYTES] {
    const IDENTIFY: u8 = 0x06;
    let mut bytes = [0; ADMIN_BYTES];
    bytes[0] = IDENTIFY;
    bytes[4..8].copy_from_slice(&namespace.to_le_bytes());
    bytes[24..32].copy_from_slice(&address.to_le_bytes());
    bytes[36..40].copy_from_slice(&(IDENTIFY_BYTES as u32).to_le_bytes());
    // Double word 10 stays 0: the structure of one namespace.
    bytes
}

/// How a namespace is formatted, as it says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Format {
    /// Its size in logical blocks.
    pub logical_blocks: u64,
    /// A logical block is 2 to the power of this many bytes.
    pub shift: u8,
    /// Bytes beside each logical block.
    pub metadata_bytes: u16,
}

impl Format {
    /// What the Identify Namespace structure says. The shift may be any number.
    pub fn decode(bytes: &[u8; IDENTIFY_BYTES]) -> Format {
        let size = bytes[0..8].try_into().expect("eight bytes");
        let used = bytes[26];
        // Bits 0 to 3, and above them bits 5 and 6: at most 63.
        let index = usize::from(used & 0x0f | (used & 0x60) >> 1);
        let at = 128 + 4 * index;
        Format {
            logical_blocks: u64::from_le_bytes(size),
            shift: bytes[at + 2],
            metadata_bytes: u16::from_le_bytes([bytes[at], bytes[at + 1]]),
        }
    }
}

/// The status of a command that failed: bits 0 to 7 the code, 8 to 10 its type; more above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Status(pub u16);

impl Status {
    /// What becomes of the same command if it is sent again.
    pub fn outlook(self) -> Outlook {
        const DO_NOT_RETRY: u16 = 1 << 14;
        let (code, kind) = (self.0 & 0xff, self.0 >> 8 & 7);
        match (kind, code) {
            _ if self.0 & DO_NOT_RETRY != 0 => Outlook::Fails,
            // Aborted, queue deleted, interrupted, namespace not ready.
            (0, 0x07 | 0x08 | 0x21 | 0x82) => Outlook::Passes,
            // Of the path, but for a permanent loss of access.
            (3, code) if code != 0x01 => Outlook::Passes,
            _ => Outlook::Unknown,
        }
    }
}

/// What becomes of a failed command if it is sent again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outlook {
    /// It succeeds once something has passed that is nothing of the medium.
    Passes,
    /// The device leaves it open.
    Unknown,
    /// It fails again.
    Fails,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 & 0x7ff {
            0x001 => "invalid opcode",
            0x002 => "invalid field",
            0x004 => "data transfer error",
            0x005 => "aborted, power is being lost",
            0x006 => "internal error",
            0x007 => "abort requested",
            0x008 => "aborted, its queue was deleted",
            0x00b => "invalid namespace or format",
            0x020 => "namespace is write protected",
            0x021 => "interrupted, may be tried again",
            0x080 => "block out of range",
            0x081 => "capacity exceeded",
            0x082 => "namespace not ready",
            0x083 => "reservation conflict",
            0x280 => "write fault",
            0x281 => "unrecovered read error",
            0x282 => "guard check error",
            0x286 => "access denied",
            0x300 => "internal path error",
            0x301 | 0x302 => "namespace not reachable on this path",
            0x370 => "path lost",
            0x371 => "aborted by the host",
            code if code >= 0x700 => "vendor's own",
            _ => "see the NVMe base specification",
        };
        write!(f, "NVMe status {:#05x}, {text}", self.0 & 0x7ff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flush(namespace: u32) -> Command {
        Command { deed: Deed::Flush, namespace, first: 0, count: 0, address: 0, length: 0 }
    }

    /// Offsets of `struct nvme_uring_cmd`: 0 opcode, 1 flags, 2 reserved, 4 namespace, 8 double words 2 and 3, 16
    /// metadata, 24 address, 32 length of metadata, 36 length of data, 40 to 63 double words 10 to 15, 64 time
    /// limit, 68 reserved.
    #[test]
    fn a_read_and_a_write_byte_by_byte() {
        for (deed, opcode) in [(Deed::Read, 2), (Deed::Write, 1)] {
            let command = Command {
                deed,
                namespace: 0x0403_0201,
                first: 0x1817_1615_1413_1211,
                count: 0x0102,
                address: 0x2827_2625_2423_2221,
                length: 0x3433_3231,
            };
            let mut wanted = [0_u8; 80];
            wanted[0] = opcode;
            wanted[4..8].copy_from_slice(&[1, 2, 3, 4]);
            wanted[24..32].copy_from_slice(&[0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28]);
            wanted[36..40].copy_from_slice(&[0x31, 0x32, 0x33, 0x34]);
            wanted[40..48].copy_from_slice(&[0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
            // Zero-based: one less. The upper half has FUA and other wishes: none.
            wanted[48..52].copy_from_slice(&[0x01, 0x01, 0, 0]);
            assert_eq!(command.encode(), wanted);
        }
    }

    #[test]
    fn a_flush_has_a_namespace_and_nothing_else() {
        let mut wanted = [0_u8; 80];
        wanted[4] = 7;
        assert_eq!(flush(7).encode(), wanted);
    }

    #[test]
    fn the_longest_command() {
        let mut command = flush(1);
        command.deed = Deed::Write;
        command.count = LOGICAL_BLOCKS_MAX;
        assert_eq!(command.encode()[48..52], [0xff, 0xff, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "a command for 65537 blocks")]
    fn a_command_too_long() {
        let mut command = flush(1);
        command.deed = Deed::Read;
        command.count = LOGICAL_BLOCKS_MAX + 1;
        command.encode();
    }

    /// The numbers follow from the kernel's macros: direction, size of the structure, letter, number.
    #[test]
    fn numbers_of_the_kernel() {
        let both_ways =
            |size: u32, number: u32| 3 << 30 | size << 16 | u32::from(b'N') << 8 | number;
        assert_eq!(URING_IO, both_ways(72, 0x80));
        assert_eq!(URING_IO_LIST, both_ways(72, 0x81));
        assert_eq!(IOCTL_ADMIN, u64::from(both_ways(72, 0x41)));
        assert_eq!(IOCTL_ID, u64::from(u32::from(b'N') << 8 | 0x40));
    }

    #[test]
    fn identify_asks_for_one_namespace() {
        let mut wanted = [0_u8; 72];
        wanted[0] = 6;
        wanted[4] = 3;
        wanted[24..32].copy_from_slice(&[0, 0x10, 0, 0, 0, 0, 0, 0]);
        wanted[36..40].copy_from_slice(&[0, 0x10, 0, 0]);
        assert_eq!(identify(3, 0x1000), wanted);
    }

    #[test]
    fn formats_of_namespaces() {
        let mut bytes = [0; IDENTIFY_BYTES];
        bytes[0..8].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        // Format 2: 4096 bytes; format 17: 512 bytes and 8 of metadata.
        bytes[128 + 8..128 + 12].copy_from_slice(&[0, 0, 12, 0]);
        bytes[128 + 68..128 + 72].copy_from_slice(&[8, 0, 9, 0]);
        bytes[26] = 2;
        let plain = Format { logical_blocks: 0x10_0000, shift: 12, metadata_bytes: 0 };
        assert_eq!(Format::decode(&bytes), plain);
        bytes[26] = 0x10 | 0x20 | 1;
        let other = Format { shift: 9, metadata_bytes: 8, ..plain };
        assert_eq!(Format::decode(&bytes), other);
        // Whatever a device says is inside the structure.
        bytes[26] = 0xff;
        assert_eq!(Format::decode(&bytes).shift, 0);
    }

    #[test]
    fn what_may_pass() {
        // Aborted by the host, path lost, queue deleted, namespace not ready.
        for status in [0x0371, 0x0370, 0x0008, 0x0082] {
            assert_eq!(Status(status).outlook(), Outlook::Passes);
            assert_eq!(Status(status | 0x4000).outlook(), Outlook::Fails, "the device says so");
        }
        // A write fault, an unrecovered read error, a field that is wrong, access lost for good.
        for status in [0x0280, 0x0281, 0x0002, 0x0301] {
            assert_eq!(Status(status).outlook(), Outlook::Unknown);
            assert_eq!(Status(status | 0x4000).outlook(), Outlook::Fails);
        }
    }

    #[test]
    fn a_status_in_words() {
        let text = Status(0x4281).to_string();
        assert_eq!(text, "NVMe status 0x281, unrecovered read error");
        assert!(Status(0x7ff).to_string().contains("vendor"));
    }
}
