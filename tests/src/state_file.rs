//! A snapshot's `state` file, changed by somebody who gets its checksums right (docs/snapshot-format.md).

use std::{fs, path::Path};

use crc::{CRC_32_ISO_HDLC, Crc};
use serde_json::Value;

const PREAMBLE: usize = 16;
const NAME: usize = 24;

/// Puts `change`'s answer in place of the payload of each section, or takes the section away where it gives none.
///
/// # Panics
/// If the file is no `state` file.
pub fn change_sections(path: &Path, mut change: impl FnMut(&str, Value) -> Option<Value>) {
    let file = fs::read(path).expect("a state file");
    let (preamble, mut rest) = file.split_at(PREAMBLE);
    let mut sections = Vec::new();
    while let Some((name, after)) = rest.split_at_checked(NAME) {
        let (version, after) = after.split_first_chunk::<4>().expect("a version");
        let (length, after) = after.split_first_chunk::<8>().expect("a length");
        let (_, after) = after.split_first_chunk::<4>().expect("a checksum");
        let (payload, after) = after.split_at(usize::try_from(u64::from_le_bytes(*length)).expect("a length"));
        rest = after;
        let word = std::str::from_utf8(name).expect("a name").trim_end_matches('\0');
        let Some(payload) = change(word, serde_json::from_slice(payload).expect("JSON")) else { continue };
        let payload = serde_json::to_vec(&payload).expect("JSON");
        let length = u64::try_from(payload.len()).expect("a length").to_le_bytes();
        let head = [name, &version[..], &length[..]].concat();
        let sum = Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(&[head.as_slice(), &payload].concat());
        sections.push([head, sum.to_le_bytes().to_vec(), payload].concat());
    }
    let (magic, _) = preamble.split_at(PREAMBLE - 4);
    let count = u32::try_from(sections.len()).expect("a count").to_le_bytes();
    fs::write(path, [magic, &count[..], &sections.concat()].concat()).expect("a state file");
}
