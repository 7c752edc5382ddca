//! The exports of a node: which volumes are offered, and how many use each. Before step 1 of the flow: asked when a
//! client comes or leaves.
//!
//! Invariant: a volume that somebody uses is not withdrawn, and one that is withdrawn is opened by nobody: so a volume
//! goes only when nobody has it, however long its deletion takes.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use twinpoint_core::catalog::{Catalog, Volume};
use twinpoint_core::units::VolumeId;

use crate::nbd::Export;

/// See the module.
#[derive(Default)]
pub(crate) struct Exports {
    offers: Mutex<Offers>,
    published: AtomicBool,
}

#[derive(Default)]
struct Offers {
    catalog: Catalog,
    serving: bool,
    uses: HashMap<VolumeId, u32>,
    withdrawn: HashSet<VolumeId>,
}

impl Exports {
    /// From now on these volumes are offered, or none while the node does not serve.
    pub fn publish(&self, catalog: Catalog, serving: bool) {
        let mut offers = self.lock();
        offers.withdrawn.retain(|volume| catalog.get(*volume).is_some());
        offers.catalog = catalog;
        offers.serving = serving;
        self.published.store(true, Ordering::Release);
    }

    /// Whether the exports are known: the node is ready.
    pub fn is_published(&self) -> bool {
        self.published.load(Ordering::Acquire)
    }

    /// One user more of a volume; without a name of the only one.
    pub fn open(&self, name: &str) -> Option<Export> {
        let mut offers = self.lock();
        let volume = match (name, offers.catalog.volumes.as_slice()) {
            ("", [only]) => only,
            _ => offers.catalog.find(name)?,
        };
        let export = Export { volume: volume.id, size_bytes: volume.size_bytes, read_only: false };
        if !offers.offers(export.volume) {
            return None;
        }
        *offers.uses.entry(export.volume).or_default() += 1;
        Some(export)
    }

    /// One user less.
    pub fn close(&self, volume: VolumeId) {
        let mut offers = self.lock();
        let uses = offers.uses.get_mut(&volume).expect("an export is closed after it was opened");
        *uses -= 1;
        if *uses == 0 {
            offers.uses.remove(&volume);
        }
    }

    /// The names that a client may ask for.
    pub fn names(&self) -> Vec<String> {
        let offers = self.lock();
        let volumes = offers.catalog.volumes.iter().filter(|volume| offers.offers(volume.id));
        volumes.map(|volume| volume.name.clone()).collect()
    }

    /// Whether a volume is offered.
    pub fn offers(&self, volume: VolumeId) -> bool {
        let offers = self.lock();
        offers.offers(volume) && offers.catalog.get(volume).is_some()
    }

    /// All volumes, each with the number of its users.
    pub fn volumes(&self) -> Vec<(Volume, u32)> {
        let offers = self.lock();
        let uses = |id| offers.uses.get(&id).copied().unwrap_or(0);
        offers.catalog.volumes.iter().map(|volume| (volume.clone(), uses(volume.id))).collect()
    }

    /// Before a volume is deleted: nobody is to open it meanwhile. Answers which it is, if it is one that was offered. One
    /// whose creation is not committed yet is not known here.
    ///
    /// # Errors
    /// If somebody uses it.
    pub fn withdraw(&self, name: &str) -> Result<Option<VolumeId>, InUse> {
        let mut offers = self.lock();
        let Some(volume) = offers.catalog.find(name).map(|volume| volume.id) else {
            return Ok(None);
        };
        if offers.uses.contains_key(&volume) {
            return Err(InUse);
        }
        Ok(offers.withdrawn.insert(volume).then_some(volume))
    }

    /// A volume that was withdrawn is not deleted.
    pub fn offer_again(&self, volume: VolumeId) {
        self.lock().withdrawn.remove(&volume);
    }

    fn lock(&self) -> MutexGuard<'_, Offers> {
        self.offers.lock().expect("nobody panics while holding the exports")
    }
}

impl Offers {
    fn offers(&self, volume: VolumeId) -> bool {
        self.serving && !self.withdrawn.contains(&volume)
    }
}

/// Somebody uses the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InUse;

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(names: &[&str]) -> Catalog {
        let mut catalog = Catalog::default();
        for name in names {
            catalog.create(name, 1 << 20).unwrap();
        }
        catalog
    }

    #[test]
    fn nobody_opens_a_volume_whose_deletion_has_begun() {
        let exports = Exports::default();
        exports.publish(catalog(&["a", "b"]), true);
        let opened = exports.open("a").unwrap();
        assert_eq!(exports.withdraw("a"), Err(InUse));
        exports.close(opened.volume);
        let withdrawn = exports.withdraw("a").unwrap();
        assert_eq!(withdrawn, Some(opened.volume));
        assert!(exports.open("a").is_none() && !exports.offers(opened.volume));
        assert_eq!(exports.names(), ["b"]);
        // Another one who wants it deleted does not offer it again when that is refused.
        assert_eq!(exports.withdraw("a"), Ok(None));
        exports.publish(catalog(&["a", "b", "c"]), true);
        assert!(exports.open("a").is_none(), "another volume came meanwhile");
        exports.offer_again(opened.volume);
        assert!(exports.open("a").is_some());
    }

    #[test]
    fn a_deleted_volumes_name_can_be_had_again() {
        let exports = Exports::default();
        let mut catalog = catalog(&["a", "b"]);
        exports.publish(catalog.clone(), true);
        exports.withdraw("a").unwrap();
        catalog.delete("a").unwrap();
        exports.publish(catalog.clone(), true);
        assert_eq!(exports.withdraw("a"), Ok(None));
        catalog.create("a", 1 << 20).unwrap();
        exports.publish(catalog, true);
        assert!(exports.open("a").is_some());
    }

    #[test]
    fn without_a_name_the_only_volume_is_meant() {
        let exports = Exports::default();
        assert!(!exports.is_published() && exports.open("").is_none());
        exports.publish(catalog(&["a"]), false);
        assert!(exports.is_published() && exports.open("").is_none() && exports.names().is_empty());
        exports.publish(catalog(&["a"]), true);
        assert_eq!(exports.open(""), exports.open("a"));
        assert_eq!(exports.volumes()[0].1, 2);
        exports.publish(catalog(&["a", "b"]), true);
        assert!(exports.open("").is_none());
    }
}
