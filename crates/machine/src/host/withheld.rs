//! Guest RAM that is mapped from its file block by block, each before its first use.
//!
//! Until a block is mapped, every access to it waits: the guest's, KVM's for the guest, or the VMM's own. userfaultfd
//! makes it wait (Linux `Documentation/admin-guide/mm/userfaultfd.rst`). Here that works with anonymous memory only. So
//! RAM is first mapped as anonymous memory, and [`Withheld::map_and_wake`] replaces that with the file's mapping.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    sync::Arc,
};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val},
    ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr,
};

use crate::mem::ram::{GuestRam, RamRegion};

/// `linux/userfaultfd.h`: UFFDIO, UFFD_API.
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// `/dev/userfaultfd`'s own request.
const USERFAULTFD_IOC: u32 = 0xaa;
/// UFFDIO_REGISTER_MODE_MISSING.
const MODE_MISSING: u64 = 1;
/// UFFD_EVENT_PAGEFAULT.
const EVENT_PAGEFAULT: u8 = 0x12;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Place {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Place,
    mode: u64,
    ioctls: u64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, USERFAULTFD_IOC, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Place);

/// The size of `struct uffd_msg`, whose first byte is the event, and the offset of a page fault's address in it.
const MESSAGE_BYTES: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

/// RAM of which blocks are withheld: an access to one waits until [`Self::map_and_wake`] maps it.
#[derive(Debug)]
pub struct Withheld {
    fd: OwnedFd,
    /// Held because its mappings are replaced here: they must exist as long as that can happen.
    memory: Arc<GuestRam>,
}

/// Bytes of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The region's number.
    pub region: usize,
    /// Where in it, in bytes.
    pub inside: Range<usize>,
}

