//! A file with the sites of one kernel, as `vmm sites` writes it.

use guest_abi::sites::Kind;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Found, FoundSite, Origin};
use crate::boot::sites::{SiteError, SiteState, Sites};

/// The file's format.
const FORMAT: u32 = 1;

/// The contents of the file, JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteList {
    /// 1.
    pub format: u32,
    /// SHA-256 of the ELF file, in hexadecimal: of a bzImage's unpacked payload.
    pub image_sha256: String,
    /// The sites, by linear address.
    pub sites: Vec<ListedSite>,
}

/// A site in a list. Addresses are hexadecimal text, because JSON's numbers are not exact beyond 2^53 everywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListedSite {
    /// Linear address of the first of its two bytes.
    pub address: String,
    /// Guest physical address at which that is loaded.
    pub physical: String,
    /// The instruction.
    pub kind: ListedKind,
    /// The kernel writes it there while it boots, if at all.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub later: bool,
    /// The function and the offset in it, for the reader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
}

/// A kind of site in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListedKind {
    /// RDTSC.
    Rdtsc,
    /// WRMSR of IA32_TSC_DEADLINE.
    DeadlineWrmsr,
    /// PAUSE.
    Pause,
}

/// A list that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// It is not such a file.
    #[error("not a list of trap sites: {0}")]
    Json(#[from] serde_json::Error),
    /// It has another format.
    #[error("its format is {0}, and this vmm reads format {FORMAT}")]
    Format(u32),
    /// An address that is none.
    #[error("{0:?} is not an address in hexadecimal, such as 0xffffffff81000000")]
    Address(String),
    /// It was made for another kernel.
    #[error(
        "it was made for an image with SHA-256 {listed}, and this one has {found}; make it again: vmm sites KERNEL -o FILE"
    )]
    OtherImage {
        /// The image for which it was made.
        listed: String,
        /// The image at hand.
        found: String,
    },
    /// The sites contradict each other.
    #[error(transparent)]
    Sites(#[from] SiteError),
}

impl SiteList {
    /// The list of what was found in `file`.
    #[must_use]
    pub fn of(found: &Found, file: &[u8]) -> Self {
        Self { format: FORMAT, image_sha256: digest(file), sites: found.sites.iter().map(listed).collect() }
    }

    /// Parses a list.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn parse(text: &[u8]) -> Result<Self, ListError> {
        let list: Self = serde_json::from_slice(text)?;
        if list.format == FORMAT { Ok(list) } else { Err(ListError::Format(list.format)) }
    }

    /// The table for a machine that boots `file`.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn table(&self, file: &[u8]) -> Result<Sites, ListError> {
        let found = digest(file);
        if found != self.image_sha256 {
            return Err(ListError::OtherImage { listed: self.image_sha256.clone(), found });
        }
        let state: Result<Vec<SiteState>, ListError> = self.sites.iter().map(ListedSite::state).collect();
        Ok(Sites::from_state(&state?)?)
    }
}

impl ListedSite {
    fn state(&self) -> Result<SiteState, ListError> {
        let (address, physical) = (address(&self.address)?, address(&self.physical)?);
        let kind = Kind::from(self.kind) as u32;
        Ok(SiteState { address, physical: (physical != address).then_some(physical), kind, later: self.later })
    }
}

fn address(text: &str) -> Result<u64, ListError> {
    let digits = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
    digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or_else(|| ListError::Address(text.to_owned()))
}

fn digest(file: &[u8]) -> String {
    hex::encode(Sha256::digest(file))
}

fn listed(found: &FoundSite) -> ListedSite {
    let FoundSite { site, kind, origin, function } = found;
    ListedSite {
        address: format!("{:#x}", site.address),
        physical: format!("{:#x}", site.physical.unwrap_or(site.address)),
        kind: (*kind).into(),
        later: matches!(origin, Origin::CopiedFrom(_)),
        function: function.as_ref().map(|(name, offset)| format!("{name}+{offset:#x}")),
    }
}

impl ListedKind {
    /// As in a list.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rdtsc => "rdtsc",
            Self::DeadlineWrmsr => "deadline-wrmsr",
            Self::Pause => "pause",
        }
    }
}

impl From<Kind> for ListedKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Rdtsc => Self::Rdtsc,
            Kind::DeadlineWrmsr => Self::DeadlineWrmsr,
            Kind::Pause => Self::Pause,
        }
    }
}

impl From<ListedKind> for Kind {
    fn from(kind: ListedKind) -> Self {
        match kind {
            ListedKind::Rdtsc => Self::Rdtsc,
            ListedKind::DeadlineWrmsr => Self::DeadlineWrmsr,
            ListedKind::Pause => Self::Pause,
        }
    }
}
