//! The NVMe namespace behind a store's path: its block device, its generic character device, and how large a command
//! may be, as the kernel tells in sysfs. Outside the flow: done once when the store is opened.
//!
//! Invariants: both device nodes are checked against the kernel's numbers, so that commands never go to another
//! namespace than the one that is claimed; what sysfs says is bounded before it is used.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use twinpoint_core::units::BLOCK_BYTES;

use super::error::{DeviceError, PassthroughFault, Step};
use super::nvme::{Format, LOGICAL_BLOCKS_MAX};
use super::{CommandTarget, system};

const SYSFS: &str = "/sys";
const DEVICES: &str = "/dev";
/// Most bytes of a command of ours, whatever the device allows: an operation of the engine has no more.
const COMMAND_BYTES_MAX: u64 = 4 << 20;
/// Most runs of memory in one command: the kernel's limit for a list (UIO_MAXIOV).
const COMMAND_PAGES_MAX: u64 = 1024;
/// Most commands under way from one worker.
const DEPTH_MAX: u64 = 1024;
/// What a queue takes where the kernel does not tell.
const DEPTH_UNTOLD: u64 = 64;

/// See the module.
pub(super) struct Namespace {
    /// As the operator named it.
    path: PathBuf,
    block: PathBuf,
    generic: PathBuf,
    /// The generic device's folder in sysfs.
    generic_folder: PathBuf,
    /// The block device's folder in sysfs.
    folder: PathBuf,
    is_head: bool,
}

impl Namespace {
    /// Finds the namespace that `path` names, by its block device or by its generic one.
    ///
    /// # Errors
    /// If it names none.
    pub fn find(path: &Path) -> Result<Namespace, DeviceError> {
        Namespace::find_in(Path::new(SYSFS), Path::new(DEVICES), path)
    }

    fn find_in(sysfs: &Path, devices: &Path, path: &Path) -> Result<Namespace, DeviceError> {
        let refuse = |fault| DeviceError::Passthrough { path: path.into(), fault };
        let found = fs::metadata(path).map_err(|error| system(Step::Open, path, error))?;
        let kind = if found.file_type().is_block_device() {
            "block"
        } else if found.file_type().is_char_device() {
            "char"
        } else {
            return Err(refuse(PassthroughFault::NotNvme));
        };
        let (name, folder) =
            named(sysfs, kind, found.rdev()).ok_or_else(|| refuse(PassthroughFault::NotNvme))?;
        if folder.join("partition").exists() {
            return Err(refuse(PassthroughFault::Partition));
        }
        let numbers = ["nvme", "ng"].iter().find_map(|prefix| numbers_of(&name, prefix));
        let (controller, number) = numbers.ok_or_else(|| refuse(PassthroughFault::NotNvme))?;
        let (block, generic) =
            (format!("nvme{controller}n{number}"), format!("ng{controller}n{number}"));
        let generic_folder = sysfs.join("class/nvme-generic").join(&generic);
        if !generic_folder.exists() {
            return Err(refuse(PassthroughFault::NoGeneric));
        }
        // Nodes in /dev may have any name; the operator's own is taken where it is the one that is wanted.
        let is_block = kind == "block";
        let block_path = if is_block { path.into() } else { devices.join(&block) };
        let generic_path = if is_block { devices.join(&generic) } else { path.into() };
        let mut namespace = Namespace {
            path: path.into(),
            block: block_path,
            generic: generic_path,
            generic_folder,
            folder: sysfs.join("class/block").join(block),
            is_head: false,
        };
        namespace.is_head = is_subsystem(&namespace.parent()?);
        Ok(namespace)
    }

    /// The block device.
    pub fn block(&self) -> &Path {
        &self.block
    }

    /// The namespace cannot be driven by commands.
    fn refuse(&self, fault: PassthroughFault) -> DeviceError {
        DeviceError::Passthrough { path: self.path.clone(), fault }
    }

