//! The snapshot's directory: created completely or not at all; its files are not trusted when they are opened.

mod error;
mod temporary;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub use self::error::DirectoryError;
use self::temporary::Temporary;
use super::container::{MAX_STATE_BYTES, StateReader};
use crate::host::regular_file;

/// The file with the sections.
pub const STATE_FILE: &str = "state";
/// The file with guest RAM.
pub const MEMORY_FILE: &str = "memory";

/// The most memory that is reserved before a `state` file is read, in bytes. That of a VM with a few vCPUs is then read
/// at once.
const STATE_BYTES_AT_ONCE: u64 = 1 << 20;

/// Makes the snapshot `dir`: `write` fills a temporary directory beside it, which becomes `dir` by a rename once all of
/// it is on the disk. `dir` must be absent or an empty directory, which is then replaced. Only its owner can enter the
/// result: guest memory holds the guest's secrets.
///
/// If anything fails, `write` included, nothing is left behind. (A VMM that is killed leaves a directory `.NAME.….tmp`,
/// which is never taken for a snapshot; the next save of `dir` removes it.)
///
/// # Errors
/// What `write` returned, or a [`DirectoryError`]. After an error in the last step, flushing the parent, the snapshot
/// is complete but may not survive a loss of power.
pub fn save<E: From<DirectoryError>>(dir: &Path, write: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let (parent, name) = split(dir)?;
    refuse_occupied(dir)?;
    let prefix = temporary::prefix(name);
    temporary::remove_stale(parent, &prefix);
    let temporary = Temporary::create(parent, &prefix)?;
    write(temporary.path())?;
    flush(temporary.path())?;
    // rename(2): "newpath must either not exist, or it must specify an empty directory". So the rename itself checks
    // that nothing is replaced. `refuse_occupied` above only reports it before the work instead of after it.
    fs::rename(temporary.path(), dir).map_err(|source| match source.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
            DirectoryError::NotEmpty { dir: dir.to_owned() }
        }
        io::ErrorKind::NotADirectory => DirectoryError::NotADirectory { dir: dir.to_owned() },
        _ => failed("create", dir, source),
    })?;
    temporary.was_renamed();
    sync(parent)?;
    Ok(())
}

/// Creates one file of a snapshot under construction, readable and writable by its owner only.
///
/// # Errors
/// The file exists or cannot be created.
pub fn create_file(temporary: &Path, name: &str) -> Result<File, DirectoryError> {
    let path = temporary.join(name);
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(&path).map_err(|source| failed("create", &path, source))
}

/// Reads the `state` file of the snapshot `dir`, unchecked; [`parse_state`] checks it.
///
/// # Errors
/// It is missing or unreadable; the error names the file.
pub fn read_state(dir: &Path) -> Result<Vec<u8>, DirectoryError> {
    let path = dir.join(STATE_FILE);
    let file = open_file(&path)?;
    let hint = file.metadata().map_or(0, |meta| meta.len()).min(STATE_BYTES_AT_ONCE);
    let mut bytes = Vec::with_capacity(usize::try_from(hint).unwrap_or(0));
    // One byte more than allowed is read, so that the parser can detect a file that is too large. The size that the
    // file system has reported may be outdated by now.
    let limit = u64::try_from(MAX_STATE_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(|source| failed("read", &path, source))?;
    Ok(bytes)
}

/// Checks `bytes`, the `state` file of the snapshot `dir`.
///
/// # Errors
/// It is too large or damaged; the error names the file.
pub fn parse_state(dir: &Path, bytes: &[u8]) -> Result<StateReader, DirectoryError> {
    StateReader::parse(bytes).map_err(|source| DirectoryError::State { path: dir.join(STATE_FILE), source })
}

/// Opens the `memory` file of the snapshot `dir`, unchecked; see [`memory::map`](super::memory::map) and
/// [`memory::verify`](super::memory::verify).
///
/// # Errors
/// It is missing, unreadable or not a regular file; the error names it.
pub fn open_memory(dir: &Path) -> Result<(File, PathBuf), DirectoryError> {
    let path = dir.join(MEMORY_FILE);
    Ok((open_file(&path)?, path))
}

fn open_file(path: &Path) -> Result<File, DirectoryError> {
    let mut options = File::options();
    // With O_NONBLOCK, because opening a FIFO otherwise waits for a writer. Regular files ignore it.
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|source| failed("open", path, source))?;
    let kind = file.metadata().map_err(|source| failed("read", path, source))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    Err(DirectoryError::NotAFile { path: path.to_owned(), kind: regular_file::kind(kind) })
}

fn split(dir: &Path) -> Result<(&Path, &OsStr), DirectoryError> {
    let name = dir.file_name().ok_or_else(|| DirectoryError::NoName { dir: dir.to_owned() })?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => Ok((parent, name)),
        _ => Ok((Path::new("."), name)),
    }
}

