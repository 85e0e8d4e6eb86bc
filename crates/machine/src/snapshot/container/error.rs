//! What can be wrong with a `state` file.

use super::{FORMAT_VERSION, MAX_SECTIONS, MAX_STATE_BYTES, NAME_BYTES};
use crate::blame::{Blame, Blamed};

/// Why a `state` file was refused, or could not be made. The caller that has read the file adds its path.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The first bytes are not [`MAGIC`](super::MAGIC).
    #[error("not the state of a vmm snapshot: the first bytes are wrong")]
    NotASnapshot,
    /// Another [`FORMAT_VERSION`].
    #[error(
        "snapshot format {found} is not supported, this build reads format {FORMAT_VERSION}: use the build that wrote it"
    )]
    Format {
        /// The version in the file.
        found: u32,
    },
    /// The file is larger than [`MAX_STATE_BYTES`], or a section would make it so.
    #[error("{bytes} bytes of state, more than the {MAX_STATE_BYTES} that a snapshot may have")]
    TooLarge {
        /// The size in bytes.
        bytes: u64,
    },
    /// A section is larger than its limit.
    #[error("section `{name}` has {bytes} bytes, more than the {most} that it may have")]
    SectionTooLarge {
        /// The section.
        name: String,
        /// Its size in bytes.
        bytes: u64,
        /// The limit, in bytes.
        most: usize,
    },
    /// More than [`MAX_SECTIONS`].
    #[error("{found} sections, more than the {MAX_SECTIONS} that a snapshot may have")]
    TooManySections {
        /// The number of sections.
        found: u32,
    },
    /// The file ends before something that must be there.
    #[error("truncated: {what} needs {needed} bytes and {left} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// The bytes that it takes.
        needed: u64,
        /// The bytes that the file still has.
        left: u64,
    },
    /// A name that no section can have.
    #[error("section {index} is damaged: its name is not lower-case ASCII padded with zeros")]
    BadName {
        /// The section's place in the file, from 0.
        index: u32,
    },
    /// The checksum does not match header and payload.
    #[error("section `{name}` is damaged: its checksum differs, the file was changed after it was written")]
    Damaged {
        /// The section, as the (possibly damaged) header names it.
        name: String,
    },
    /// Two sections with one name.
    #[error("section `{name}` is there twice")]
    Duplicate {
        /// The section.
        name: String,
    },
    /// Bytes after the last section.
    #[error("{bytes} bytes follow the last section, the file was changed after it was written")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A section that the reader needs is not there.
    #[error("section `{name}` is missing")]
    Missing {
        /// The section.
        name: &'static str,
    },
    /// Sections that this build does not know. A restore without them would lose state silently.
    #[error("unknown section `{names}`: the snapshot holds state that this build cannot restore")]
    Unknown {
        /// The sections, comma-separated.
        names: String,
    },
    /// A section of another version.
    #[error("section `{name}` has version {found}, this build reads version {supported}: use the build that wrote it")]
    SectionVersion {
        /// The section.
        name: String,
        /// The version in the file.
        found: u32,
        /// The version asked for.
        supported: u32,
    },
    /// A payload that is not the JSON of the state type.
    #[error("section `{name}` cannot be read: {source}")]
    Decode {
        /// The section.
        name: String,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// A state type that JSON cannot hold.
    #[error("section `{name}` cannot be written: {source}")]
    Encode {
        /// The section.
        name: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// A name given to [`StateWriter::section`](super::StateWriter::section) that does not fit the header.
    #[error("section `{name}` cannot be written: a name is 1 to {NAME_BYTES} of a-z, 0-9 and '-'")]
    UnusableName {
        /// The name.
        name: &'static str,
    },
}

impl Blamed for ContainerError {
    fn blame(&self) -> Blame {
        match self {
            Self::NotASnapshot
            | Self::Format { .. }
            | Self::TooLarge { .. }
            | Self::SectionTooLarge { .. }
            | Self::TooManySections { .. }
            | Self::Truncated { .. }
            | Self::BadName { .. }
            | Self::Damaged { .. }
            | Self::Duplicate { .. }
            | Self::Trailing { .. }
            | Self::Missing { .. }
            | Self::Unknown { .. }
            | Self::SectionVersion { .. }
            | Self::Decode { .. }
            | Self::Encode { .. }
            | Self::UnusableName { .. } => Blame::Usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::de::Error as _;

    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a damaged snapshot reported as a guest that failed.
    #[test]
    fn a_state_file_is_the_users() {
        let name = || "cpus".to_owned();
        let json = || serde_json::Error::custom("x");
        let errors = [
            ContainerError::NotASnapshot,
            ContainerError::Format { found: 1 },
            ContainerError::TooLarge { bytes: 1 },
            ContainerError::SectionTooLarge { name: name(), bytes: 2, most: 1 },
            ContainerError::TooManySections { found: 1 },
            ContainerError::Truncated { what: name(), needed: 2, left: 1 },
            ContainerError::BadName { index: 0 },
            ContainerError::Damaged { name: name() },
            ContainerError::Duplicate { name: name() },
            ContainerError::Trailing { bytes: 1 },
            ContainerError::Missing { name: "cpus" },
            ContainerError::Unknown { names: name() },
            ContainerError::SectionVersion { name: name(), found: 2, supported: 1 },
            ContainerError::Decode { name: name(), source: json() },
            ContainerError::Encode { name: "cpus", source: json() },
            ContainerError::UnusableName { name: "" },
        ];
        all_blame(Blame::Usage, errors);
    }
}
