//! Why an image cannot be run.

use std::io;

use super::sites::SiteError;
use crate::blame::{Blame, Blamed};

/// An image that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("{what} {name}: {source}")]
    Read {
        /// The file's use, for the message.
        what: &'static str,
        /// The file.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than any image or initrd.
    #[error("{what} {name}: larger than {limit} bytes")]
    TooLarge {
        /// The file's use, for the message.
        what: &'static str,
        /// The file.
        name: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The file has none of the formats.
    #[error(
        "guest image {name}: not an ELF64 executable for x86-64 with a PVH entry, nor a Multiboot 1 kernel, nor a \
         bzImage ({reason})"
    )]
    Unknown {
        /// The image.
        name: String,
        /// The ELF parser's error.
        reason: String,
    },
    /// An ELF file without an entry point that the VMM can use.
    #[error(
        "guest image {0}: no PVH entry point (an ELF note `Xen`, type 18; Linux has one with CONFIG_PVH=y) and no Multiboot 1 \
         header"
    )]
    NoEntry(String),
    /// A header that is wrong or asks for something that the VMM does not do.
    #[error("guest image {name}: its {format} header {reason}")]
    Header {
        /// The image.
        name: String,
        /// Which header.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The image does not fit in guest memory.
    #[error(
        "guest image {name}: needs memory up to {needed:#x}, but the guest has {available:#x} bytes; use a larger --memory"
    )]
    TooBigForMemory {
        /// The image.
        name: String,
        /// End of its highest segment.
        needed: u64,
        /// RAM size.
        available: u64,
    },
    /// No guest memory is left for the boot data.
    #[error("guest image {0}: it leaves no room in guest memory for boot data; use a larger --memory")]
    NoRoom(String),
    /// The loader refused the image.
    #[error("guest image {name}: {reason}")]
    Load {
        /// The image.
        name: String,
        /// Why.
        reason: String,
    },
    /// The image's trap sites are wrong.
    #[error("guest image {name}: {source}")]
    Sites {
        /// The image.
        name: String,
        /// Why.
        source: SiteError,
    },
    /// The image's tick ring is not in guest memory.
    #[error("guest image {name}: the tick ring at {address:#x} is not in guest memory")]
    Ring {
        /// The image.
        name: String,
        /// Its address.
        address: u64,
    },
    /// The command line does not fit.
    #[error("the guest command line has {length} bytes; at most {most} are possible")]
    CmdlineTooLong {
        /// Its length.
        length: usize,
        /// The limit, in bytes.
        most: usize,
    },
    /// The command line holds a byte that would end it.
    #[error("the guest command line contains a NUL byte")]
    CmdlineNul,
    /// The initrd does not fit.
    #[error("the initrd of {0} bytes does not fit into guest memory beside the kernel; use a larger --memory")]
    InitrdTooBig(usize),
}

impl Blamed for ImageError {
    fn blame(&self) -> Blame {
        match self {
            Self::Read { .. }
            | Self::TooLarge { .. }
            | Self::Unknown { .. }
            | Self::NoEntry(_)
            | Self::Header { .. }
            | Self::TooBigForMemory { .. }
            | Self::NoRoom(_)
            | Self::Load { .. }
            | Self::Ring { .. }
            | Self::CmdlineTooLong { .. }
            | Self::CmdlineNul
            | Self::InitrdTooBig(_) => Blame::Usage,
            Self::Sites { source, .. } => source.blame(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a file that is no image, reported as a failed guest.
    #[test]
    fn an_image_is_the_users() {
        let name = String::new;
        let errors = [
            ImageError::Read { what: "initrd", name: name(), source: io::Error::other("x") },
            ImageError::TooLarge { what: "initrd", name: name(), limit: 1 },
            ImageError::Unknown { name: name(), reason: name() },
            ImageError::NoEntry(name()),
            ImageError::Header { name: name(), format: "Multiboot", reason: name() },
            ImageError::TooBigForMemory { name: name(), needed: 2, available: 1 },
            ImageError::NoRoom(name()),
            ImageError::Load { name: name(), reason: name() },
            ImageError::Sites { name: name(), source: SiteError::Ragged(1) },
            ImageError::Ring { name: name(), address: 1 },
            ImageError::CmdlineTooLong { length: 2, most: 1 },
            ImageError::CmdlineNul,
            ImageError::InitrdTooBig(1),
        ];
        all_blame(Blame::Usage, errors);
    }
}