impl Withheld {
    /// Withholds `pieces` of `memory`, whose regions are private mappings of files. None of them may have been accessed
    /// yet.
    ///
    /// # Errors
    /// Above all EPERM: KVM accesses guest memory in the kernel, and to stop such accesses an unprivileged process
    /// needs the sysctl `vm.unprivileged_userfaultfd` or access to `/dev/userfaultfd`. `memory` is then unusable.
    pub fn new(memory: &Arc<GuestRam>, pieces: &[Piece]) -> io::Result<Self> {
        let withheld = Self { fd: open()?, memory: Arc::clone(memory) };
        let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: the request reads and writes one `Api`, which outlives the call.
        succeed(unsafe { ioctl_with_mut_ref(&withheld.fd, UFFDIO_API(), &mut api) })?;
        for piece in pieces {
            let region = withheld.region_of(piece)?;
            let (target, length) = (region.as_ptr().wrapping_add(piece.inside.start), piece.inside.len());
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | libc::MAP_ANONYMOUS;
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the range is in a mapping of `memory`. There are no references into it (vm-memory hands out
            // none), and the new mapping has the same size and rights.
            let mapped = unsafe { libc::mmap(target.cast(), length, rights, flags, -1, 0) };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let range = place(region, &piece.inside);
            let mut register = Register { range, mode: MODE_MISSING, ioctls: 0 };
            // SAFETY: the request reads and writes one `Register`, which outlives the call.
            succeed(unsafe { ioctl_with_mut_ref(&withheld.fd, UFFDIO_REGISTER(), &mut register) })?;
        }
        Ok(withheld)
    }

    /// Takes the next page fault that waits for withheld memory, as (region, byte in it); none if no thread waits.
    ///
    /// # Errors
    /// If the system call fails.
    pub fn next_fault(&self) -> io::Result<Option<(usize, usize)>> {
        let mut message = [0_u8; MESSAGE_BYTES];
        match nix::unistd::read(&self.fd, &mut message) {
            Ok(MESSAGE_BYTES) => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        let address =
            message.get(MESSAGE_ADDRESS..).and_then(<[u8]>::first_chunk).map(|bytes| usize::from_le_bytes(*bytes));
        let place = address.filter(|_| message.first() == Some(&EVENT_PAGEFAULT)).and_then(|address| {
            self.memory.iter().enumerate().find_map(|(number, region)| {
                let inside = address.checked_sub(region.as_ptr().addr())?;
                u64::try_from(inside).is_ok_and(|inside| inside < region.len()).then_some((number, inside))
            })
        });
        place
            .map(Some)
            .ok_or_else(|| io::Error::other("userfaultfd reported an event that is not a page fault in guest memory"))
    }

    /// Maps the file at `piece`, which is whole pages that are still withheld, and wakes the threads that wait for it.
    /// Where `pages` (offset in the piece, content) has a page, that replaces the file's. A thread that wakes sees the
    /// complete piece.
    ///
    /// # Errors
    /// If the kernel refuses; the piece is then still withheld.
    pub fn map_and_wake(&self, piece: &Piece, pages: &[(usize, &[u8])]) -> io::Result<()> {
        let (region, inside) = (self.region_of(piece)?, &piece.inside);
        let behind = region.file_offset().ok_or_else(outside)?;
        let start = u64::try_from(inside.start).ok().and_then(|start| behind.start().checked_add(start));
        let offset = start.and_then(|start| libc::off_t::try_from(start).ok()).ok_or_else(outside)?;
        let target = region.as_ptr().wrapping_add(inside.start).cast::<libc::c_void>();
        if pages.is_empty() {
            map(target, inside.len(), libc::MAP_FIXED, behind.file(), offset)?;
        } else {
            // The pages are written into a mapping elsewhere, which mremap then moves to the piece. Guest memory never
            // shows the file's own content there, not even for a moment.
            let elsewhere = map(ptr::null_mut(), inside.len(), 0, behind.file(), offset)?;
            for (at, page) in pages {
                let end = at.checked_add(page.len()).filter(|end| *end <= inside.len()).ok_or_else(outside)?;
                let to = elsewhere.cast::<u8>().wrapping_add(end - page.len());
                // SAFETY: `to` and the page's length are within the mapping that was just made and has no other user.
                unsafe { ptr::copy_nonoverlapping(page.as_ptr(), to, page.len()) };
            }
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: it moves the mapping that was just made to a range of `self.memory`. There are no references into
            // that range; size and rights are those of the mapping that it replaces.
            let moved = unsafe { libc::mremap(elsewhere, inside.len(), inside.len(), flags, target) };
            if moved == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        self.wake(piece)
    }

    /// Wakes the threads that wait for `piece`, which is mapped already.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn wake(&self, piece: &Piece) -> io::Result<()> {
        let region = self.region_of(piece)?;
        // SAFETY: the request reads one `Place`, which outlives the call, and touches no memory of ours.
        succeed(unsafe { ioctl_with_ref(&self.fd, UFFDIO_WAKE(), &place(region, &piece.inside)) })
    }
}

impl Withheld {
    /// The region that contains all of `piece`.
    fn region_of(&self, piece: &Piece) -> io::Result<&RamRegion> {
        let has = |region: &&RamRegion| u64::try_from(piece.inside.end).is_ok_and(|end| end <= region.len());
        let region = self.memory.iter().nth(piece.region).filter(has).filter(|_| !piece.inside.is_empty());
        region.ok_or_else(outside)
    }
}

fn outside() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

impl AsFd for Withheld {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let refused = io::Error::last_os_error();
    let fd = match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => fd,
        _ => {
            let Ok(device) = File::open("/dev/userfaultfd") else { return Err(refused) };
            let flags = libc::c_ulong::from(flags.unsigned_abs());
            // SAFETY: the request takes flags and touches no memory of ours.
            let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) };
            succeed(fd.min(0))?;
            fd
        }
    };
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Maps `length` bytes of `file` at `target` if `fixed` is MAP_FIXED, or at an address that the kernel chooses.
fn map(
    target: *mut libc::c_void,
    length: usize,
    fixed: i32,
    file: &File,
    offset: libc::off_t,
) -> io::Result<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | fixed;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: without MAP_FIXED it changes no other mapping. With it the caller's range is within guest RAM. There are
    // no references into that, and the new mapping has the size and rights of the one that it replaces.
    let mapped = unsafe { libc::mmap(target, length, rights, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped) }
}

fn place(region: &RamRegion, inside: &Range<usize>) -> Place {
    // An address and a length of this process fit 64 bits.
    let wide = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
    Place { start: wide(region.as_ptr().addr().wrapping_add(inside.start)), len: wide(inside.len()) }
}

fn succeed(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
