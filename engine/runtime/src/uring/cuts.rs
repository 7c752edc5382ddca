//! Cuts: where the memory of an operation is cut into that of commands. Step 4 of the flow, for a store that is driven by
//! commands.
//!
//! Invariant: every byte of the operation is in one command, in its order, and no command is longer than the device takes.

use rdma_fallback::Span;

/// A run of memory of so many bytes gets a command of its own, from registered memory: a command more costs the device
/// less than the kernel needs to look up so many pages.
const OWN_COMMAND_BYTES: u32 = 64 << 10;

/// The memory of an operation, cut into that of commands.
pub(super) struct Cuts<'a> {
    spans: &'a [Span],
    /// Bytes of the first span that are in a command already.
    taken: u32,
    bytes_max: u32,
}

impl<'a> Cuts<'a> {
    pub fn new(spans: &'a [Span], bytes_max: u32) -> Cuts<'a> {
        Cuts { spans, taken: 0, bytes_max }
    }

    /// The runs of memory of the next command, and their bytes.
    pub fn next(&mut self, runs: &mut Vec<Span>) -> Option<u32> {
        runs.clear();
        let mut total = 0;
        while total < self.bytes_max {
            let Some(run) = self.run(self.bytes_max - total) else { break };
            let is_long = run.length >= OWN_COMMAND_BYTES;
            if is_long && total > 0 {
                break;
            }
            runs.push(run);
            total += run.length;
            self.skip(run.length);
            if is_long {
                break;
            }
        }
        (total > 0).then_some(total)
    }

    /// The longest run from here on, of at most `limit` bytes.
    fn run(&self, limit: u32) -> Option<Span> {
        let (first, rest) = self.spans.split_first()?;
        let offset = first.offset + u64::from(self.taken);
        let mut length = first.length - self.taken;
        for span in rest {
            if length >= limit || span.offset != offset + u64::from(length) {
                break;
            }
            length = length.saturating_add(span.length);
        }
        Some(Span { offset, length: length.min(limit) })
    }

    fn skip(&mut self, bytes: u32) {
        self.taken += bytes;
        while let Some((first, rest)) = self.spans.split_first() {
            if self.taken < first.length {
                return;
            }
            self.taken -= first.length;
            self.spans = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u32 = 4096;

    fn span(page: u64, pages: u32) -> Span {
        Span { offset: page * u64::from(PAGE), length: pages * PAGE }
    }

    fn cut(spans: &[Span], bytes_max: u32) -> Vec<Vec<Span>> {
        let mut cuts = Cuts::new(spans, bytes_max);
        let (mut all, mut runs) = (Vec::new(), Vec::new());
        while let Some(bytes) = cuts.next(&mut runs) {
            assert_eq!(bytes, runs.iter().map(|run| run.length).sum::<u32>());
            all.push(runs.clone());
        }
        all
    }

    #[test]
    fn operations_are_cut_into_commands() {
        let longest = 127 * PAGE;
        assert_eq!(cut(&[], longest), [[]; 0]);
        assert_eq!(cut(&[span(3, 1)], longest), [[span(3, 1)]]);
        // What is one piece of memory is one run, and a list where it is not.
        assert_eq!(cut(&[span(3, 1), span(4, 2)], longest), [[span(3, 3)]]);
        assert_eq!(cut(&[span(4, 2), span(3, 1)], longest), [[span(4, 2), span(3, 1)]]);
        // As long as the device takes.
        assert_eq!(
            cut(&[span(0, 300)], longest),
            [[span(0, 127)], [span(127, 127)], [span(254, 46)]]
        );
        let scattered: Vec<Span> = (0..300).map(|index| span(index * 2, 1)).collect();
        let lengths: Vec<usize> = cut(&scattered, longest).iter().map(Vec::len).collect();
        assert_eq!(lengths, [127, 127, 46]);
        // Long runs have commands of their own.
        assert_eq!(
            cut(&[span(9, 1), span(20, 16), span(60, 1), span(62, 1)], longest),
            [vec![span(9, 1)], vec![span(20, 16)], vec![span(60, 1), span(62, 1)]]
        );
        assert_eq!(cut(&[span(0, 1), span(1, 1)], PAGE), [[span(0, 1)], [span(1, 1)]]);
    }

    /// Every page of every operation is in one command, in order, however it is cut.
    #[test]
    fn nothing_is_lost_by_cutting() {
        let mut seed = 7_u64;
        let mut next = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        let pages = |spans: &[Span]| -> Vec<u64> {
            let of = |it: &Span| (it.offset..it.offset + u64::from(it.length)).step_by(4096);
            spans.iter().flat_map(of).collect()
        };
        for _ in 0..1000 {
            let mut spans = Vec::new();
            for _ in 0..=next(40) {
                spans.push(span(next(8), 1 + next(20) as u32));
            }
            let bytes_max = (1 + next(40) as u32) * PAGE;
            let commands = cut(&spans, bytes_max);
            assert_eq!(pages(&commands.concat()), pages(&spans));
            for command in commands {
                assert!(command.iter().map(|run| run.length).sum::<u32>() <= bytes_max);
            }
        }
    }
}
