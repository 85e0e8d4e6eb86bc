//! Telling the kernel that a file will be flushed, and waiting for parts of it.

use std::{fs::File, io, os::fd::AsRawFd};

/// Lets the kernel begin to write `file` to the disk, and does not wait for it: what is done until the file is flushed costs
/// nothing then. Whether it did, the flush tells.
pub fn begin_writeback(file: &File) {
    // SAFETY: the call takes a descriptor, which `file` keeps open, and touches no memory of ours. From 0, the length 0 is up
    // to the end (sync_file_range(2)).
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Waits until `length` bytes of `file` from `offset` on are on their disk. Makes nothing sure (sync_file_range(2)): the flush
/// does.
///
/// # Errors
/// If they could not be written.
pub fn write_back(file: &File, offset: u64, length: u64) -> io::Result<()> {
    const ALL: libc::c_uint =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let offset = i64::try_from(offset).unwrap_or(i64::MAX);
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    // SAFETY: the call takes a descriptor, which `file` keeps open, and touches no memory of ours.
    if unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, ALL) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // A file system that cannot: the flush waits for all at once.
        error if error.raw_os_error() == Some(libc::EINVAL) || error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}
