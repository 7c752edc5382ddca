//! A table of things with short-lived names.
//!
//! Invariants: a [`Key`] names at most one thing; a removed thing's key names nothing until its slot was used
//! 65536 times more. A key fits the low 32 bits of a tag.

/// The name of an entry: index in the low half, generation in the high half.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key(pub(super) u32);

/// Entries with their generations.
pub(super) struct Slab<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u16>,
}

struct Entry<T> {
    generation: u16,
    value: Option<T>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Slab<T> {
        Slab { entries: Vec::new(), free: Vec::new() }
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds an entry.
    ///
    /// # Panics
    /// With more than 65536 entries; [`super::limits`] keep the number far below.
    pub(super) fn insert(&mut self, value: T) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            let index = u16::try_from(self.entries.len()).expect("limits keep a slab small");
            self.entries.push(Entry { generation: 0, value: None });
            index
        });
        let entry = &mut self.entries[usize::from(index)];
        assert!(entry.value.is_none(), "a free slot is empty");
        entry.value = Some(value);
        Key(u32::from(index) | u32::from(entry.generation) << 16)
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let (index, generation) = key.parts();
        let entry = self.entries.get_mut(usize::from(index))?;
        if entry.generation != generation {
            return None;
        }
        let value = entry.value.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(index);
        Some(value)
    }

    pub(super) fn get(&self, key: Key) -> Option<&T> {
        let (index, generation) = key.parts();
        let entry = self.entries.get(usize::from(index))?;
        if entry.generation == generation { entry.value.as_ref() } else { None }
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let (index, generation) = key.parts();
        let entry = self.entries.get_mut(usize::from(index))?;
        if entry.generation == generation { entry.value.as_mut() } else { None }
    }

    /// Removes everything and gives it; all keys given so far name nothing.
    pub(super) fn take_all(&mut self) -> Vec<T> {
        let mut taken = Vec::with_capacity(self.len());
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if let Some(value) = entry.value.take() {
                taken.push(value);
                entry.generation = entry.generation.wrapping_add(1);
                self.free.push(u16::try_from(index).expect("limits keep a slab small"));
            }
        }
        taken
    }
}

impl Key {
    fn parts(self) -> (u16, u16) {
        let [a, b, c, d] = self.0.to_le_bytes();
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_key_names_nothing() {
        let mut slab = Slab::new();
        let first = slab.insert('a');
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&'b'));
        assert_eq!(slab.take_all(), ['b']);
        assert_eq!(slab.get_mut(second), None);
        assert_eq!(slab.len(), 0);
        assert_eq!(slab.get(Key(u32::MAX)), None);
    }
}