pub(super) fn refuse_occupied(dir: &Path) -> Result<(), DirectoryError> {
    let look = |source| failed("look into", dir, source);
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(look(error)),
        // A symbolic link counts as one: rename(2) would not follow it.
        Ok(meta) if !meta.is_dir() => Err(DirectoryError::NotADirectory { dir: dir.to_owned() }),
        Ok(_) => match fs::read_dir(dir).map_err(look)?.next() {
            None => Ok(()),
            Some(_) => Err(DirectoryError::NotEmpty { dir: dir.to_owned() }),
        },
    }
}

/// Brings the files in `dir`, and the directory itself, to the disk.
fn flush(dir: &Path) -> Result<(), DirectoryError> {
    for entry in fs::read_dir(dir).map_err(|source| failed("read", dir, source))? {
        sync(&entry.map_err(|source| failed("read", dir, source))?.path())?;
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<(), DirectoryError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| failed("flush to disk", path, source))
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> DirectoryError {
    DirectoryError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::snapshot::{ContainerError, SnapshotError, StateWriter};

    fn write_both(temporary: &Path) -> Result<(), SnapshotError> {
        let mut state = StateWriter::new();
        state.section("a", 1, &7)?;
        fs::write(temporary.join(STATE_FILE), state.finish()).unwrap();
        create_file(temporary, MEMORY_FILE)?;
        Ok(())
    }

    fn names(dir: &Path) -> Vec<OsString> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_new_or_empty_directory_becomes_a_private_snapshot() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir(parent.path().join("empty")).unwrap();
        for name in ["new", "empty", "slash/"] {
            let dir = parent.path().join(name);
            save(&dir, write_both).unwrap();
            let mut state = parse_state(&dir, &read_state(&dir).unwrap()).unwrap();
            assert_eq!(state.take::<u8>("a", 1).unwrap(), 7);
            open_memory(&dir).unwrap();
            assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
            assert_eq!(fs::metadata(dir.join(MEMORY_FILE)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(names(parent.path()).len(), 3, "{:?}", names(parent.path()));
    }

    #[test]
    fn a_failing_writer_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let result = save(&parent.path().join("snap"), |temporary| {
            write_both(temporary)?;
            Err(ContainerError::Missing { name: "x" }.into())
        });
        assert!(matches!(result, Err(SnapshotError::Container(_))));
        assert!(names(parent.path()).is_empty());
    }

    #[test]
    fn what_is_there_is_not_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("snap");
        save(&dir, write_both).unwrap();
        let called = |_: &Path| -> Result<(), SnapshotError> { panic!("must be refused before the work") };
        let error = save(&dir, called).unwrap_err().to_string();
        assert!(error.contains("snap exists and is not empty"), "{error}");
        let error = save(&dir.join(STATE_FILE), called).unwrap_err().to_string();
        assert!(error.contains("is not a directory"), "{error}");
        for unnamed in ["/", "..", ""] {
            let error = save(Path::new(unnamed), called).unwrap_err();
            assert!(matches!(error, SnapshotError::Directory(DirectoryError::NoName { .. })), "{error}");
        }
        assert_eq!(names(parent.path()).len(), 1);
    }

    #[test]
    fn a_directory_that_is_filled_during_the_save_is_not_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("snap");
        let result = save(&dir, |temporary| {
            write_both(temporary)?;
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("theirs"), b"").unwrap();
            Ok::<_, SnapshotError>(())
        });
        assert!(matches!(result, Err(SnapshotError::Directory(DirectoryError::NotEmpty { .. }))));
        assert_eq!(names(parent.path()), ["snap"]);
        assert_eq!(names(&dir), ["theirs"]);
    }

    #[test]
    fn a_parent_that_cannot_be_written_is_named_with_the_reason() {
        // A missing directory; and, because root is not bound by permissions, a file system that refuses new names.
        for parent in ["/nonexistent-parent", "/proc"] {
            let error = save(&Path::new(parent).join("snap"), write_both).unwrap_err().to_string();
            assert!(error.starts_with(&format!("snapshot: cannot create a directory in {parent}: ")), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_snapshot_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join(STATE_FILE);
        let error = read_state(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("cannot open {}: No such file", state.display())), "{error}");

        fs::write(&state, b"\x7fELF").unwrap();
        let parsed = || parse_state(dir.path(), &read_state(dir.path()).unwrap());
        let error = parsed().unwrap_err().to_string();
        assert!(error.contains("state: not the state of a vmm snapshot"), "{error}");

        File::create(&state).unwrap().set_len(1 << 40).unwrap();
        let error = parsed().unwrap_err();
        assert!(matches!(error, DirectoryError::State { source: ContainerError::TooLarge { .. }, .. }), "{error}");

        fs::create_dir(dir.path().join(MEMORY_FILE)).unwrap();
        assert!(matches!(open_memory(dir.path()), Err(DirectoryError::NotAFile { .. })));
    }

    #[test]
    fn a_pipe_in_place_of_a_file_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join(MEMORY_FILE), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(open_memory(dir.path()), Err(DirectoryError::NotAFile { .. })));
    }
}
