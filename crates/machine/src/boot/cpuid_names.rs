//! Names of CPUID feature bits, as `/proc/cpuinfo` and QEMU spell them, and which bits depend on the host.
//!
//! Source: Intel SDM vol. 2, "CPUID"; AMD APM vol. 3, appendix E.

use crate::x86::Leaf;

/// Bits of leaf 1 ECX that the VMM or the vCPU's mode sets, not the host: OSXSAVE, x2APIC, TSC-deadline, hypervisor.
const LEAF_1_ECX_OURS: u32 = 1 << 27 | 1 << 21 | 1 << 24 | 1 << 31;
/// Leaf 1 EDX: the APIC bit follows IA32_APIC_BASE.
const LEAF_1_EDX_OURS: u32 = 1 << 9;
/// Leaf 7 EBX: the VMM sets TSC_ADJUST. Leaf 7 ECX: OSPKE follows CR4.
const LEAF_7_EBX_OURS: u32 = 1 << 1;
const LEAF_7_ECX_OURS: u32 = 1 << 4;

/// The bits of a register that are features of the host.
#[must_use]
pub fn host_feature_mask(function: u32, index: u32, register: &str) -> u32 {
    match (function, index, register) {
        (1, _, "ECX") => !LEAF_1_ECX_OURS,
        (1, _, "EDX") => !LEAF_1_EDX_OURS,
        (7, 0, "EBX") => !LEAF_7_EBX_OURS,
        (7, 0, "ECX") => !LEAF_7_ECX_OURS,
        (7, 0, "EDX") | (7, 1, "EAX") | (0xd, 0, "EAX") | (0xd, 1, "EAX") | (0x8000_0001, _, "ECX" | "EDX") => !0,
        (0x8000_0008, _, "EBX") => !0,
        _ => 0,
    }
}

const LEAF_1_ECX: [&str; 32] = [
    "sse3",
    "pclmulqdq",
    "dtes64",
    "monitor",
    "ds_cpl",
    "vmx",
    "smx",
    "est",
    "tm2",
    "ssse3",
    "cid",
    "sdbg",
    "fma",
    "cx16",
    "xtpr",
    "pdcm",
    "",
    "pcid",
    "dca",
    "sse4_1",
    "sse4_2",
    "x2apic",
    "movbe",
    "popcnt",
    "tsc_deadline_timer",
    "aes",
    "xsave",
    "osxsave",
    "avx",
    "f16c",
    "rdrand",
    "hypervisor",
];
const LEAF_1_EDX: [&str; 32] = [
    "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "sep", "mtrr", "pge", "mca", "cmov",
    "pat", "pse36", "pn", "clflush", "", "dts", "acpi", "mmx", "fxsr", "sse", "sse2", "ss", "ht", "tm", "ia64", "pbe",
];
const LEAF_7_EBX: [&str; 32] = [
    "fsgsbase",
    "tsc_adjust",
    "sgx",
    "bmi1",
    "hle",
    "avx2",
    "fdp_excptn_only",
    "smep",
    "bmi2",
    "erms",
    "invpcid",
    "rtm",
    "cqm",
    "zero_fcs_fds",
    "mpx",
    "rdt_a",
    "avx512f",
    "avx512dq",
    "rdseed",
    "adx",
    "smap",
    "avx512ifma",
    "pcommit",
    "clflushopt",
    "clwb",
    "intel_pt",
    "avx512pf",
    "avx512er",
    "avx512cd",
    "sha_ni",
    "avx512bw",
    "avx512vl",
];
const LEAF_7_ECX: [&str; 32] = [
    "prefetchwt1",
    "avx512vbmi",
    "umip",
    "pku",
    "ospke",
    "waitpkg",
    "avx512_vbmi2",
    "shstk",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "avx512_vnni",
    "avx512_bitalg",
    "tme",
    "avx512_vpopcntdq",
    "",
    "la57",
    "",
    "",
    "",
    "",
    "",
    "rdpid",
    "kl",
    "bus_lock_detect",
    "cldemote",
    "",
    "movdiri",
    "movdir64b",
    "enqcmd",
    "sgx_lc",
    "pks",
];
const LEAF_7_EDX: [&str; 32] = [
    "",
    "sgx_keys",
    "avx512_4vnniw",
    "avx512_4fmaps",
    "fsrm",
    "uintr",
    "",
    "",
    "avx512_vp2intersect",
    "srbds_ctrl",
    "md_clear",
    "rtm_always_abort",
    "",
    "rtm_force_abort",
    "serialize",
    "hybrid_cpu",
    "tsxldtrk",
    "",
    "pconfig",
    "arch_lbr",
    "ibt",
    "",
    "amx_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "spec_ctrl",
    "stibp",
    "flush_l1d",
    "arch_capabilities",
    "core_capabilities",
    "ssbd",
];
const EXT_1_ECX: [&str; 32] = [
    "lahf_lm",
    "cmp_legacy",
    "svm",
    "extapic",
    "cr8_legacy",
    "abm",
    "sse4a",
    "misalignsse",
    "3dnowprefetch",
    "osvw",
    "ibs",
    "xop",
    "skinit",
    "wdt",
    "",
    "lwp",
    "fma4",
    "tce",
    "",
    "nodeid_msr",
    "",
    "tbm",
    "topoext",
    "perfctr_core",
    "perfctr_nb",
    "",
    "bpext",
    "ptsc",
    "perfctr_llc",
    "mwaitx",
    "",
    "",
];
const EXT_1_EDX: [&str; 32] = [
    "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "syscall", "mtrr", "pge", "mca", "cmov",
    "pat", "pse36", "", "mp", "nx", "", "mmxext", "mmx", "fxsr", "fxsr_opt", "pdpe1gb", "rdtscp", "", "lm", "3dnowext",
    "3dnow",
];

