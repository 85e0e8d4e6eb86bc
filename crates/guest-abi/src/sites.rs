//! Trap sites: the instructions that a VMM may patch to exit, and then emulate.
//!
//! The guest lists them in the ELF section [`SECTION`], as Linux lists its alternatives. Unpatched, the guest runs on
//! any hypervisor. A VMM that wants to answer RDTSC itself overwrites the two bytes of each site with `HLT; NOP` and
//! performs the original instruction when the HLT exits.

/// Name of the ELF section with the table: an array of [`Site`].
pub const SECTION: &str = ".trap_sites";

/// One entry of the table, 16 bytes, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Site {
    /// Linear (and, in this guest, physical) address of the instruction's first byte.
    pub address: u64,
    /// A [`Kind`], as its number.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}

/// Size of [`Site`] in the section, in bytes.
pub const SITE_BYTES: usize = 16;
const _: () = assert!(size_of::<Site>() == SITE_BYTES);

/// The instruction at a site. Each is two bytes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Kind {
    /// `RDTSC`.
    Rdtsc = 1,
    /// The `WRMSR` that writes IA32_TSC_DEADLINE.
    DeadlineWrmsr = 2,
    /// `PAUSE` in a spin loop: a yield in virtual time.
    Pause = 3,
}

impl Kind {
    /// The kind that a table entry names, if it is known.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Rdtsc),
            2 => Some(Self::DeadlineWrmsr),
            3 => Some(Self::Pause),
            _ => None,
        }
    }

    /// The two bytes of an unpatched site of this kind.
    #[must_use]
    pub fn original(self) -> [u8; 2] {
        match self {
            Self::Rdtsc => [0x0f, 0x31],
            Self::DeadlineWrmsr => [0x0f, 0x30],
            Self::Pause => [0xf3, 0x90],
        }
    }
}

/// The two bytes of a patched site: `HLT; NOP`.
pub const PATCH: [u8; 2] = [0xf4, 0x90];

impl Site {
    /// The entry that `bytes` hold.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; SITE_BYTES]) -> Self {
        let mut at = crate::report::Fields::new(bytes);
        Self { address: at.u64(), kind: at.u32(), reserved: at.u32() }
    }
}
