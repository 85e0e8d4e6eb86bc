//! Parts of `scripts/linux` that decide something without a kernel: the initial RAM disk, and what its table must show.

use std::{fs, path::Path, process::Command};

use vm_tests::require;

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Runs commands after one of the files in `scripts/lib`, with a folder for what they write. Their exit status, or why
/// they cannot run.
fn run(library: &str, commands: &str, folder: &Path) -> Result<Option<i32>, String> {
    let library = repository().join("scripts/lib").join(library);
    if !library.exists() {
        return Err(format!("{} is not there", library.display()));
    }
    let status = Command::new("bash")
        .args(["-c", "set -euo pipefail; die() { echo \"$2\" >&2; exit \"$1\"; }; . \"$1\"; eval \"$2\"", "bash"])
        .arg(library)
        .arg(commands)
        .env("top", repository())
        .env("folder", folder)
        .env("work", folder)
        .status()
        .map_err(|error| format!("there is no bash: {error}"))?;
    match status.code() {
        Some(3) => Err("a static program cannot be compiled here (above)".into()),
        code => Ok(code),
    }
}

/// One entry of a cpio archive.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    mode: u32,
    /// Major and minor number of a device file.
    device: (u32, u32),
    size: usize,
}

/// The entries of an archive in the format "newc", up to its end mark, and the bytes of the last file with contents.
fn entries(archive: &[u8]) -> (Vec<Entry>, &[u8]) {
    let (mut entries, mut contents, mut at) = (Vec::new(), &archive[..0], 0);
    loop {
        let header = std::str::from_utf8(&archive[at..at + 110]).unwrap();
        assert_eq!(&header[..6], "070701", "an entry begins at {at}");
        let field = |number: usize| u32::from_str_radix(&header[6 + 8 * number..14 + 8 * number], 16).unwrap();
        let (size, name_size) = (usize::try_from(field(6)).unwrap(), usize::try_from(field(11)).unwrap());
        let name = std::str::from_utf8(&archive[at + 110..at + 109 + name_size]).unwrap();
        assert_eq!(archive[at + 109 + name_size], 0, "the name ends where its length says");
        if name == "TRAILER!!!" {
            return (entries, contents);
        }
        let start = (at + 110 + name_size).next_multiple_of(4);
        if size > 0 {
            contents = &archive[start..start + size];
        }
        at = (start + size).next_multiple_of(4);
        entries.push(Entry { name: name.to_owned(), mode: field(1), device: (field(9), field(10)), size });
    }
}

// Catches: a wrong length or padding, after which Linux reads no further entry; a program that is not executable or not
// whole; a console that is no device.
#[test]
fn the_initial_ram_disk_is_an_archive_as_linux_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let code = require!(run("linux-initrd", "build_initrd", folder.path()));
    assert_eq!(code, Some(0));
    let archive = fs::read(folder.path().join("initrd")).unwrap();
    let program = fs::read(folder.path().join("init")).unwrap();
    let (entries, contents) = entries(&archive);
    let entry = |name: &str, mode, device, size| Entry { name: name.into(), mode, device, size };
    assert_eq!(
        entries,
        [
            entry("dev", 0o040_755, (0, 0), 0),
            entry("dev/console", 0o020_600, (5, 1), 0),
            entry("proc", 0o040_755, (0, 0), 0),
            entry("sys", 0o040_755, (0, 0), 0),
            entry("init", 0o100_755, (0, 0), program.len()),
        ]
    );
    assert!(contents == program);
}

/// A line of linux-runs' output becomes a line of the table.
const TABLE: &str = "
row() { printf '%s\\trescale\\t%s\\t%s\\t%s\\t0\\t0\\n' \"$2\" \"$3\" \"$4\" \"$5\" | table_rows \"$1\"; }
table() { # length of a sleep at 1.0 GHz, interrupts at 4.0 GHz, length with the clock event that is right
    row 'lapic-deadline; kvm-clock' 2000000 100.0 69 42
    row 'lapic-deadline; kvm-clock' 1000000 \"$1\" 99470 41
    row 'lapic-deadline; kvm-clock' 4000000 100.0 69 \"$2\"
    row kvmclock_event=exact,recheck 2000000 100.0 69 42
    row kvmclock_event=exact,recheck 1000000 \"$3\" 69 42
    row kvmclock_event=exact,recheck 4000000 100.0 69 42
} >\"$work/rows\"
";

// Catches: a check that looks at the wrong column, so that the demonstration passes whatever it shows.
#[test]
fn a_table_without_the_failure_or_the_cure_fails_the_demonstration() {
    let folder = tempfile::tempdir().unwrap();
    for (values, rows, passes) in [
        ("187.0 427 100.0", 6, true),
        ("100.0 427 100.0", 6, false),
        ("187.0 42 100.0", 6, false),
        ("187.0 427 187.0", 6, false),
        ("187.0 427 100.0", 12, false),
    ] {
        let commands = format!("{TABLE} table {values}; check_rows {rows}");
        let code = require!(run("linux-demo", &commands, folder.path()));
        assert_eq!(code, Some(if passes { 0 } else { 1 }), "{values}, {rows} rows");
    }
}
