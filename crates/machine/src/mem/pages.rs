//! Sets of pages, with one bit for each page.

use std::ops::Range;

/// A set of page numbers below a fixed limit; numbers beyond it are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: usize,
}

const BITS: usize = 64;

impl PageSet {
    /// The empty set for `pages` pages.
    #[must_use]
    pub fn none(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(BITS)], pages }
    }

    /// All of `pages` pages.
    #[must_use]
    pub fn all(pages: usize) -> Self {
        let mut set = Self::none(pages);
        set.insert(0..pages);
        set
    }

    /// Adds the pages in `range`.
    pub fn insert(&mut self, range: Range<usize>) {
        let range = range.start..range.end.min(self.pages);
        let mut page = range.start;
        while page < range.end {
            let bit = page % BITS;
            let count = (BITS - bit).min(range.end - page);
            // `count` is 1 to 64: a shift by `64 - count` stays below 64.
            let mask = (u64::MAX >> (BITS - count)) << bit;
            if let Some(word) = self.words.get_mut(page / BITS) {
                *word |= mask;
            }
            page += count;
        }
    }

    /// Adds the pages of `bits`, whose bit 0 is page `first`.
    pub fn insert_bits(&mut self, first: usize, bits: &[u64]) {
        for (index, word) in bits.iter().enumerate().filter(|(_, word)| **word != 0) {
            let start = first.saturating_add(index.saturating_mul(BITS));
            for bit in (0..BITS).filter(|bit| word >> bit & 1 != 0) {
                let page = start.saturating_add(bit);
                self.insert(page..page.saturating_add(1));
            }
        }
    }

    /// Adds the pages of another set.
    pub fn union(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        // A larger set may have pages beyond this set's limit, in the last word: those bits are cleared.
        let used = self.pages % BITS;
        if let (Some(last), 1..) = (self.words.last_mut(), used) {
            *last &= u64::MAX >> (BITS - used);
        }
    }

    /// Whether it has this page.
    #[must_use]
    pub fn contains(&self, page: usize) -> bool {
        self.words.get(page / BITS).is_some_and(|word| word >> (page % BITS) & 1 != 0)
    }

    /// Removes the pages of another set.
    pub fn subtract(&mut self, other: &Self) {
        for (word, gone) in self.words.iter_mut().zip(&other.words) {
            *word &= !gone;
        }
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many pages it has.
    #[must_use]
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| usize::try_from(word.count_ones()).unwrap_or(BITS)).sum()
    }

    /// Its pages as ranges, rising and as long as possible.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            at = self.next(start, false).unwrap_or(self.pages);
            Some(start..at)
        })
    }

    /// Its pages in `range`, as [`Self::runs`] returns them.
    #[must_use]
    pub fn runs_in(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let mut at = range.start;
        while let Some(start) = self.next(at, true).filter(|start| *start < range.end) {
            at = self.next(start, false).unwrap_or(self.pages).min(range.end);
            runs.push(start..at);
        }
        runs
    }

    /// Its first page from `page` on.
    #[must_use]
    pub fn first_from(&self, page: usize) -> Option<usize> {
        self.next(page, true)
    }

    /// The first page from `page` on that is in the set, or that is not.
    fn next(&self, page: usize, inside: bool) -> Option<usize> {
        let mut index = page / BITS;
        let mut hide = page % BITS;
        loop {
            let word = *self.words.get(index)?;
            let word = (if inside { word } else { !word }) >> hide << hide;
            if word != 0 {
                let bit = usize::try_from(word.trailing_zeros()).unwrap_or(BITS);
                let found = index.saturating_mul(BITS).saturating_add(bit);
                return (found < self.pages).then_some(found);
            }
            (index, hide) = (index.saturating_add(1), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_beyond_the_end_is_left_out() {
        let mut set = PageSet::none(70);
        set.insert(60..200);
        set.insert(300..301);
        set.insert_bits(69, &[3]);
        assert_eq!(set.runs().map(|run| (run.start, run.end)).collect::<Vec<_>>(), [(60, 70)]);
        assert_eq!(PageSet::all(64).runs().map(|run| (run.start, run.end)).collect::<Vec<_>>(), [(0, 64)]);
        assert_eq!(PageSet::none(0).runs().count(), 0);
    }

    proptest! {
        #[test]
        fn it_is_a_set(
            pages in 0usize..300,
            ranges in proptest::collection::vec((0usize..320, 0usize..140), 0..5),
            first in 0usize..200,
            bits in proptest::collection::vec(any::<u64>(), 0..3),
        ) {
            let mut model = vec![false; pages];
            let mut set = PageSet::none(pages);
            for (start, length) in ranges {
                set.insert(start..start + length);
                model.iter_mut().skip(start).take(length).for_each(|page| *page = true);
            }
            set.insert_bits(first, &bits);
            for (page, there) in model.iter_mut().enumerate().skip(first) {
                *there |= bits.get((page - first) / 64).is_some_and(|word| word >> ((page - first) % 64) & 1 != 0);
            }
            let mut found = vec![false; pages];
            let mut last = None;
            for run in set.runs() {
                prop_assert!(run.start < run.end && last.is_none_or(|end| end < run.start));
                last = Some(run.end);
                found[run].fill(true);
            }
            prop_assert_eq!(set.count(), model.iter().filter(|there| **there).count());
            prop_assert!((0..pages).all(|page| set.contains(page) == model[page]));
            prop_assert_eq!(found, model);
        }
    }
}
