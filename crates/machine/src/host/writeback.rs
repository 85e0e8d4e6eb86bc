//! Writing a file's dirty pages to the disk before it is flushed.

use std::{fs::File, io, os::fd::AsRawFd};

/// Makes the kernel begin to write `file` to the disk, and does not wait for it: the later flush then has less to do.
/// An error is ignored here, because the flush reports it.
pub fn begin_writeback(file: &File) {
    // SAFETY: the call takes a descriptor, which `file` keeps open, and touches no memory of ours. From 0, the length 0
    // is up to the end (sync_file_range(2)).
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Writes `length` bytes of `file` from `offset` on to the disk, and waits for it. This alone does not make them
/// durable (sync_file_range(2)): a flush must follow.
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
        // The file system does not support the call: the flush will write everything at once.
        error if error.raw_os_error() == Some(libc::EINVAL) || error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}
