//! Cut: how the source spans of a placement become WRITEs.
//!
//! In step 4 of the flow, when a post is made. Neighbours become one piece, and a WRITE takes as many pieces as the
//! card allows.
//!
//! Invariant: the pieces are the sources in order, without empty ones.

use crate::Span;

/// Appends `sources` to `pieces`, neighbours joined and empty ones left out.
pub(super) fn join(sources: &[Span], pieces: &mut Vec<Span>) {
    let start = pieces.len();
    for source in sources.iter().filter(|source| source.length > 0) {
        match pieces[start..].last_mut() {
            Some(last) if last.end() == source.offset => last.length += source.length,
            _ => pieces.push(*source),
        }
    }
}

/// How many WRITEs of at most `pieces_max` pieces take `pieces`.
pub(super) fn writes(pieces: usize, pieces_max: usize) -> usize {
    pieces.div_ceil(pieces_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_order_is_kept() {
        let span = Span::new;
        let mut pieces = vec![span(0, 4)];
        let sources = [span(4, 4), span(8, 2), span(99, 0), span(10, 1), span(20, 1), span(11, 1)];
        join(&sources, &mut pieces);
        assert_eq!(pieces, [span(0, 4), span(4, 7), span(20, 1), span(11, 1)]);
    }

    #[test]
    fn writes_are_counted() {
        assert_eq!([0, 1, 16, 17, 1024].map(|pieces| writes(pieces, 16)), [0, 1, 1, 2, 64]);
    }
}
