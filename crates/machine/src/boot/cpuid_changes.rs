//! What the user changes of the guest's CPUID (`--cpuid`): features that the guest is not to see, and such that it
//! must.
//!
//! A feature goes with all that need it: a guest that finds AVX without XSAVE is a guest on no CPU. What depends on
//! what: Intel SDM vol. 1, chapters "Programming with …", and vol. 2, "CPUID".

use std::{collections::BTreeSet, fmt, str::FromStr};

use super::cpuid_names::{self, Place};
use crate::x86::Leaf;

/// CPUID: processor extended state enumeration, which there is only with XSAVE.
const XSAVE_LEAF: u32 = 0xd;

/// The features to take away and to insist on, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidChanges {
    without: BTreeSet<&'static str>,
    with: BTreeSet<&'static str>,
}

/// Why a change is not possible on any host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChange {
    /// It has no sign.
    #[error("{0:?} is no change: write -{0} to take a feature away, +{0} to insist on it")]
    NoSign(String),
    /// Nothing has this name.
    #[error("there is no feature {0:?}: names are those of /proc/cpuinfo, and in docs/cpuid.md")]
    Unknown(String),
    /// Something else decides about it.
    #[error("{name} cannot be changed: {why}")]
    Decided {
        /// The feature.
        name: &'static str,
        /// What decides.
        why: &'static str,
    },
    /// It is both taken away, perhaps by what it needs, and insisted on.
    #[error("+{wanted} contradicts -{taken}")]
    Contradiction {
        /// The feature that is insisted on.
        wanted: &'static str,
        /// The feature that is taken away.
        taken: &'static str,
    },
}

/// Features, and those that need them directly.
const NEEDED_BY: &[(&str, &[&str])] = &[
    ("fxsr", &["sse", "fxsr_opt"]),
    ("sse", &["sse2", "mmxext", "sse4a", "misalignsse"]),
    ("sse2", &["sse3", "pclmulqdq", "aes", "sha_ni", "gfni", "avx"]),
    ("sse3", &["ssse3"]),
    ("ssse3", &["sse4_1"]),
    ("sse4_1", &["sse4_2"]),
    ("mmx", &["3dnow"]),
    ("3dnow", &["3dnowext"]),
    (
        "xsave",
        &[
            "osxsave", "avx", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "mpx", "pku", "amx_tile", "lwp", "shstk",
            "ibt", "avx512f",
        ],
    ),
    ("xsavec", &["xsaves"]),
    ("avx", &["fma", "f16c", "avx2", "xop", "fma4", "vaes", "vpclmulqdq", "avx_vnni"]),
    ("avx2", &["avx512f"]),
    (
        "avx512f",
        &[
            "avx512dq",
            "avx512ifma",
            "avx512pf",
            "avx512er",
            "avx512cd",
            "avx512bw",
            "avx512vl",
            "avx512vbmi",
            "avx512_vbmi2",
            "avx512_vnni",
            "avx512_bitalg",
            "avx512_vpopcntdq",
            "avx512_4vnniw",
            "avx512_4fmaps",
            "avx512_vp2intersect",
            "avx512_fp16",
            "avx512_bf16",
        ],
    ),
    ("amx_tile", &["amx_bf16", "amx_int8"]),
    ("pku", &["ospke"]),
    ("lm", &["syscall", "la57", "pcid", "fsgsbase"]),
    ("hle", &["rtm_always_abort"]),
];

/// Why a feature is neither taken away nor added by name.
fn decided(name: &str) -> Option<&'static str> {
    Some(match name {
        "x2apic" => "--x2apic decides",
        "tsc_deadline_timer" => "vmm offers it wherever it works",
        "tsc_adjust" => "it follows --tsc",
        "apic" => "the guest's IA32_APIC_BASE decides",
        "hypervisor" => "vmm always says that it is one",
        "osxsave" | "ospke" => "the guest's CR4 decides",
        "lm" | "fpu" | "tsc" | "msr" | "pae" | "cx8" => "a guest that vmm boots needs it",
        _ => return None,
    })
}

/// Features that vmm takes away because it does not emulate them.
const NOT_OFFERED: [&str; 4] = ["monitor", "vmx", "svm", "rdtscp"];

impl FromStr for CpuidChanges {
    type Err = BadChange;

