//! What the store may hold: for each sector, every write in the order of sending.
//!
//! One counter numbers sendings and answers, so "answered before sent" is a comparison. Rules checked here:
//! - a read gives the last answered write of each sector, or one not answered then;
//! - after a crash each sector holds one of its writes, at least as new as the newest answered before the sending of
//!   the last kept flush (R5), and of any write that the image shows (R2, R3: the image is a cut).

use std::collections::{BTreeMap, BTreeSet};

use twinpoint_core::catalog::Catalog;
use twinpoint_core::units::{BLOCK_BYTES, SECTOR_BYTES};

use crate::content::{Block, sector_value};

/// Sectors of one block.
pub(crate) const SECTORS: u64 = (BLOCK_BYTES / SECTOR_BYTES) as u64;

/// What a store shows: the mapped blocks of its volumes.
pub(crate) type Image = BTreeMap<(u32, u64), Block>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Model {
    clock: u64,
    writes: Vec<Write>,
    pub volumes: BTreeMap<u32, Volume>,
    /// Volumes that were deleted, or dropped by a crash: a store that went another way may bring them back.
    gone: BTreeMap<u32, Volume>,
    /// Names of creations and deletions whose reply is awaited.
    creating: BTreeSet<String>,
    deleting: BTreeSet<String>,
    /// When the newest answered flush was sent.
    pub flushed: u64,
    /// The same for flushes whose answer promised the secondary's copy.
    pub flushed_remote: u64,
}

#[derive(Debug)]
struct Write {
    sent: u64,
    answered: Option<u64>,
    /// An unmap: its sectors read as zeroes.
    zero: bool,
    /// Answered as not done.
    void: bool,
    /// Dropped by a crash.
    lost: bool,
}

/// A volume and the history of its sectors.
#[derive(Debug)]
pub(crate) struct Volume {
    pub name: String,
    pub blocks: u64,
    /// Writes of each sector in the order of sending; the first is always a base that is there.
    sectors: BTreeMap<u64, Vec<u64>>,
    /// The newest unmap of each sector that a crash dropped: a store that went another way may show it, as zeroes.
    lost_unmaps: BTreeMap<u64, u64>,
}

impl Volume {
    fn new(name: String, blocks: u64) -> Volume {
        Volume { name, blocks, sectors: BTreeMap::new(), lost_unmaps: BTreeMap::new() }
    }
}

impl Model {
    pub fn new() -> Model {
        let beginning = Write { sent: 0, answered: Some(0), zero: true, void: false, lost: false };
        Model { writes: vec![beginning], ..Model::default() }
    }

    /// Now, as a place in the order of sendings and answers.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write or an unmap is sent; tells its value.
    pub fn sent(&mut self, volume: u32, first: u64, count: u64, zero: bool) -> u64 {
        let sent = self.tick();
        let id = self.writes.len() as u64;
        self.writes.push(Write { sent, answered: None, zero, void: false, lost: false });
        let volume = self.volumes.get_mut(&volume).expect("clients use volumes that exist");
        for sector in first..first + count {
            volume.sectors.entry(sector).or_insert_with(|| vec![0]).push(id);
        }
        id
    }

    pub fn answered(&mut self, id: u64) {
        let now = self.tick();
        self.writes[id as usize].answered = Some(now);
    }

    pub fn not_done(&mut self, id: u64) {
        self.tick();
        self.writes[id as usize].void = true;
    }

    /// From where in each sector's history a read sent now may choose.
    pub fn read_sent(&mut self, volume: u32, first: u64, count: u64) -> Vec<usize> {
        self.tick();
        let volume = &self.volumes[&volume];
        let writes = &self.writes;
        let newest_answered = |list: &Vec<u64>| {
            list.iter()
                .rposition(|id| writes[*id as usize].answered.is_some())
                .expect("the base is answered")
        };
        let sectors = first..first + count;
        sectors.map(|sector| volume.sectors.get(&sector).map_or(0, newest_answered)).collect()
    }