    /// Opens the generic device of the namespace whose block device is open.
    ///
    /// # Errors
    /// If the system refuses, or one of the two nodes is another device's.
    pub fn open_generic(&self, block: &File) -> Result<File, DeviceError> {
        let open = OpenOptions::new().read(true).write(true).open(&self.generic);
        let generic = open.map_err(|error| match error.kind() {
            ErrorKind::NotFound => self.refuse(PassthroughFault::NoGeneric),
            _ => system(Step::Open, &self.generic, error),
        })?;
        for (file, folder) in [(block, &self.folder), (&generic, &self.generic_folder)] {
            let found =
                file.metadata().map_err(|error| system(Step::Inspect, &self.path, error))?;
            let told = fs::read_to_string(folder.join("dev")).unwrap_or_default();
            if told.trim() != device_text(found.rdev()) {
                return Err(self.refuse(PassthroughFault::OtherNode));
            }
        }
        Ok(generic)
    }

    /// How commands may be, from what the device says of the namespace, by its number, and what the kernel says.
    ///
    /// # Errors
    /// If blocks of ours do not fit in the namespace's format, or what is asked for is not there.
    pub fn target(
        &self,
        generic: RawFd,
        is_polled: bool,
        (namespace, format): (u32, Format),
        block_bytes: u64,
    ) -> Result<CommandTarget, DeviceError> {
        if is_polled && self.queue_limit("io_poll").unwrap_or(0) == 0 {
            return Err(self.refuse(PassthroughFault::NoPollQueues));
        }
        if format.metadata_bytes != 0 {
            let fault = PassthroughFault::Metadata { bytes: format.metadata_bytes };
            return Err(self.refuse(fault));
        }
        let shift = format.shift;
        if !(9..=BLOCK_BYTES.trailing_zeros() as u8).contains(&shift) {
            return Err(DeviceError::WrongSector {
                path: self.path.clone(),
                bytes: 1_u32.checked_shl(u32::from(shift)).unwrap_or(u32::MAX),
            });
        }
        if format.logical_blocks.checked_mul(1 << shift) != Some(block_bytes) {
            return Err(self.refuse(PassthroughFault::OtherSize));
        }
        let page = BLOCK_BYTES as u64;
        let longest = self.queue_limit("max_hw_sectors_kb").unwrap_or(0).saturating_mul(1024);
        let longest = longest.min(COMMAND_BYTES_MAX).min(u64::from(LOGICAL_BLOCKS_MAX) << shift);
        let pages = self.queue_limit("max_segments").unwrap_or(1).min(COMMAND_PAGES_MAX);
        let bytes_max = longest.min(pages * page) / page * page;
        if bytes_max == 0 {
            return Err(self.refuse(PassthroughFault::TooShort));
        }
        let depth = self.queue_limit("nr_requests").unwrap_or(DEPTH_UNTOLD).clamp(1, DEPTH_MAX);
        let narrow = |number| u32::try_from(number).expect("it was bounded above");
        Ok(CommandTarget {
            generic,
            namespace,
            shift,
            bytes_max: narrow(bytes_max),
            depth: narrow(depth),
            is_head: self.is_head,
            is_polled,
        })
    }

    /// The folder in sysfs of what both belong to: one controller, or one subsystem of several paths.
    fn parent(&self) -> Result<PathBuf, DeviceError> {
        let parent = |folder: &Path| fs::canonicalize(folder.join("device"));
        match (parent(&self.folder), parent(&self.generic_folder)) {
            (Ok(one), Ok(other)) if one == other => Ok(one),
            _ => Err(self.refuse(PassthroughFault::OtherNode)),
        }
    }

    fn queue_limit(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join("queue").join(name)).ok()?.trim().parse().ok()
    }
}

/// A device's name and folder in sysfs.
fn named(sysfs: &Path, kind: &str, device: u64) -> Option<(String, PathBuf)> {
    let folder = fs::canonicalize(sysfs.join("dev").join(kind).join(device_text(device))).ok()?;
    Some((folder.file_name()?.to_str()?.to_owned(), folder))
}

