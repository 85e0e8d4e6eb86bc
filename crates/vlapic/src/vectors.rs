//! A set of interrupt vectors (IRR, ISR or TMR), and the arithmetic of priorities.

use crate::registers::WORDS;

/// The lowest vector that a local APIC delivers (SDM vol. 3, "Valid Interrupt Vectors": 0 to 15 are illegal).
pub(super) const FIRST_LEGAL: u8 = 16;

/// The low byte of a register: where every register that holds a vector keeps it.
pub(super) const fn low_byte(register: u32) -> u8 {
    let [low, ..] = register.to_le_bytes();
    low
}

/// The priority class of a vector, of TPR or of PPR (SDM vol. 3, "Interrupt, Task, and Processor Priority").
pub(super) const fn class(priority: u8) -> u8 {
    priority >> 4
}

/// 256 bits, one for each vector, in the eight 32-bit words in which a guest reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vectors([u32; WORDS]);

impl Vectors {
    pub(super) const fn from_words(words: [u32; WORDS]) -> Self {
        Self(words)
    }

    pub(super) const fn words(self) -> [u32; WORDS] {
        self.0
    }

    /// The word that holds vectors `32 * index` and up, or 0 beyond the last.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.0.get(index).copied().unwrap_or(0)
    }

    fn place(vector: u8) -> (usize, u32) {
        (usize::from(vector >> 5), 1 << (vector & 31))
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        let (index, bit) = Self::place(vector);
        self.word(index) & bit != 0
    }

    /// Puts `vector` in or out of the set.
    pub(super) fn set(&mut self, vector: u8, member: bool) {
        let (index, bit) = Self::place(vector);
        if let Some(word) = self.0.get_mut(index) {
            *word = if member { *word | bit } else { *word & !bit };
        }
    }

    /// The highest vector, which is the one of highest priority.
    pub(super) fn highest(&self) -> Option<u8> {
        let bases = [0u8, 32, 64, 96, 128, 160, 192, 224];
        self.0.iter().zip(bases).rev().find_map(|(word, base)| {
            let bit = u8::try_from(word.checked_ilog2()?).ok()?;
            base.checked_add(bit)
        })
    }

    /// Whether no vector from 0 to 15 is a member.
    pub(super) fn is_legal(&self) -> bool {
        self.word(0) & 0xffff == 0
    }
}

/// The processor priority (SDM vol. 3, "Task and Processor Priorities").
///
/// Its class is the higher of TPR's and the highest in-service vector's; the sub-class is TPR's unless the vector's
/// class is strictly higher, and then 0.
pub(super) fn processor_priority(tpr: u8, isr: &Vectors) -> u8 {
    let in_service = isr.highest().unwrap_or(0) & 0xf0;
    if class(tpr) >= class(in_service) { tpr } else { in_service }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_wins_in_every_word() {
        for vector in 0..=u8::MAX {
            let mut set = Vectors::default();
            assert_eq!(set.highest(), None);
            set.set(vector, true);
            set.set(vector / 2, true);
            assert!(set.contains(vector));
            assert_eq!(set.highest(), Some(vector));
            assert_eq!(set.is_legal(), vector / 2 >= FIRST_LEGAL);
            set.set(vector, false);
            set.set(vector / 2, false);
            assert_eq!(set, Vectors::default());
        }
    }

    #[test]
    fn processor_priority_takes_the_higher_class() {
        let isr = |vector| {
            let mut set = Vectors::default();
            set.set(vector, true);
            set
        };
        assert_eq!(processor_priority(0x35, &Vectors::default()), 0x35);
        assert_eq!(processor_priority(0x35, &isr(0x47)), 0x40);
        assert_eq!(processor_priority(0x35, &isr(0x39)), 0x35);
        assert_eq!(processor_priority(0x35, &isr(0x29)), 0x35);
    }
}
