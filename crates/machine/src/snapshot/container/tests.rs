use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Clock {
    tsc: u64,
    wide: u128,
    label: String,
}

fn clock() -> Clock {
    Clock { tsc: u64::MAX, wide: u128::MAX, label: "ü \"quoted\"".to_owned() }
}

fn small() -> Vec<u8> {
    let mut writer = StateWriter::new();
    writer.section("clock", 3, &clock()).unwrap();
    writer.section("vcpu-0", 1, &[1u8, 2, 3]).unwrap();
    writer.finish()
}

/// Reads a file as a restore would: whole, every section, nothing left.
fn read(file: &[u8]) -> Result<(Clock, Vec<u8>), ContainerError> {
    let mut reader = StateReader::parse(file)?;
    let out = (reader.take("clock", 3)?, reader.take("vcpu-0", 1)?);
    reader.finish()?;
    Ok(out)
}

/// A section with a right checksum, for files that the writer would not make.
fn raw_section(name: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut field = [0; NAME_BYTES];
    field[..name.len()].copy_from_slice(name);
    let length = widen(payload.len());
    let mut out = field.to_vec();
    out.extend(1u32.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(checksum(&field, 1, length, payload).to_le_bytes());
    out.extend(payload);
    out
}

fn raw_file(sections: &[Vec<u8>]) -> Vec<u8> {
    let count = u32::try_from(sections.len()).unwrap();
    [&MAGIC[..], &FORMAT_VERSION.to_le_bytes(), &count.to_le_bytes(), &sections.concat()].concat()
}

#[test]
fn round_trip() {
    assert_eq!(read(&small()).unwrap(), (clock(), vec![1, 2, 3]));
    StateReader::parse(&StateWriter::new().finish()).unwrap().finish().unwrap();
}

#[test]
fn every_edited_byte_is_an_error() {
    let good = small();
    for at in 0..good.len() {
        for mask in [0x01, 0x20, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= mask;
            // The parser itself must refuse it, so that no payload of a damaged file reaches a state type.
            assert!(StateReader::parse(&bad).is_err(), "byte {at} ^ {mask:#x} was accepted");
        }
    }
}

#[test]
fn every_truncation_is_an_error() {
    let good = small();
    for length in 0..good.len() {
        assert!(StateReader::parse(&good[..length]).is_err(), "{length} bytes were accepted");
    }
}

#[test]
fn bytes_after_the_last_section_are_an_error() {
    let bad = [small(), vec![0]].concat();
    assert!(matches!(read(&bad), Err(ContainerError::Trailing { bytes: 1 })));
}

#[test]
fn an_unknown_missing_or_duplicate_section_is_named() {
    let mut reader = StateReader::parse(&small()).unwrap();
    reader.take::<Clock>("clock", 3).unwrap();
    let missing = reader.take::<Clock>("clock", 3).unwrap_err();
    assert_eq!(missing.to_string(), "section `clock` is missing");
    assert!(reader.finish().unwrap_err().to_string().contains("`vcpu-0`"));

    let twice = raw_file(&[raw_section(b"a", b"1"), raw_section(b"a", b"1")]);
    assert_eq!(StateReader::parse(&twice).unwrap_err().to_string(), "section `a` is there twice");
    let mut writer = StateWriter::new();
    writer.section("a", 1, &1).unwrap();
    assert!(matches!(writer.section("a", 1, &1), Err(ContainerError::Duplicate { .. })));
}

#[test]
fn another_version_says_which_one_is_supported() {
    let mut reader = StateReader::parse(&small()).unwrap();
    let error = reader.take::<Clock>("clock", 4).unwrap_err().to_string();
    assert!(error.contains("version 3") && error.contains("reads version 4"), "{error}");

    let mut other = small();
    other[8..12].copy_from_slice(&7u32.to_le_bytes());
    let error = StateReader::parse(&other).unwrap_err().to_string();
    assert!(error.contains("format 7") && error.contains("reads format 1"), "{error}");
}

#[test]
fn a_payload_with_an_unknown_field_or_trailing_json_is_an_error() {
    for payload in [&br#"{"tsc":1,"wide":2,"label":"","extra":0}"#[..], br#"{"tsc":1,"wide":2,"label":""} 1"#, b""] {
        let mut reader = StateReader::parse(&raw_file(&[raw_section(b"clock", payload)])).unwrap();
        assert!(matches!(reader.take::<Clock>("clock", 1), Err(ContainerError::Decode { .. })));
    }
}

#[test]
fn a_length_beyond_the_file_is_an_error_and_no_allocation() {
    for length in [4u64, 1 << 22, 1 << 40, u64::MAX] {
        let mut section = raw_section(b"a", b"1");
        section[28..36].copy_from_slice(&length.to_le_bytes());
        let error = StateReader::parse(&raw_file(&[section])).unwrap_err();
        let expected = if length <= widen(MAX_SECTION_BYTES) {
            matches!(error, ContainerError::Truncated { .. })
        } else {
            matches!(error, ContainerError::SectionTooLarge { .. })
        };
        assert!(expected, "{length}: {error}");
    }
    let mut count = small();
    count[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(StateReader::parse(&count), Err(ContainerError::TooManySections { .. })));
    assert!(matches!(StateReader::parse(&vec![0; MAX_STATE_BYTES + 1]), Err(ContainerError::TooLarge { .. })));
}

#[test]
fn a_name_is_lower_case_ascii_padded_with_zeros() {
    for name in ["", "Upper", "with space", "a-name-that-is-too-long-to-fit", "nul\0"] {
        assert!(matches!(StateWriter::new().section(name, 1, &1), Err(ContainerError::UnusableName { .. })));
    }
    StateWriter::new().section("exactly-24-bytes-long-ok", 1, &1).unwrap();
    for name in [&b""[..], b"a\0b", b"A", b"\xff"] {
        let file = raw_file(&[raw_section(name, b"1")]);
        assert!(matches!(StateReader::parse(&file), Err(ContainerError::BadName { index: 0 })));
    }
}

#[test]
fn show_lists_sections_in_order() {
    let listed = StateReader::parse(&small()).unwrap().sections();
    let heads: Vec<_> = listed.iter().map(|s| (s.name.as_str(), s.version)).collect();
    assert_eq!(heads, [("clock", 3), ("vcpu-0", 1)]);
    assert_eq!(listed[1].bytes, 7);
}

// Catches: JSON that takes gigabytes of memory when it is parsed.
#[test]
fn a_section_that_is_too_large_is_neither_written_nor_read() {
    let fits = |name: &'static str, bytes: usize| {
        let text = "x".repeat(bytes - 2);
        let written = StateWriter::new().section(name, 1, &text);
        let read = StateReader::parse(&raw_file(&[raw_section(name.as_bytes(), format!("\"{text}\"").as_bytes())]));
        let too_large = |error: ContainerError| matches!(error, ContainerError::SectionTooLarge { bytes: b, .. } if b == widen(bytes));
        let written = written.map_err(|error| assert!(too_large(error))).is_ok();
        assert_eq!(read.map_err(|error| assert!(too_large(error))).is_ok(), written);
        written
    };
    assert!(fits("cpus", MAX_SECTION_BYTES) && !fits("cpus", MAX_SECTION_BYTES + 1));
    assert!(fits("base", MAX_LARGE_SECTION_BYTES) && !fits("base", MAX_LARGE_SECTION_BYTES + 1));
    // A length above the limit is refused before it is compared with the file's size.
    let mut file = raw_file(&[raw_section(b"cpus", b"1")]);
    file[PREAMBLE_BYTES + NAME_BYTES + 4..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(StateReader::parse(&file), Err(ContainerError::SectionTooLarge { bytes: u64::MAX, .. })));
}

proptest! {
    #[test]
    fn random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(StateReader::parse(&bytes).is_err());
    }

    /// Random bytes behind a right preamble and with right checksums reach the deeper checks.
    #[test]
    fn random_sections_do_not_panic(
        name in proptest::collection::vec(any::<u8>(), 0..=NAME_BYTES),
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        tail in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut file = raw_file(&[raw_section(&name, &payload)]);
        file.extend(tail);
        if let Ok(mut reader) = StateReader::parse(&file) {
            let _ = reader.sections();
            let _ = reader.take::<Clock>("clock", 1);
        }
    }
}