    /// `-NAME` and `+NAME`, with commas in between.
    fn from_str(text: &str) -> Result<Self, BadChange> {
        let mut changes = Self::default();
        for change in text.split(',') {
            let (set, spelled) = match (change.strip_prefix('-'), change.strip_prefix('+')) {
                (Some(spelled), _) => (&mut changes.without, spelled),
                (_, Some(spelled)) => (&mut changes.with, spelled),
                _ => return Err(BadChange::NoSign(change.to_owned())),
            };
            let name = cpuid_names::known(spelled).ok_or_else(|| BadChange::Unknown(spelled.to_owned()))?;
            if let Some(why) = decided(name) {
                return Err(BadChange::Decided { name, why });
            }
            set.insert(name);
        }
        if let Some(name) = NOT_OFFERED.into_iter().find(|name| changes.with.contains(name)) {
            return Err(BadChange::Decided { name, why: "vmm does not emulate it for a guest" });
        }
        for taken in changes.without.iter().copied() {
            let gone = with_dependents(taken);
            if let Some(wanted) = changes.with.iter().copied().find(|wanted| gone.contains(wanted)) {
                return Err(BadChange::Contradiction { wanted, taken });
            }
        }
        Ok(changes)
    }
}

impl fmt::Display for CpuidChanges {
    /// The same for the same changes, however they were written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signed = |sign, names: &BTreeSet<&'static str>| names.iter().map(|name| format!("{sign}{name}")).collect();
        let all: [Vec<String>; 2] = [signed('-', &self.without), signed('+', &self.with)];
        f.write_str(&all.concat().join(","))
    }
}

