//! Why an image cannot be run.

use std::io;

use super::sites::SiteError;

/// An image that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("{what} {name}: {source}")]
    Read {
        /// What it was to be.
        what: &'static str,
        /// The file.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file is too large to be what it was to be.
    #[error("{what} {name}: larger than {limit} bytes")]
    TooLarge {
        /// What it was to be.
        what: &'static str,
        /// The file.
        name: String,
        /// The most that is read.
        limit: u64,
    },
    /// None of the formats.
    #[error(
        "guest image {name}: not an ELF64 executable for x86-64 with a PVH entry, nor a Multiboot 1 kernel, nor a \
         bzImage ({reason})"
    )]
    Unknown {
        /// The image.
        name: String,
        /// What the ELF parser said.
        reason: String,
    },
    /// No way in.
    #[error(
        "guest image {0}: no PVH entry point (an ELF note `Xen`, type 18; Linux has one with CONFIG_PVH=y) and no Multiboot 1 \
         header"
    )]
    NoEntry(String),
    /// A header that cannot be followed.
    #[error("guest image {name}: its {format} header {reason}")]
    Header {
        /// The image.
        name: String,
        /// Which header.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It does not fit.
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
    /// Nothing is left for what the VMM has to tell the guest.
    #[error("guest image {0}: it leaves no room in guest memory for boot data; use a larger --memory")]
    NoRoom(String),
    /// The loader refused it.
    #[error("guest image {name}: {reason}")]
    Load {
        /// The image.
        name: String,
        /// Why.
        reason: String,
    },
    /// Its trap sites are wrong.
    #[error("guest image {name}: {source}")]
    Sites {
        /// The image.
        name: String,
        /// Why.
        source: SiteError,
    },
    /// Its tick ring is wrong.
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
        /// What is possible.
        most: usize,
    },
    /// The command line holds a byte that would end it.
    #[error("the guest command line contains a NUL byte")]
    CmdlineNul,
    /// The initrd does not fit.
    #[error("the initrd of {0} bytes does not fit into guest memory beside the kernel; use a larger --memory")]
    InitrdTooBig(usize),
}
