//! A snapshot's `state` file (docs/snapshot-format.md): reads its versions, and edits it with valid checksums.

use std::{collections::BTreeMap, fs, path::Path};

use crc::{CRC_32_ISO_HDLC, Crc};
use serde_json::Value;

const MAGIC: usize = 8;
const PREAMBLE: usize = 16;
const NAME: usize = 24;

struct Section<'a> {
    /// Its bytes in the file.
    name: &'a [u8],
    version: [u8; 4],
    payload: &'a [u8],
}

impl Section<'_> {
    fn word(&self) -> &str {
        std::str::from_utf8(self.name).expect("a name").trim_end_matches('\0')
    }
}

/// The bytes before the sections, and the sections.
fn parse(file: &[u8]) -> (&[u8], Vec<Section<'_>>) {
    let (preamble, mut rest) = file.split_at(PREAMBLE);
    let mut sections = Vec::new();
    while let Some((name, after)) = rest.split_at_checked(NAME) {
        let (version, after) = after.split_first_chunk::<4>().expect("a version");
        let (length, after) = after.split_first_chunk::<8>().expect("a length");
        let (_, after) = after.split_first_chunk::<4>().expect("a checksum");
        let (payload, after) = after.split_at(usize::try_from(u64::from_le_bytes(*length)).expect("a length"));
        rest = after;
        sections.push(Section { name, version: *version, payload });
    }
    (preamble, sections)
}

/// The version of the format and that of each section, by name.
///
/// # Panics
/// If the file is no `state` file.
#[must_use]
pub fn versions(path: &Path) -> (u32, BTreeMap<String, u32>) {
    let file = fs::read(path).expect("a state file");
    let (preamble, sections) = parse(&file);
    let format = preamble[MAGIC..].first_chunk().expect("a version");
    let version = |section: &Section<'_>| (section.word().to_owned(), u32::from_le_bytes(section.version));
    (u32::from_le_bytes(*format), sections.iter().map(version).collect())
}

/// Replaces the payload of each section with the result of `change`, or removes the section if that is `None`.
///
/// # Panics
/// If the file is no `state` file.
pub fn change_sections(path: &Path, mut change: impl FnMut(&str, Value) -> Option<Value>) {
    let file = fs::read(path).expect("a state file");
    let (preamble, sections) = parse(&file);
    let mut changed = Vec::new();
    for section in &sections {
        let payload = serde_json::from_slice(section.payload).expect("JSON");
        let Some(payload) = change(section.word(), payload) else { continue };
        let payload = serde_json::to_vec(&payload).expect("JSON");
        let length = u64::try_from(payload.len()).expect("a length").to_le_bytes();
        let head = [section.name, &section.version[..], &length[..]].concat();
        let sum = Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(&[head.as_slice(), &payload].concat());
        changed.push([head, sum.to_le_bytes().to_vec(), payload].concat());
    }
    let (magic, _) = preamble.split_at(PREAMBLE - 4);
    let count = u32::try_from(changed.len()).expect("a count").to_le_bytes();
    fs::write(path, [magic, &count[..], &changed.concat()].concat()).expect("a state file");
}
