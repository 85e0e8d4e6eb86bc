//! Telling the kernel that a file will be flushed.

use std::{fs::File, os::fd::AsRawFd};

/// Lets the kernel begin to write `file` to the disk, and does not wait for it: what is done until the file is flushed costs
/// nothing then. Whether it did, the flush tells.
pub fn begin_writeback(file: &File) {
    // SAFETY: the call takes a descriptor, which `file` keeps open, and touches no memory of ours. From 0, the length 0 is up
    // to the end (sync_file_range(2)).
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}
