//! The temporary directory that becomes a snapshot, and removal of those that killed saves have left.
//!
//! A save holds a lock (flock(2)) on its temporary directory. The kernel releases the lock when the process ends, also
//! when it is killed. So a temporary directory that can be locked is not in use.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use tempfile::TempDir;

use super::{DirectoryError, MEMORY_FILE, STATE_FILE, failed};

const SUFFIX: &str = ".tmp";
/// The number of random characters between prefix and suffix.
const RANDOM: usize = 6;

/// The prefix of the names of temporary directories of the snapshot `name`.
pub(super) fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    prefix
}

/// A directory under construction, which is removed when it is dropped.
pub(super) struct Temporary {
    dir: TempDir,
    /// The open directory, which is locked.
    _lock: File,
}

impl Temporary {
    /// Creates a temporary directory in `parent` that only its owner can enter, and locks it.
    ///
    /// Another save may take it for a stale one between its creation and the lock, and remove it. So it is checked
    /// after the lock that the directory still exists and is the one that was locked; if not, another one is created.
    pub(super) fn create(parent: &Path, prefix: &OsStr) -> Result<Self, DirectoryError> {
        let io = |source| failed("create a directory in", parent, source);
        loop {
            let mut builder = tempfile::Builder::new();
            builder.prefix(prefix).suffix(SUFFIX).rand_bytes(RANDOM).permissions(Permissions::from_mode(0o700));
            let dir = builder.tempdir_in(parent).map_err(io)?;
            let lock = match open(dir.path()) {
                Ok(lock) => lock,
                // Another save has removed it before it was locked.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io(error)),
            };
            // If the file system has no locks, other saves cannot lock the directory either, and do not remove it.
            let _ = lock.lock();
            let here = |meta: fs::Metadata| lock.metadata().is_ok_and(|own| own.ino() == meta.ino());
            if fs::symlink_metadata(dir.path()).is_ok_and(here) {
                return Ok(Self { dir, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The directory was renamed: it is not to be removed.
    pub(super) fn was_renamed(self) {
        let _ = self.dir.keep();
    }
}

/// Removes the temporary directories that killed saves have left in `parent`. If one cannot be removed, it stays, and
/// the save goes on.
pub(super) fn remove_stale(parent: &Path, prefix: &OsStr) {
    let is_one = |name: &OsStr| {
        let random =
            name.as_bytes().strip_prefix(prefix.as_bytes()).and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
        random.is_some_and(|random| random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric))
    };
    for entry in fs::read_dir(parent).into_iter().flatten().flatten().filter(|entry| is_one(&entry.file_name())) {
        let path = entry.path();
        match remove_if_stale(&path) {
            Ok(true) => log::debug!("removed {}, which an unfinished save had left", path.display()),
            Ok(false) => {}
            Err(error) => log::debug!("{} is left from an unfinished save: {error}", path.display()),
        }
    }
}

/// Removes the directory, unless a save is writing it, or it contains files that no save writes.
fn remove_if_stale(path: &Path) -> io::Result<bool> {
    let lock = open(path)?;
    if lock.try_lock().is_err() {
        return Ok(false);
    }
    let names: Vec<OsString> = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    if names.iter().any(|name| name != STATE_FILE && name != MEMORY_FILE) {
        return Ok(false);
    }
    names.iter().try_for_each(|name| fs::remove_file(path.join(name)))?;
    fs::remove_dir(path)?;
    Ok(true)
}

/// Opens a directory, and no link to one.
fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{SnapshotError, directory::save};

    fn write(dir: &Path) -> Result<(), SnapshotError> {
        for name in [STATE_FILE, MEMORY_FILE] {
            fs::write(dir.join(name), name).unwrap();
        }
        Ok(())
    }

    // Catches: guest memory that stays on the disk after a save was killed.
    #[test]
    fn a_save_removes_what_a_killed_save_of_the_same_place_left() {
        let parent = tempfile::tempdir().unwrap();
        let path = |name: &str| parent.path().join(name);
        let stale = [".snap.abc123.tmp", ".snap.Zz0000.tmp"];
        let others =
            [".snap.abc12.tmp", ".snap.abc1234.tmp", ".snap2.abc123.tmp", "snap.abc123.tmp", ".snap.abc_23.tmp"];
        for name in stale.iter().chain(&others) {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join(MEMORY_FILE), name).unwrap();
        }
        // Not a save's: a file, a link, and a directory with something else in it.
        fs::write(path(".snap.afile1.tmp"), "x").unwrap();
        std::os::unix::fs::symlink(path(others[0]), path(".snap.alink1.tmp")).unwrap();
        fs::create_dir(path(".snap.theirs.tmp")).unwrap();
        fs::write(path(".snap.theirs.tmp").join("notes"), "x").unwrap();
        save(&path("snap"), write).unwrap();
        for name in stale {
            assert!(!path(name).exists(), "{name}");
        }
        for name in others.iter().chain(&[".snap.afile1.tmp", ".snap.alink1.tmp", ".snap.theirs.tmp/notes"]) {
            assert!(path(name).exists(), "{name}");
        }
        assert!(path(others[0]).join(MEMORY_FILE).exists());
        assert!(path("snap").join(STATE_FILE).exists());
    }

    // Catches: a save that removes what another is still writing.
    #[test]
    fn a_directory_that_is_being_written_stays() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("snap");
        let error = save(&dir, |temporary| {
            write(temporary)?;
            save(&dir, write)?;
            assert!(temporary.join(MEMORY_FILE).exists());
            Ok::<_, SnapshotError>(())
        });
        // The inner save was renamed first.
        assert!(matches!(error, Err(SnapshotError::Directory(DirectoryError::NotEmpty { .. }))));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_save_that_fails_leaves_nothing_but_a_place_for_the_next() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("snap");
        fs::create_dir(parent.path().join(".snap.abc123.tmp")).unwrap();
        let failed = save(&dir, |_| Err(DirectoryError::NoName { dir: dir.clone() }));
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        save(&dir, write).unwrap();
    }
}