    /// Checks what a read found in one sector.
    pub fn check_read(&self, volume: u32, sector: u64, from: usize, bytes: &[u8]) {
        let Some(history) = self.volumes.get(&volume) else { return };
        let value = sector_value(bytes, volume, sector);
        let value =
            value.unwrap_or_else(|| panic!("volume {volume} sector {sector} holds foreign bytes"));
        let allowed: Vec<u64> = match history.sectors.get(&sector) {
            Some(list) => list[from..]
                .iter()
                .filter(|id| !self.is_void(**id))
                .map(|id| self.shown(*id))
                .collect(),
            None => vec![0],
        };
        assert!(
            allowed.contains(&value),
            "volume {volume} sector {sector} reads {value}, not one of {allowed:?}"
        );
    }

    /// Checks a sector that the store calls unmapped.
    pub fn check_unmapped(&self, volume: u32, sector: u64, from: usize) {
        self.check_read(volume, sector, from, &[0; SECTOR_BYTES]);
    }

    pub fn creating(&mut self, name: &str) {
        self.creating.insert(name.to_owned());
    }

    pub fn created(&mut self, id: u32, name: &str, blocks: u64) {
        self.creating.remove(name);
        let volume = Volume::new(name.to_owned(), blocks);
        self.gone.remove(&id);
        let fresh = self.volumes.insert(id, volume).is_none();
        assert!(fresh, "volume id {id} was given twice");
    }

    pub fn deleting(&mut self, name: &str) {
        self.deleting.insert(name.to_owned());
    }

    pub fn is_deleting(&self, id: u32) -> bool {
        self.volumes.get(&id).is_none_or(|volume| self.deleting.contains(&volume.name))
    }

    pub fn deleted(&mut self, id: u32) {
        if let Some(volume) = self.volumes.remove(&id) {
            self.deleting.remove(&volume.name);
            self.gone.insert(id, volume);
        }
    }

    /// Checks an image against all promises up to `promised`. Tells whether it was of this history at all: a store
    /// that went another way shows writes that a crash dropped elsewhere.
    pub fn check(&self, image: &Image, catalog: &Catalog, promised: u64) -> bool {
        let shown = self.values(image, catalog);
        if shown.values().any(|value| self.writes[*value as usize].lost) {
            return false;
        }
        let seen = self.seen(&shown);
        let bound = seen.max(promised);
        for (id, volume) in &self.volumes {
            if catalog.volumes.iter().all(|there| there.id.0 != *id) {
                continue;
            }
            for (sector, list) in &volume.sectors {
                let value = shown.get(&(*id, *sector)).copied().unwrap_or(0);
                let index = self.place(list, value);
                let index = index.unwrap_or_else(|| {
                    panic!("volume {id} sector {sector} shows {value} of {list:?}")
                });
                let needed = list.iter().rposition(|id| self.answered_by(*id, bound)).unwrap_or(0);
                let lost_unmap = volume.lost_unmaps.get(sector);
                if value == 0 && index < needed && lost_unmap.is_some_and(|id| *id > list[needed]) {
                    return false;
                }
                assert!(
                    index >= needed,
                    "not a cut: volume {id} sector {sector} shows {value} of {list:?}, but needs {} (promised {promised}, \
                     seen {seen})",
                    list[needed]
                );
            }
        }
        true
    }

