//! The type of vCPU numbers.

use std::fmt;

use serde::Serialize;

/// The number of a vCPU, from 0: its place among the machine's vCPUs, and the APIC ID that it boots with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct CpuIndex(u32);

impl CpuIndex {
    /// The vCPU that boots.
    pub const FIRST: Self = Self(0);

    /// Number `index`.
    #[must_use]
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The number of the vCPU at this place.
    #[must_use]
    pub fn at(place: usize) -> Self {
        Self(u32::try_from(place).unwrap_or(u32::MAX))
    }

    /// All numbers, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..).map(Self)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index of a list with one item for each vCPU.
    #[must_use]
    pub fn place(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// The vCPU's item in a list with one item for each vCPU.
    #[must_use]
    pub fn of<T>(self, list: &[T]) -> Option<&T> {
        list.get(self.place())
    }

    /// As [`Self::of`].
    #[must_use]
    pub fn of_mut<T>(self, list: &mut [T]) -> Option<&mut T> {
        list.get_mut(self.place())
    }
}

impl fmt::Display for CpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
