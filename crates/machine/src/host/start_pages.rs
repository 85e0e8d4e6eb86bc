//! Releasing the program's pages that only its start needed.
//!
//! Parsing a command line and building a VM touch most of the program and of the C library; running a guest touches
//! little of either. The pages stay resident all the same, in every VMM process. A clean page of a file can be dropped
//! without loss: the kernel reads it again at the next access.

use std::fs;

/// Drops the clean pages of mapped files. A failure is ignored: it costs memory and nothing else.
pub fn release_start_pages() {
    let Ok(smaps) = fs::read_to_string("/proc/self/smaps") else { return };
    for (start, length) in clean_code(&smaps) {
        let Some(address) = std::ptr::NonNull::new(std::ptr::without_provenance_mut::<libc::c_void>(start)) else {
            continue;
        };
        // SAFETY: the range is a read-only mapping of a file without anonymous (written) pages: the same bytes are read
        // again at the next access. An error is ignored.
        unsafe { libc::madvise(address.as_ptr(), length, libc::MADV_DONTNEED) };
    }
}

/// The mappings, as (address, length), whose pages are all clean pages of a file: not writable, and without a page that
/// was written once. Relocated data has such pages, and so has code with a debugger's breakpoints.
fn clean_code(smaps: &str) -> Vec<(usize, usize)> {
    let mut clean = Vec::new();
    let mut present = None;
    for line in smaps.lines() {
        if let Some(mapping) = mapping(line) {
            present = mapping;
        } else if let Some(anonymous) = line.strip_prefix("Anonymous:") {
            clean.extend(present.take().filter(|_| anonymous.trim() == "0 kB"));
        }
    }
    clean
}

/// Parses the first line of a mapping: None for another line, Some(None) for a mapping that is not to be dropped.
fn mapping(line: &str) -> Option<Option<(usize, usize)>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let (rights, _offset, _device, inode) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let file = matches!(rights, "r-xp" | "r--p") && inode != "0";
    Some(end.checked_sub(start).map(|length| (start, length)).filter(|_| file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
1000-3000 r-xp 00001000 fe:00 326279                     /usr/bin/vmm
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-4000 r-xp 00003000 fe:00 326279                     /usr/bin/with a breakpoint
Anonymous:             4 kB
4000-5000 r--p 00004000 fe:00 326279                     /usr/bin/relocated
Anonymous:             4 kB
5000-6000 rw-p 00005000 fe:00 326279                     /usr/bin/data
Anonymous:             0 kB
6000-7000 r--s 00000000 fe:00 17                         /shared
Anonymous:             0 kB
7000-8000 r--p 00000000 00:00 0                          [vvar]
Anonymous:             0 kB
8000-a000 r--p 00000000 fe:00 18                         /usr/lib/libc.so.6
AnonHugePages:         4 kB
Anonymous:             0 kB
";

    #[test]
    fn only_clean_pages_of_files_are_released() {
        assert_eq!(clean_code(SMAPS), [(0x1000, 0x2000), (0x8000, 0x2000)]);
        assert_eq!(clean_code("0-1 r-xp\nffff-0 r-xp 0 0 1\nAnonymous: 0 kB\nzz"), []);
    }

    #[test]
    fn the_program_goes_on_without_them() {
        release_start_pages();
        assert_eq!(clean_code(SMAPS).len(), 2);
    }
}
