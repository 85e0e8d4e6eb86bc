//! A CPUID leaf.

use serde::{Deserialize, Serialize};

/// One CPUID leaf (or subleaf).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, if `indexed`.
    pub index: u32,
    /// Whether `index` matters.
    pub indexed: bool,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}
