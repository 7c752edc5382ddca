"""The log of dm-log-writes, read on the host: what a device was told, in order, with its flushes.

Layout, little-endian: a superblock in the first sector (magic, version, entries, sector size), then for each entry a
head of one sector (first sector, sectors, flags, bytes behind it) and its data, padded to sectors. The kernel writes an
entry when its request was completed, and those that a flush covers before the flush's own: so at each flush the entries
up to it are what the device must hold after a power cut, and of the entries up to the next flush any part may be there.
"""

import struct

MAGIC = 0x6A736677736872
SECTOR = 512
FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16
DATA_BYTES_MAX = 64 << 20


class Entry:
    def __init__(self, sector, sectors, flags, data):
        self.sector = sector
        self.sectors = sectors
        self.flags = flags
        self.data = data

    @property
    def is_boundary(self):
        """From here on everything before it, and it, is durable."""
        return bool(self.flags & (FLUSH | FUA))

    @property
    def mark(self):
        return self.data.rstrip(b"\0").decode(errors="replace") if self.flags & MARK else None

    def apply(self, image):
        """Writes it into an image, an open file."""
        if self.flags & MARK or self.sectors == 0:
            return
        image.seek(self.sector * SECTOR)
        image.write(bytes(self.sectors * SECTOR) if self.flags & DISCARD else self.data)


def read(path):
    """All entries of a log. Raises ValueError for what is no log."""
    with open(path, "rb") as log:
        magic, version, entries, sector = struct.unpack("<QQQI", log.read(28))
        if magic != MAGIC or version != 1 or sector != SECTOR:
            raise ValueError(f"no log of 512-byte sectors: magic {magic:x}, version {version}, sectors of {sector}")
        position = sector
        for _ in range(entries):
            log.seek(position)
            first, sectors, flags, length = struct.unpack("<QQQQ", log.read(32))
            position += sector
            # The text of a mark lies in the head's own sector, the data of a write behind it.
            if flags & MARK:
                data = log.read(min(length, sector - 32))
            elif flags & DISCARD:
                data = b""
            else:
                if length > DATA_BYTES_MAX:
                    raise ValueError(f"an entry of {length} bytes")
                log.seek(position)
                data = log.read(sectors * sector)
                position += sectors * sector
            yield Entry(first, sectors, flags, data)