fn is_subsystem(parent: &Path) -> bool {
    let name = parent.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("nvme-subsys"))
}

fn device_text(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// The numbers of `nvme1n2` or `ng1n2`: controller or subsystem, and namespace.
fn numbers_of(name: &str, prefix: &str) -> Option<(u32, u32)> {
    let (controller, namespace) = name.strip_prefix(prefix)?.split_once('n')?;
    Some((controller.parse().ok()?, namespace.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    /// A sysfs in which the numbers of `/dev/null` and `/dev/zero` are those of an NVMe namespace's nodes.
    struct Tree {
        folder: TempDir,
    }

    impl Tree {
        fn new() -> Tree {
            let folder = tempfile::tempdir().unwrap();
            let sysfs = folder.path();
            for name in ["dev/char", "devices/nvme0/nvme0n1/queue", "devices/nvme0/ng0n1"] {
                fs::create_dir_all(sysfs.join(name)).unwrap();
            }
            for name in ["class/nvme-generic", "class/block"] {
                fs::create_dir_all(sysfs.join(name)).unwrap();
            }
            let devices = sysfs.join("devices/nvme0");
            symlink(devices.join("ng0n1"), sysfs.join("class/nvme-generic/ng0n1")).unwrap();
            symlink(devices.join("nvme0n1"), sysfs.join("class/block/nvme0n1")).unwrap();
            symlink(devices.join("ng0n1"), sysfs.join("dev/char/1:5")).unwrap();
            for name in ["ng0n1", "nvme0n1"] {
                symlink(&devices, devices.join(name).join("device")).unwrap();
            }
            fs::write(devices.join("ng0n1/dev"), "1:5\n").unwrap();
            fs::write(devices.join("nvme0n1/dev"), "1:3\n").unwrap();
            Tree { folder }
        }

        fn set(&self, limit: &str, value: &str) {
            let queue = self.folder.path().join("class/block/nvme0n1/queue");
            fs::write(queue.join(limit), format!("{value}\n")).unwrap();
        }

        fn find(&self, path: &str) -> Result<Namespace, DeviceError> {
            Namespace::find_in(self.folder.path(), Path::new("/dev"), Path::new(path))
        }
    }

    fn fault<T>(result: Result<T, DeviceError>) -> PassthroughFault {
        match result.err().unwrap() {
            DeviceError::Passthrough { fault, .. } => fault,
            other => panic!("{other}"),
        }
    }

    fn format(logical_blocks: u64, shift: u8) -> Format {
        Format { logical_blocks, shift, metadata_bytes: 0 }
    }

    #[test]
    fn a_namespace_by_its_generic_device() {
        let tree = Tree::new();
        let namespace = tree.find("/dev/zero").unwrap();
        assert_eq!(namespace.block(), Path::new("/dev/nvme0n1"));
        assert!(namespace.open_generic(&File::open("/dev/null").unwrap()).is_ok());
        let other = namespace.open_generic(&File::open("/dev/full").unwrap());
        assert_eq!(fault(other), PassthroughFault::OtherNode);
    }

    #[test]
    fn what_is_no_namespace() {
        let tree = Tree::new();
        let file = tree.folder.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.to_str().unwrap(), "/dev/null", "/dev/full"] {
            assert_eq!(fault(tree.find(path)), PassthroughFault::NotNvme, "{path}");
        }
        assert!(matches!(
            tree.find("/dev/there-is-none"),
            Err(DeviceError::System { step: Step::Open, .. })
        ));
        let sysfs = tree.folder.path();
        fs::write(sysfs.join("devices/nvme0/ng0n1/partition"), "1\n").unwrap();
        assert_eq!(fault(tree.find("/dev/zero")), PassthroughFault::Partition);
        fs::remove_file(sysfs.join("devices/nvme0/ng0n1/partition")).unwrap();
        fs::remove_file(sysfs.join("devices/nvme0/ng0n1/device")).unwrap();
        assert_eq!(fault(tree.find("/dev/zero")), PassthroughFault::OtherNode);
        fs::remove_file(sysfs.join("class/nvme-generic/ng0n1")).unwrap();
        assert_eq!(fault(tree.find("/dev/zero")), PassthroughFault::NoGeneric);
    }

    #[test]
    fn commands_are_as_long_as_device_and_kernel_allow() {
        let tree = Tree::new();
        let namespace = tree.find("/dev/zero").unwrap();
        let bytes = 1 << 30;
        let target =
            |shift: u8| namespace.target(7, false, (3, format(bytes >> shift, shift)), bytes);
        assert_eq!(fault(target(9)), PassthroughFault::TooShort);
        tree.set("max_hw_sectors_kb", "512");
        tree.set("max_segments", "127");
        tree.set("nr_requests", "63");
        let found = target(9).unwrap();
        assert_eq!((found.bytes_max, found.depth), (127 * 4096, 63));
        assert_eq!((found.namespace, found.shift, found.is_polled), (3, 9, false));
        tree.set("max_segments", "65535");
        assert_eq!(target(12).unwrap().bytes_max, 512 << 10);
        tree.set("max_hw_sectors_kb", "2147483647");
        tree.set("nr_requests", "99999999");
        let found = target(12).unwrap();
        assert_eq!((found.bytes_max, found.depth), (4 << 20, 1024));
        tree.set("max_hw_sectors_kb", "2");
        assert_eq!(fault(target(9)), PassthroughFault::TooShort);
        tree.set("max_hw_sectors_kb", "lots");
        assert_eq!(fault(target(9)), PassthroughFault::TooShort);
    }

    #[test]
    fn formats_that_do_not_fit() {
        let tree = Tree::new();
        tree.set("max_hw_sectors_kb", "512");
        let namespace = tree.find("/dev/zero").unwrap();
        let beside = Format { metadata_bytes: 8, ..format(8, 9) };
        let refused = namespace.target(7, false, (1, beside), 4096);
        assert_eq!(fault(refused), PassthroughFault::Metadata { bytes: 8 });
        for shift in [0, 8, 13, 31, 32, 255] {
            let refused = namespace.target(7, false, (1, format(1, shift)), 4096);
            assert!(matches!(refused, Err(DeviceError::WrongSector { .. })), "{shift}");
        }
        for logical_blocks in [7, 9, u64::MAX] {
            let refused = namespace.target(7, false, (1, format(logical_blocks, 9)), 4096);
            assert_eq!(fault(refused), PassthroughFault::OtherSize);
        }
    }

    #[test]
    fn polling_needs_poll_queues() {
        let tree = Tree::new();
        tree.set("max_hw_sectors_kb", "512");
        let namespace = tree.find("/dev/zero").unwrap();
        let target = || namespace.target(7, true, (1, format(8, 9)), 4096);
        assert_eq!(fault(target()), PassthroughFault::NoPollQueues);
        for said in ["0", "yes"] {
            tree.set("io_poll", said);
            assert_eq!(fault(target()), PassthroughFault::NoPollQueues, "{said}");
        }
        tree.set("io_poll", "1");
        let found = target().unwrap();
        assert!(found.is_polled && found.generic == 7);
    }

    #[test]
    fn several_paths_lead_to_a_subsystem() {
        assert!(is_subsystem(Path::new("/sys/devices/virtual/nvme-subsystem/nvme-subsys0")));
        assert!(!is_subsystem(Path::new("/sys/devices/pci0000:00/0000:00:03.0/nvme/nvme0")));
    }

    #[test]
    fn names_have_two_numbers() {
        assert_eq!(numbers_of("nvme12n3", "nvme"), Some((12, 3)));
        assert_eq!(numbers_of("ng0n1", "ng"), Some((0, 1)));
        // A hidden path of several, a controller, a partition, another driver.
        for name in ["nvme0c1n1", "nvme0", "nvme0n1p1", "sda", "nvme-n1", "nvmen"] {
            assert_eq!(numbers_of(name, "nvme"), None, "{name}");
        }
    }
}