/// Features whose bits are not in a register full of them.
const OTHERS: [(&str, Place); 9] = [
    ("xsaveopt", Place::new(0xd, 1, Register::Eax, 0)),
    ("xsavec", Place::new(0xd, 1, Register::Eax, 1)),
    ("xgetbv1", Place::new(0xd, 1, Register::Eax, 2)),
    ("xsaves", Place::new(0xd, 1, Register::Eax, 3)),
    ("avx_vnni", Place::new(7, 1, Register::Eax, 4)),
    ("avx512_bf16", Place::new(7, 1, Register::Eax, 5)),
    ("arat", Place::new(6, 0, Register::Eax, 2)),
    ("invtsc", Place::new(0x8000_0007, 0, Register::Edx, 8)),
    ("kvmclock_stable_bit", Place::new(0x4000_0001, 0, Register::Eax, 24)),
];

/// Other names, and those that stand for them here.
const ALIASES: [(&str, &str); 5] = [
    ("pni", "sse3"),
    ("nonstop_tsc", "invtsc"),
    ("tsc_deadline", "tsc_deadline_timer"),
    ("lzcnt", "abm"),
    ("sha", "sha_ni"),
];

/// A register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Where a feature's bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    function: u32,
    index: u32,
    register: Register,
    /// The bit's number.
    pub bit: u8,
}

impl Place {
    const fn new(function: u32, index: u32, register: Register, bit: u8) -> Self {
        Self { function, index, register, bit }
    }

    /// Whether `leaf` is its leaf.
    #[must_use]
    pub fn is_in(&self, leaf: &Leaf) -> bool {
        leaf.function == self.function && (leaf.index == self.index || !leaf.indexed)
    }

    /// Its register in `leaf`.
    pub fn register_of(self, leaf: &mut Leaf) -> &mut u32 {
        match self.register {
            Register::Eax => &mut leaf.eax,
            Register::Ebx => &mut leaf.ebx,
            Register::Ecx => &mut leaf.ecx,
            Register::Edx => &mut leaf.edx,
        }
    }
}

/// The registers that are full of features.
const TABLES: [(u32, Register, &[&str; 32]); 7] = [
    (1, Register::Ecx, &LEAF_1_ECX),
    (1, Register::Edx, &LEAF_1_EDX),
    (7, Register::Ebx, &LEAF_7_EBX),
    (7, Register::Ecx, &LEAF_7_ECX),
    (7, Register::Edx, &LEAF_7_EDX),
    (0x8000_0001, Register::Ecx, &EXT_1_ECX),
    (0x8000_0001, Register::Edx, &EXT_1_EDX),
];

/// The name here of the feature that is `spelled` so: in any case, with `-` or `.` for `_`.
#[must_use]
pub fn known(spelled: &str) -> Option<&'static str> {
    let wanted = spelled.to_ascii_lowercase().replace(['-', '.'], "_");
    let wanted = ALIASES.iter().find(|(alias, _)| *alias == wanted).map_or(&*wanted, |(_, name)| name);
    let in_tables = TABLES.iter().flat_map(|(_, _, names)| names.iter());
    let mut all = in_tables.copied().chain(OTHERS.iter().map(|(name, _)| *name));
    all.find(|name| *name == wanted && !name.is_empty())
}

/// Where the feature `name` is: AMD's leaf 0x80000001 repeats some bits of leaf 1.
#[must_use]
pub fn places(name: &str) -> Vec<Place> {
    let in_tables = TABLES.iter().flat_map(|(function, register, names)| {
        let bits = (0u8..).zip(names.iter()).filter(|(_, here)| **here == name);
        bits.map(|(bit, _)| Place::new(*function, 0, *register, bit))
    });
    in_tables.chain(OTHERS.iter().filter(|(other, _)| *other == name).map(|(_, place)| *place)).collect()
}

/// A feature bit's name with its register and bit number, or only those if the tables have no name for it.
#[must_use]
pub fn name(function: u32, index: u32, register: &str, bit: usize) -> String {
    let table = match (function, index, register) {
        (1, _, "ECX") => Some(&LEAF_1_ECX),
        (1, _, "EDX") => Some(&LEAF_1_EDX),
        (7, 0, "EBX") => Some(&LEAF_7_EBX),
        (7, 0, "ECX") => Some(&LEAF_7_ECX),
        (7, 0, "EDX") => Some(&LEAF_7_EDX),
        (0x8000_0001, _, "ECX") => Some(&EXT_1_ECX),
        (0x8000_0001, _, "EDX") => Some(&EXT_1_EDX),
        _ => None,
    };
    let place = match function {
        7 | 0xd => format!("CPUID.({function:#X},{index}):{register}[{bit}]"),
        _ if function < 10 => format!("CPUID.{function}:{register}[{bit}]"),
        _ => format!("CPUID.{function:#X}:{register}[{bit}]"),
    };
    match table.and_then(|names| names.get(bit)).filter(|name| !name.is_empty()) {
        Some(name) => format!("{name} ({place})"),
        None => place,
    }
}
