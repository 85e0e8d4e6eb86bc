//! Counts the instructions that the VMM performed because this host's KVM cannot.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

/// A kind of instruction that is counted by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Assist {
    /// NOPs with operands, and instructions that are NOPs where their feature is off.
    Nop,
    /// INT3.
    Int3,
    /// INT with a vector.
    Int,
    /// CLAC and STAC.
    Ac,
    /// POPCNT.
    Popcnt,
    /// BMI1 and BMI2.
    Bmi,
    /// ADCX and ADOX.
    Adx,
    /// CMPXCHG16B.
    Cmpxchg16b,
    /// XGETBV.
    Xgetbv,
    /// XSETBV, XSAVE, XRSTOR and their variants.
    Xsave,
    /// RDTSCP.
    Rdtscp,
    /// FWAIT.
    Fwait,
    /// SYSCALL in user mode.
    Syscall,
    /// x87 but for FWAIT.
    X87,
    /// MOVBE.
    Movbe,
    /// MMX.
    Mmx,
    /// SSE, in all its generations, and CRC32.
    Sse,
    /// AVX, in all its generations, and AVX-512.
    Avx,
}

impl Assist {
    const ALL: [Self; 18] = [
        Self::Nop,
        Self::Int3,
        Self::Int,
        Self::Ac,
        Self::Popcnt,
        Self::Bmi,
        Self::Adx,
        Self::Cmpxchg16b,
        Self::Xgetbv,
        Self::Xsave,
        Self::Rdtscp,
        Self::Fwait,
        Self::Syscall,
        Self::X87,
        Self::Movbe,
        Self::Mmx,
        Self::Sse,
        Self::Avx,
    ];

    /// Its name in results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nop => "nop",
            Self::Int3 => "int3",
            Self::Int => "int",
            Self::Ac => "clac-stac",
            Self::Popcnt => "popcnt",
            Self::Bmi => "bmi",
            Self::Adx => "adx",
            Self::Cmpxchg16b => "cmpxchg16b",
            Self::Xgetbv => "xgetbv",
            Self::Xsave => "xsave",
            Self::Rdtscp => "rdtscp",
            Self::Fwait => "fwait",
            Self::Syscall => "syscall",
            Self::X87 => "x87",
            Self::Movbe => "movbe",
            Self::Mmx => "mmx",
            Self::Sse => "sse",
            Self::Avx => "avx",
        }
    }
}

/// Counts of one machine, over all vCPUs. They continue across a migration in process.
#[derive(Debug, Default)]
pub(crate) struct Assists {
    counts: [AtomicU64; Assist::ALL.len()],
}

impl Assists {
    /// Counts one, and returns whether it was the first of its kind.
    pub(crate) fn count(&self, kind: Assist) -> bool {
        self.counts.get(kind as usize).is_some_and(|count| count.fetch_add(1, Ordering::Relaxed) == 0)
    }

    /// The counts so far, by name, of kinds that there were.
    pub(crate) fn read(&self) -> BTreeMap<&'static str, u64> {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        Assist::ALL.into_iter().map(Assist::name).zip(counts).filter(|(_, count)| *count != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: two kinds in one counter, a kind that is left out, a first one that is told twice.
    #[test]
    fn each_kind_is_counted_by_itself() {
        let assists = Assists::default();
        assert!(assists.read().is_empty());
        for (times, kind) in (1..).zip(Assist::ALL) {
            assert!(assists.count(kind));
            assert!((1..times).all(|_| !assists.count(kind)));
        }
        let read = assists.read();
        assert_eq!(read.len(), Assist::ALL.len());
        assert!((1..).zip(Assist::ALL).all(|(times, kind)| read[kind.name()] == times), "{read:?}");
    }
}
