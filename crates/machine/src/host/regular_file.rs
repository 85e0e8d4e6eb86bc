//! Opening files that are read whole: only regular ones, because their size is known before the read.

use std::{
    fs::{self, File, FileType},
    io,
    os::unix::fs::FileTypeExt,
    path::Path,
};

/// Names the kind of a file that is not a regular one, for messages.
#[must_use]
pub fn kind(kind: FileType) -> &'static str {
    match kind {
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_socket() => "a socket",
        _ if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "of an unknown kind",
    }
}

/// Opens the regular file at `path`, and returns it with its size in bytes.
///
/// # Errors
/// It cannot be opened, or it is not a regular file: opening a FIFO may block, and a device may have no end.
pub fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let regular = |meta: fs::Metadata| match meta.file_type() {
        file if file.is_file() => Ok(meta.len()),
        other => Err(io::Error::other(format!("it is {}, not a regular file", kind(other)))),
    };
    // Checked before the open, too: opening a FIFO waits for a writer.
    regular(fs::metadata(path)?)?;
    let file = File::open(path)?;
    let length = regular(file.metadata()?)?;
    Ok((file, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: an open that blocks, or a read that never ends.
    #[test]
    fn what_is_no_regular_file_is_named_and_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let refused = |path: &Path| open_regular(path).map(drop).unwrap_err().to_string();
        fs::write(path("file"), "four").unwrap();
        assert_eq!(open_regular(&path("file")).unwrap().1, 4);
        assert_eq!(refused(dir.path()), "it is a directory, not a regular file");
        assert_eq!(refused(Path::new("/dev/zero")), "it is a device, not a regular file");
        let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        assert_eq!(refused(&path("socket")), "it is a socket, not a regular file");
        std::os::unix::fs::symlink("/dev/zero", path("link")).unwrap();
        assert_eq!(refused(&path("link")), "it is a device, not a regular file");
        assert!(refused(&path("none")).starts_with("No such file"));
    }
}