/// `name` and all that need it.
fn with_dependents(name: &'static str) -> BTreeSet<&'static str> {
    let mut all = BTreeSet::new();
    let mut open = vec![name];
    while let Some(name) = open.pop() {
        if all.insert(name) {
            let needs_it = NEEDED_BY.iter().filter(|(needed, _)| *needed == name);
            open.extend(needs_it.flat_map(|(_, dependents)| dependents.iter().copied()));
        }
    }
    all
}

impl CpuidChanges {
    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.without.is_empty() && self.with.is_empty()
    }

    /// Takes the features away from `leaves`.
    pub fn apply(&self, leaves: &mut Vec<Leaf>) {
        for place in self.places() {
            for leaf in leaves.iter_mut().filter(|leaf| place.is_in(leaf)) {
                *place.register_of(leaf) &= !(1 << place.bit);
            }
        }
        if self.without.contains("xsave") {
            leaves.retain(|leaf| leaf.function != XSAVE_LEAF);
        }
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        self.without.iter().copied().flat_map(with_dependents).flat_map(cpuid_names::places)
    }

    /// The names of features that are insisted on and not in `leaves`.
    #[must_use]
    pub fn missing(&self, leaves: &[Leaf]) -> Vec<&'static str> {
        let has = |place: &Place| {
            let mut here = leaves.iter().copied().filter(|leaf| place.is_in(leaf));
            here.any(|mut leaf| *place.register_of(&mut leaf) & 1 << place.bit != 0)
        };
        self.with.iter().copied().filter(|name| !cpuid_names::places(name).iter().any(has)).collect()
    }

    /// The leaves of `leaves`, by function and index, that have features which are to be away. A host may show these
    /// although `leaves` do not have them.
    #[must_use]
    pub fn changed(&self, leaves: &[Leaf]) -> BTreeSet<(u32, u32)> {
        let places: Vec<Place> = self.places().collect();
        let is_changed = |leaf: &&Leaf| places.iter().any(|place| place.is_in(leaf));
        leaves.iter().filter(is_changed).map(|leaf| (leaf.function, leaf.index)).collect()
    }

    /// Names of features that are to be away and are in `seen`, a leaf as the guest sees it.
    #[must_use]
    pub fn still_there(&self, seen: &Leaf) -> Vec<&'static str> {
        let shows = |name: &&str| {
            cpuid_names::places(name).iter().any(|place| {
                let mut seen = *seen;
                place.is_in(&seen) && *place.register_of(&mut seen) & 1 << place.bit != 0
            })
        };
        let gone: BTreeSet<&str> = self.without.iter().copied().flat_map(with_dependents).collect();
        gone.into_iter().filter(|name| decided(name).is_none()).filter(shows).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> Leaf {
        Leaf { function, index, indexed: function == 7 || function == 0xd, eax: !0, ebx: !0, ecx: !0, edx: !0 }
    }

    fn all() -> Vec<Leaf> {
        [(1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x4000_0001, 0), (0x8000_0001, 0), (0x8000_0007, 0)]
            .map(|(function, index)| leaf(function, index))
            .to_vec()
    }

    fn changed(text: &str) -> Vec<Leaf> {
        let mut leaves = all();
        text.parse::<CpuidChanges>().unwrap().apply(&mut leaves);
        leaves
    }

    fn of(leaves: &[Leaf], function: u32, index: u32) -> Leaf {
        *leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
    }

    // Catches: a bit beside the right one; a bit of another leaf.
    #[test]
    fn one_feature_is_one_bit() {
        for (name, function, index, cleared) in [
            ("smap", 7, 0, Leaf { ebx: !(1 << 20), ..leaf(7, 0) }),
            ("movbe", 1, 0, Leaf { ecx: !(1 << 22), ..leaf(1, 0) }),
            ("invtsc", 0x8000_0007, 0, Leaf { edx: !(1 << 8), ..leaf(0x8000_0007, 0) }),
            ("kvmclock-stable-bit", 0x4000_0001, 0, Leaf { eax: !(1 << 24), ..leaf(0x4000_0001, 0) }),
            ("xsaveopt", 0xd, 1, Leaf { eax: !1, ..leaf(0xd, 1) }),
            ("abm", 0x8000_0001, 0, Leaf { ecx: !(1 << 5), ..leaf(0x8000_0001, 0) }),
        ] {
            let leaves = changed(&format!("-{name}"));
            assert_eq!(of(&leaves, function, index), cleared, "{name}");
            assert_eq!(leaves.iter().filter(|leaf| !all().contains(leaf)).count(), 1, "{name}");
        }
    }

    // Catches: a guest that finds AVX-512 without XSAVE.
    #[test]
    fn what_needs_a_feature_goes_with_it() {
        let leaves = changed("-xsave");
        assert!(leaves.iter().all(|leaf| leaf.function != 0xd));
        // XSAVE, OSXSAVE, AVX, FMA, F16C; AVX2, MPX, AVX-512 of leaf 7.
        assert_eq!(!of(&leaves, 1, 0).ecx, 1 << 26 | 1 << 27 | 1 << 28 | 1 << 12 | 1 << 29);
        assert_eq!(!of(&leaves, 7, 0).ebx, 1 << 5 | 1 << 14 | 0b1101_1100_0010_0011 << 16);
        assert_eq!(of(&changed("-avx"), 0xd, 0), leaf(0xd, 0));
        assert_eq!(of(&changed("-avx2"), 1, 0), leaf(1, 0));
    }

    // Catches: AMD's copy of a bit that stays.
    #[test]
    fn a_feature_with_two_places_goes_from_both() {
        let leaves = changed("-mmx");
        assert_eq!((!of(&leaves, 1, 0).edx, !of(&leaves, 0x8000_0001, 0).edx), (1 << 23, 3 << 30 | 1 << 23));
    }

    // Catches: a missing feature that is not named, or one that is there and is.
    #[test]
    fn what_is_insisted_on_must_be_there() {
        let wanted: CpuidChanges = "+avx2,+SSE4.1,+invtsc".parse().unwrap();
        assert!(wanted.missing(&all()).is_empty());
        assert_eq!(wanted.missing(&changed("-avx,-invtsc")), ["avx2", "invtsc"]);
        assert_eq!(wanted.missing(&[]).len(), 3);
    }

    // Catches: a host that shows what was taken away, and is believed.
    #[test]
    fn what_is_still_shown_is_named() {
        let changes: CpuidChanges = "-avx2,-smap".parse().unwrap();
        assert_eq!(changes.changed(&changed("-avx2,-smap")), BTreeSet::from([(7, 0), (7, 1)]));
        assert!(changes.still_there(&of(&changed("-avx2,-smap"), 7, 0)).is_empty());
        let shown = changes.still_there(&Leaf { ebx: 1 << 20, ecx: 0, edx: 0, eax: 0, ..leaf(7, 0) });
        assert_eq!(shown, ["smap"]);
        assert!(changes.still_there(&leaf(1, 0)).is_empty());
    }

    // Catches: a name or a sign that is ignored.
    #[test]
    fn what_cannot_be_changed_is_refused() {
        for (text, says) in [
            ("smap", "-smap to take"),
            ("", "no change"),
            ("-smaq", "no feature \"smaq\""),
            ("-", "no feature \"\""),
            ("-x2apic", "--x2apic decides"),
            ("+osxsave", "the guest's CR4 decides"),
            ("+vmx", "vmm does not emulate it"),
            ("-lm", "needs it"),
            ("-avx,+avx2", "+avx2 contradicts -avx"),
        ] {
            let error = text.parse::<CpuidChanges>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        // Away already.
        assert!("-vmx,-monitor".parse::<CpuidChanges>().is_ok());
    }

    // Catches: two sweeps with the same changes that cannot be merged, or with different ones that can.
    #[test]
    fn the_same_changes_are_written_alike() {
        let text = |text: &str| text.parse::<CpuidChanges>().unwrap().to_string();
        assert_eq!(text("+sse4.1,-smap,-avx,-smap"), "-avx,-smap,+sse4_1");
        assert_eq!(text("-avx,-smap,+sse4_1"), "-avx,-smap,+sse4_1");
        assert_eq!(CpuidChanges::default().to_string(), "");
    }

    // Catches: a row of the table with a name that nothing has.
    #[test]
    fn every_name_in_the_table_is_a_feature() {
        for (name, dependents) in NEEDED_BY {
            for name in [name].into_iter().chain(*dependents) {
                assert_eq!(cpuid_names::known(name), Some(*name));
            }
        }
    }
}
