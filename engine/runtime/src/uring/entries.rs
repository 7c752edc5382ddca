//! Which entries of a submission queue may be written anew. Step 4 of the flow, for a store that is driven by commands.
//!
//! An entry is the kernel's from its hand-over to its reading, and that should end with the call that hands it over. But
//! kernels from 6.10 to 6.13, 6.12 among them, read a command's entry once more when they could not begin the command at once
//! (its queue is frozen, as while a controller is reset, or full): by then there may be another command in it, and the
//! first one would be lost, and answered as done. So an entry of a command is left alone until the command has ended.
//!
//! Invariant: a number is given once; an entry is free when no command that lies in it, or in one before it, is under way.

use std::collections::VecDeque;

/// The entries of one queue.
pub(super) struct Entries {
    count: u64,
    /// The number of the next one that is written; it lies at this place of the queue, modulo its length.
    next: u64,
    /// Commands by their numbers, and whether each has ended. The first has not.
    commands: VecDeque<(u64, bool)>,
}

impl Entries {
    /// Of a queue of so many.
    pub fn new(count: u32) -> Entries {
        Entries { count: u64::from(count), next: 0, commands: VecDeque::new() }
    }

    /// Whether the next one may be written.
    pub fn is_free(&self) -> bool {
        self.commands.front().is_none_or(|(oldest, _)| self.next - oldest < self.count)
    }

    /// Whether the next one may hold a command: half of the queue is kept from them, so that what is not for the device,
    /// a heartbeat above all, goes on while the device holds one command for long.
    pub fn is_free_for_command(&self) -> bool {
        self.commands.front().is_none_or(|(oldest, _)| self.next - oldest < self.count / 2)
    }

    /// An entry was written that the kernel reads once.
    pub fn written(&mut self) {
        self.next += 1;
    }

    /// The next entry will hold a command: its number.
    pub fn command(&mut self) -> u64 {
        assert!(self.is_free(), "a command's entry is written anew while it is under way");
        self.commands.push_back((self.next, false));
        self.next += 1;
        self.next - 1
    }

    /// A command ended.
    pub fn ended(&mut self, number: u64) {
        let place = self.commands.partition_point(|(other, _)| *other < number);
        let command = self.commands.get_mut(place).filter(|(found, _)| *found == number);
        command.expect("a command ends once").1 = true;
        while self.commands.front().is_some_and(|(_, has_ended)| *has_ended) {
            self.commands.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_commands_under_way_are_left_alone() {
        let mut entries = Entries::new(4);
        let first = entries.command();
        let second = entries.command();
        assert!(entries.is_free() && !entries.is_free_for_command(), "half is kept from commands");
        entries.written();
        entries.written();
        assert!(!entries.is_free(), "the next is the first one's");
        entries.ended(second);
        assert!(!entries.is_free());
        entries.ended(first);
        assert!(entries.is_free() && entries.commands.is_empty());
        // Without commands the kernel's own head is all that counts.
        (0..10).for_each(|_| entries.written());
        assert!(entries.is_free());
    }

    #[test]
    #[should_panic(expected = "a command ends once")]
    fn twice() {
        let mut entries = Entries::new(4);
        let (_, number) = (entries.command(), entries.command());
        entries.ended(number);
        entries.ended(number + 1);
    }
}
