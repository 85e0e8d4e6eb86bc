//! The number of CPUs, by CPUID.

use crate::platform::Leaf;

/// The extended topology leaf.
const TOPOLOGY_LEAF: u32 = 0xb;
/// ECX\[15:8\] of a subleaf: the level's type; 0 ends the list.
const ECX_LEVEL_TYPE: u32 = 0xff00;
/// EBX\[15:0\] of a subleaf: logical processors at this level.
const EBX_PROCESSORS: u32 = 0xffff;
/// Threads, cores, modules, tiles and dies exist; a few more are read.
const MAX_LEVELS: u32 = 8;
/// Leaf 1 EDX: EBX\[23:16\] is valid.
const EDX_HTT: u32 = 1 << 28;

/// Logical processors in this CPU's package (`cpuid(leaf, subleaf)`), at least 1. By default hypervisors put all vCPUs
/// into one package.
///
/// Source: Intel SDM vol. 2, "CPUID". Leaf 1 counts identifiers, and some may be unused: it is read only if there is no
/// leaf 0xb.
pub fn cpu_count(mut cpuid: impl FnMut(u32, u32) -> Leaf) -> u32 {
    let mut count = 0;
    if cpuid(0, 0).eax >= TOPOLOGY_LEAF {
        for level in 0..MAX_LEVELS {
            let leaf = cpuid(TOPOLOGY_LEAF, level);
            if leaf.ecx & ECX_LEVEL_TYPE == 0 {
                break;
            }
            count = count.max(leaf.ebx & EBX_PROCESSORS);
        }
    }
    if count == 0 {
        let leaf = cpuid(1, 0);
        if leaf.edx & EDX_HTT != 0 {
            count = (leaf.ebx >> 16) & 0xff;
        }
    }
    count.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Leaf {
        Leaf { eax, ebx, ecx, edx }
    }

    #[test]
    fn the_widest_level_of_leaf_0xb_counts() {
        let count = cpu_count(|function, index| match (function, index) {
            (0, _) => leaf(0xd, 0, 0, 0),
            (1, _) => leaf(0, 8 << 16, 0, EDX_HTT),
            (0xb, 0) => leaf(1, 2, 0x100, 0),
            (0xb, 1) => leaf(3, 6, 0x201, 0),
            (0xb, n) => leaf(0, 99, n, 0),
            _ => Leaf::default(),
        });
        assert_eq!(count, 6);
    }

    #[test]
    fn without_it_leaf_1_counts_if_it_is_valid() {
        for (edx, want) in [(EDX_HTT, 4), (0, 1)] {
            let count = cpu_count(|function, _| match function {
                0 => leaf(0xb, 0, 0, 0),
                1 => leaf(0, 4 << 16, 0, edx),
                _ => Leaf::default(),
            });
            assert_eq!(count, want);
        }
    }

    #[test]
    fn a_list_of_levels_without_end_ends() {
        assert_eq!(cpu_count(|_, _| leaf(u32::MAX, 3, 0x100, 0)), 3);
    }
}
