//! A node's buffers: a pool of 4 KiB blocks named by number, and who owns each.
//!
//! Invariants: a buffer is given back by its owner, once; consecutive buffers are consecutive numbers; what is lent to
//! the peer and what is kept for the shards' own reads never serves frontends.

use std::rc::Rc;

use twinpoint_core::units::{BLOCK_BYTES, BufferId};

use crate::content::{Block, zero_block};
use crate::random::Random;

/// Who may touch a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    Nobody,
    Frontend,
    Shard(u16),
    Lent,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Buffers {
    contents: Vec<Block>,
    owners: Vec<Owner>,
    /// Numbers below serve frontends; from here to `reserve_end` shards borrow.
    frontend_end: usize,
    reserve_end: usize,
}

impl Buffers {
    pub fn new(frontend: usize, reserve: usize, lent: usize) -> Buffers {
        let total = frontend + reserve + lent;
        let mut owners = vec![Owner::Nobody; total];
        owners[frontend + reserve..].fill(Owner::Lent);
        let contents = vec![zero_block(); total];
        Buffers { contents, owners, frontend_end: frontend, reserve_end: frontend + reserve }
    }

    /// Consecutive buffers for a frontend.
    pub fn take(&mut self, count: u32, owner: Owner, random: &mut Random) -> Option<BufferId> {
        let count = count as usize;
        let begin = random.below(self.frontend_end as u64) as usize;
        let fits = |start: usize| {
            start + count <= self.frontend_end
                && self.owners[start..start + count].iter().all(|owner| *owner == Owner::Nobody)
        };
        let start = (begin..self.frontend_end).chain(0..begin).find(|start| fits(*start))?;
        Some(self.give(start, count, owner))
    }

    /// At most `want` consecutive buffers of the shards' reserve.
    pub fn borrow(
        &mut self,
        want: u32,
        shard: u16,
        random: &mut Random,
    ) -> Option<(BufferId, u32)> {
        let start = (self.frontend_end..self.reserve_end)
            .find(|index| self.owners[*index] == Owner::Nobody)?;
        let most = random.between(1, u64::from(want)) as usize;
        let end = self.reserve_end.min(start + most);
        let count =
            self.owners[start..end].iter().take_while(|owner| **owner == Owner::Nobody).count();
        Some((self.give(start, count, Owner::Shard(shard)), count as u32))
    }

    /// The first lent buffer of shard number `shard`, each lending `blocks`.
    pub fn lent(&self, shard: usize, blocks: u32) -> BufferId {
        BufferId((self.reserve_end + shard * blocks as usize) as u32)
    }

    /// Hands buffers from one owner to another.
    pub fn hand(&mut self, first: BufferId, count: u32, from: Owner, to: Owner) {
        for index in first.0..first.0 + count {
            let owner = &mut self.owners[index as usize];
            assert_eq!(*owner, from, "buffer {index} changes hands");
            *owner = to;
        }
    }

    /// A shard gives a buffer back.
    pub fn free(&mut self, buffer: BufferId, shard: u16) {
        self.hand(buffer, 1, Owner::Shard(shard), Owner::Nobody);
        // Whoever still uses it will notice.
        self.contents[buffer.0 as usize] = Rc::new([0xdd; BLOCK_BYTES]);
    }

    pub fn get(&self, buffer: BufferId) -> &Block {
        &self.contents[buffer.0 as usize]
    }

    pub fn set(&mut self, buffer: BufferId, block: Block) {
        self.contents[buffer.0 as usize] = block;
    }

    pub fn edit(&mut self, buffer: BufferId) -> &mut [u8; BLOCK_BYTES] {
        Rc::make_mut(&mut self.contents[buffer.0 as usize])
    }

    /// Buffers that are neither free nor lent.
    pub fn in_use(&self) -> Vec<(usize, Owner)> {
        let owners = self.owners.iter().copied().enumerate();
        owners.filter(|(_, owner)| !matches!(owner, Owner::Nobody | Owner::Lent)).collect()
    }

    fn give(&mut self, start: usize, count: usize, owner: Owner) -> BufferId {
        self.owners[start..start + count].fill(owner);
        BufferId(start as u32)
    }
}