    /// The image is what is there from now on.
    /// `is_kept`: nothing that was answered may be missing.
    pub fn adopt(&mut self, image: &Image, catalog: &Catalog, is_kept: bool) {
        let shown = self.values(image, catalog);
        let seen = self.seen(&shown);
        // Of an unmap that is back it is not known which one it was.
        let trim = self.writes.len() as u64;
        let now = Some(self.clock);
        self.writes.push(Write { sent: 0, answered: now, zero: true, void: false, lost: false });
        for volume in &catalog.volumes {
            let (name, blocks) = (volume.name.clone(), volume.size_bytes / BLOCK_BYTES as u64);
            let known = self.volumes.entry(volume.id.0);
            let gone = self.gone.remove(&volume.id.0).filter(|gone| gone.name == name);
            let volume = known.or_insert_with(|| gone.unwrap_or_else(|| Volume::new(name, blocks)));
            self.creating.remove(&volume.name);
            self.deleting.remove(&volume.name);
        }
        let is_there = |id: &u32| catalog.volumes.iter().any(|there| there.id.0 == *id);
        let left: Vec<u32> = self.volumes.keys().copied().filter(|id| !is_there(id)).collect();
        for id in left {
            let volume = self.volumes.remove(&id).expect("it was listed");
            assert!(self.deleting.contains(&volume.name) || !is_kept, "volume {id} is gone");
            self.gone.insert(id, volume);
        }
        self.deleting.clear();
        self.creating.clear();
        let mut volumes = std::mem::take(&mut self.volumes);
        for (id, volume) in &mut volumes {
            for (sector, list) in &mut volume.sectors {
                let value = shown.get(&(*id, *sector)).copied().unwrap_or(0);
                let needed = list.iter().rposition(|id| self.answered_by(*id, seen)).unwrap_or(0);
                let place = self.place(list, value).filter(|index| *index >= needed);
                // Else a write that a crash dropped on the other side is back, with those before it; what came after them
                // here goes.
                let newer = || list.iter().position(|id| *id > value).unwrap_or(list.len());
                let keep = match (place, value) {
                    (Some(index), _) => index + 1,
                    (None, 0) => needed + 1,
                    (None, _) => newer(),
                };
                let dropped = list.split_off(keep);
                for id in dropped.into_iter().filter(|id| *id > 0) {
                    let write = &mut self.writes[id as usize];
                    write.lost = true;
                    if write.zero {
                        volume.lost_unmaps.insert(*sector, id);
                    }
                }
                if place.is_none() {
                    list.push(if value == 0 { trim } else { value });
                }
                let newest = *list.last().expect("it was filled");
                self.writes[newest as usize].answered.get_or_insert(self.clock);
            }
        }
        for ((id, sector), value) in &shown {
            let volume = volumes.get_mut(id).expect("shown volumes are in the catalog");
            volume.sectors.entry(*sector).or_insert_with(|| vec![0, *value]);
        }
        self.volumes = volumes;
        for value in shown.values() {
            let now = self.clock;
            let write = &mut self.writes[*value as usize];
            if std::mem::take(&mut write.lost) {
                // It is back: what was promised while it was not here did not count on it.
                write.answered = Some(now);
            }
            write.answered.get_or_insert(now);
        }
    }

    /// The values that an image shows, zeroes left out.
    fn values(&self, image: &Image, catalog: &Catalog) -> BTreeMap<(u32, u64), u64> {
        let mut shown = BTreeMap::new();
        for ((volume, block), bytes) in image {
            if catalog.volumes.iter().all(|there| there.id.0 != *volume) {
                continue;
            }
            for index in 0..SECTORS {
                let sector = block * SECTORS + index;
                let start = index as usize * SECTOR_BYTES;
                let value = sector_value(&bytes[start..start + SECTOR_BYTES], *volume, sector);
                let value = value.unwrap_or_else(|| {
                    panic!("volume {volume} sector {sector} holds foreign bytes")
                });
                assert!(
                    (value as usize) < self.writes.len(),
                    "volume {volume} sector {sector} shows {value}"
                );
                if value > 0 {
                    shown.insert((*volume, sector), value);
                }
            }
        }
        shown
    }

    /// When the newest write of an image was sent: what was answered before that is in the image too.
    fn seen(&self, shown: &BTreeMap<(u32, u64), u64>) -> u64 {
        shown.values().map(|value| self.writes[*value as usize].sent).max().unwrap_or(0)
    }

    fn answered_by(&self, id: u64, bound: u64) -> bool {
        self.writes[id as usize].answered.is_some_and(|at| at <= bound)
    }

    /// The newest place in a sector's history that shows `value`.
    fn place(&self, list: &[u64], value: u64) -> Option<usize> {
        list.iter().rposition(|id| self.shown(*id) == value && !self.is_void(*id))
    }

    fn shown(&self, id: u64) -> u64 {
        if self.writes[id as usize].zero { 0 } else { id }
    }

    fn is_void(&self, id: u64) -> bool {
        self.writes[id as usize].void
    }
}
