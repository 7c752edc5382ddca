//! Credit: how many receives wait at the peer, so that nothing is sent without a place to land.
//!
//! It is in step 4 of the flow, beside every frame of an RDMA wire. Each side counts, from the start of the connection
//! and modulo 2^32, the receives it has posted, and tells the number in every frame. The other side counts those that
//! its frames used up; the difference is its credit.
//!
//! Invariants:
//! - Credit never exceeds the peer's queue of receives, whatever the peer says: more is a fault of the peer.
//! - One credit is kept for a frame that only tells credit. Such a frame is due when half of the own queue was posted
//!   anew and no other frame told so. So two sides never wait for each other: a side without credit has used the whole
//!   queue of the other, which then is due to tell.
//!
//! ```text
//!   granted - used = credit          posted - told = what the peer does not know of yet
//! ```

/// Receives of one side that only a frame telling credit may use.
const RESERVED: u32 = 1;
/// Fewest receives of a queue: half of it must leave room for a placement and its message.
pub(super) const RECEIVES_MIN: u32 = 16;
/// Most receives of a queue: bounds their memory.
pub(super) const RECEIVES_MAX: u32 = 4096;

/// The credit of one connection, both ways.
#[derive(Debug)]
pub(super) struct Credit {
    peer_queue: u32,
    granted: u32,
    used: u32,
    own_queue: u32,
    posted: u32,
    told: u32,
}

/// The peer told more receives than its queue has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TooMuch {
    pub(super) told: u32,
}

impl Credit {
    /// For queues of so many receives, all of which were posted before the connection was made.
    pub(super) fn new(own_queue: u32, peer_queue: u32) -> Credit {
        for queue in [own_queue, peer_queue] {
            assert!((RECEIVES_MIN..=RECEIVES_MAX).contains(&queue), "a queue of {queue} receives");
        }
        let (posted, granted) = (own_queue, peer_queue);
        Credit { peer_queue, granted, used: 0, own_queue, posted, told: posted }
    }

    /// Whether a frame that needs `receives` of the peer may be sent.
    pub(super) fn allows(&self, receives: u32) -> bool {
        self.left() >= receives + RESERVED
    }

    /// Whether a frame that only tells credit should be sent, and may.
    pub(super) fn is_telling_due(&self) -> bool {
        self.left() >= RESERVED && self.posted.wrapping_sub(self.told) >= self.own_queue / 2
    }

    /// A frame that needs `receives` of the peer was sent.
    pub(super) fn used(&mut self, receives: u32) {
        assert!(self.left() >= receives, "nothing is sent without a place to land");
        self.used = self.used.wrapping_add(receives);
    }

    /// So many receives were posted here again.
    pub(super) fn posted(&mut self, receives: u32) {
        self.posted = self.posted.wrapping_add(receives);
    }

    /// The number for the next frame, which is sent for sure.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.posted;
        self.posted
    }

    /// A frame of the peer told its number.
    pub(super) fn heard(&mut self, told: u32) -> Result<(), TooMuch> {
        if told.wrapping_sub(self.used) > self.peer_queue {
            return Err(TooMuch { told });
        }
        // Frames arrive in order, so a number never goes back by less than a whole round.
        if told.wrapping_sub(self.granted) > self.peer_queue {
            return Err(TooMuch { told });
        }
        self.granted = told;
        Ok(())
    }

    fn left(&self) -> u32 {
        self.granted.wrapping_sub(self.used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn the_last_receive_is_kept_for_telling() {
        let mut credit = Credit::new(16, 16);
        for _ in 0..15 {
            assert!(credit.allows(1));
            credit.used(1);
        }
        assert!(!credit.allows(1));
        credit.posted(7);
        assert!(!credit.is_telling_due());
        credit.posted(1);
        assert!(credit.is_telling_due());
        assert_eq!(credit.tell(), 24);
        credit.used(1);
        assert!(!credit.is_telling_due());
        credit.heard(31).unwrap();
        assert!(credit.allows(14) && !credit.allows(15));
    }

    #[test]
    fn a_peer_cannot_grant_more_than_its_queue() {
        let mut credit = Credit::new(16, 32);
        assert_eq!(credit.heard(33), Err(TooMuch { told: 33 }));
        assert_eq!(credit.heard(31), Err(TooMuch { told: 31 }));
        credit.used(10);
        credit.heard(42).unwrap();
        assert_eq!(credit.heard(43), Err(TooMuch { told: 43 }));
        assert_eq!(credit.heard(41), Err(TooMuch { told: 41 }));
    }

    #[test]
    fn numbers_go_round() {
        let mut credit = Credit::new(16, 16);
        credit.used = u32::MAX - 3;
        credit.granted = u32::MAX - 3;
        credit.heard(7).unwrap();
        assert!(credit.allows(10) && !credit.allows(11));
        credit.used(10);
        assert!(!credit.allows(1));
    }

    /// Two sides that send as much as they may, over links of any delay: nobody starves, nothing lands nowhere.
    #[test]
    fn two_sides_never_wait_for_each_other() {
        const FRAMES: u32 = 3000;
        for (queue_a, queue_b, seed) in [(16, 16, 1), (16, 64, 2), (17, 33, 3), (128, 16, 4)] {
            let mut credits = [Credit::new(queue_a, queue_b), Credit::new(queue_b, queue_a)];
            let mut free = [queue_a, queue_b];
            let mut links = [VecDeque::new(), VecDeque::new()];
            let mut left = [FRAMES; 2];
            let mut random = seed;
            let mut idle = 0;
            while left != [0, 0] || links.iter().any(|link| !link.is_empty()) {
                random = u64::wrapping_mul(random, 6_364_136_223_846_793_005).wrapping_add(1);
                let side = (random >> 40) as usize & 1;
                let needs = 1 + (random >> 50) as u32 % 2;
                let before = (left, links[0].len() + links[1].len());
                if random >> 60 < 8 {
                    if left[side] > 0 && credits[side].allows(needs) {
                        left[side] -= 1;
                        credits[side].used(needs);
                        let told = credits[side].tell();
                        links[side].push_back((needs, told));
                    } else if credits[side].is_telling_due() {
                        credits[side].used(1);
                        let told = credits[side].tell();
                        links[side].push_back((1, told));
                    }
                } else if let Some((needs, told)) = links[1 - side].pop_front() {
                    free[side] = u32::checked_sub(free[side], needs).expect("a place to land");
                    credits[side].heard(told).unwrap();
                    free[side] += needs;
                    credits[side].posted(needs);
                }
                idle = if (left, links[0].len() + links[1].len()) == before { idle + 1 } else { 0 };
                assert!(idle < 1000, "both wait: {credits:?}");
            }
        }
    }
}
