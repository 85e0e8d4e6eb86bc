//! The `state` file: named, versioned, checksummed sections of JSON.
//!
//! ```text
//! 0   magic            8 bytes   "VMMSNAP\0"
//! 8   format version   u32
//! 12  section count    u32
//! then, for each section:
//! 0   name             24 bytes  lower-case ASCII, digits and '-', padded with NUL
//! 24  section version  u32
//! 28  payload length   u64       bytes
//! 36  checksum         u32       CRC-32 (IEEE) of the 36 bytes before it and the payload
//! 40  payload                    JSON of one state type
//! ```
//!
//! Integers are little-endian. Magic and version have fixed offsets, so that a reader can refuse a file of another
//! version before it parses anything else. The payload is JSON because people read snapshots, too. The headers around
//! it are binary, so that the checksum can be checked before any JSON is parsed. Every byte of the file is compared or
//! covered by a checksum, so that every change is detected.

mod error;
#[cfg(test)]
mod tests;

use crc::{CRC_32_ISO_HDLC, Crc, Table};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use error::ContainerError;

/// The first bytes of a `state` file.
pub const MAGIC: [u8; 8] = *b"VMMSNAP\0";
/// The version of the layout around the sections, not of any section.
pub const FORMAT_VERSION: u32 = 1;
/// The largest `state` file that is written or read, in bytes. Real ones are some tens of KiB.
pub const MAX_STATE_BYTES: usize = 64 << 20;
/// The largest section, except `LARGE_SECTION`, in bytes. Parsed, JSON can take up to ten times as much memory.
pub const MAX_SECTION_BYTES: usize = 4 << 20;
/// The section that may be larger, because it lists pages of RAM.
const LARGE_SECTION: &str = "base";
/// The largest size of [`LARGE_SECTION`], in bytes.
const MAX_LARGE_SECTION_BYTES: usize = 32 << 20;
/// The most sections that a `state` file may hold.
pub const MAX_SECTIONS: u32 = 256;
/// The width of a section's name, in bytes.
pub const NAME_BYTES: usize = 24;

/// CRC-32 with a table. The crate crc32fast first checks which instructions the CPU has. For these few KiB that takes
/// longer than it saves, because in a virtual machine each CPUID instruction is an exit.
static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISO_HDLC);

const PREAMBLE_BYTES: usize = 16;
const HEADER_BYTES: usize = NAME_BYTES + 4 + 8 + 4;

/// Builds the bytes of a `state` file.
#[derive(Debug, Default)]
pub struct StateWriter {
    names: Vec<&'static str>,
    count: u32,
    body: Vec<u8>,
}

impl StateWriter {
    /// A file without sections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one section. Sections keep the order in which they were added.
    ///
    /// # Errors
    /// The name does not fit or is in use, the value has no JSON form, or a size limit is exceeded.
    pub fn section<T>(&mut self, name: &'static str, version: u32, value: &T) -> Result<(), ContainerError>
    where
        T: Serialize + ?Sized,
    {
        let field = name_field(name).ok_or(ContainerError::UnusableName { name })?;
        if self.names.contains(&name) {
            return Err(ContainerError::Duplicate { name: name.to_owned() });
        }
        let count = self.count.saturating_add(1);
        if count > MAX_SECTIONS {
            return Err(ContainerError::TooManySections { found: count });
        }
        let payload = serde_json::to_vec(value).map_err(|source| ContainerError::Encode { name, source })?;
        let most = most_bytes(name);
        if payload.len() > most {
            let bytes = widen(payload.len());
            return Err(ContainerError::SectionTooLarge { name: name.to_owned(), bytes, most });
        }
        let bytes = [PREAMBLE_BYTES, self.body.len(), HEADER_BYTES, payload.len()].iter().sum::<usize>();
        if bytes > MAX_STATE_BYTES {
            return Err(ContainerError::TooLarge { bytes: widen(bytes) });
        }
        let length = widen(payload.len());
        self.body.extend_from_slice(&field);
        self.body.extend_from_slice(&version.to_le_bytes());
        self.body.extend_from_slice(&length.to_le_bytes());
        self.body.extend_from_slice(&checksum(&field, version, length, &payload).to_le_bytes());
        self.body.extend_from_slice(&payload);
        self.names.push(name);
        self.count = count;
        Ok(())
    }

    /// The whole file.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut file = Vec::with_capacity(PREAMBLE_BYTES + self.body.len());
        file.extend_from_slice(&MAGIC);
        file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        file.extend_from_slice(&self.count.to_le_bytes());
        file.extend_from_slice(&self.body);
        file
    }
}

/// One section as `vmm snapshot show` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionInfo {
    /// The section's name.
    pub name: String,
    /// The version of its state type.
    pub version: u32,
    /// The size of its payload, in bytes.
    pub bytes: usize,
}

/// The largest size of the section `name`, in bytes.
fn most_bytes(name: &str) -> usize {
    if name == LARGE_SECTION { MAX_LARGE_SECTION_BYTES } else { MAX_SECTION_BYTES }
}

#[derive(Clone, Debug)]
struct Section {
    name: String,
    version: u32,
    payload: Vec<u8>,
}

/// The sections of a `state` file, whose checksums have been checked. Each can be taken once.
#[derive(Clone, Debug)]
pub struct StateReader {
    sections: Vec<Section>,
}

impl StateReader {
    /// Checks a whole file and splits it into sections. No payload is parsed yet.
    ///
    /// # Errors
    /// Anything but a file that [`StateWriter::finish`] made, unchanged.
    pub fn parse(file: &[u8]) -> Result<Self, ContainerError> {
        if file.len() > MAX_STATE_BYTES {
            return Err(ContainerError::TooLarge { bytes: widen(file.len()) });
        }
        let mut rest = file;
        // A file cut within the magic is reported as what it looks like: not a snapshot.
        let magic: [u8; 8] = *rest.split_off_chunk().ok_or(ContainerError::NotASnapshot)?;
        if magic != MAGIC {
            return Err(ContainerError::NotASnapshot);
        }
        let format = read_u32(&mut rest, "the format version")?;
        if format != FORMAT_VERSION {
            return Err(ContainerError::Format { found: format });
        }
        let count = read_u32(&mut rest, "the section count")?;
        if count > MAX_SECTIONS {
            return Err(ContainerError::TooManySections { found: count });
        }
        let mut sections: Vec<Section> = Vec::new();
        for index in 0..count {
            let section = read_section(&mut rest, index)?;
            if sections.iter().any(|other| other.name == section.name) {
                return Err(ContainerError::Duplicate { name: section.name });
            }
            sections.push(section);
        }
        if rest.is_empty() { Ok(Self { sections }) } else { Err(ContainerError::Trailing { bytes: rest.len() }) }
    }

    /// Takes a section out and decodes it. The state type should deny unknown fields. Bytes after the JSON value are an
    /// error.
    ///
    /// # Errors
    /// The section is missing, has another version, or is not the JSON of a `T`.
    pub fn take<T: DeserializeOwned>(&mut self, name: &'static str, version: u32) -> Result<T, ContainerError> {
        let at = self.sections.iter().position(|s| s.name == name).ok_or(ContainerError::Missing { name })?;
        let section = self.sections.remove(at);
        if section.version != version {
            let (name, found) = (section.name, section.version);
            return Err(ContainerError::SectionVersion { name, found, supported: version });
        }
        serde_json::from_slice(&section.payload).map_err(|source| ContainerError::Decode { name: section.name, source })
    }

    /// Takes a section out if it is there, and decodes it as [`Self::take`] does.
    ///
    /// # Errors
    /// The section has another version, or is not the JSON of a `T`.
    pub fn take_optional<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        version: u32,
    ) -> Result<Option<T>, ContainerError> {
        if self.sections.iter().any(|section| section.name == name) {
            self.take(name, version).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Ends the reading, and checks that every section was taken.
    ///
    /// # Errors
    /// [`ContainerError::Unknown`] names the sections that are left.
    pub fn finish(self) -> Result<(), ContainerError> {
        if self.sections.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = self.sections.into_iter().map(|section| section.name).collect();
        Err(ContainerError::Unknown { names: names.join(", ") })
    }

    /// Lists the sections that were not taken yet. None is taken or parsed by this.
    #[must_use]
    pub fn sections(&self) -> Vec<SectionInfo> {
        let info = |Section { name, version, payload }: &Section| SectionInfo {
            name: name.clone(),
            version: *version,
            bytes: payload.len(),
        };
        self.sections.iter().map(info).collect()
    }
}

fn read_section(rest: &mut &[u8], index: u32) -> Result<Section, ContainerError> {
    let what = || format!("the header of section {index}");
    let field: [u8; NAME_BYTES] = *rest.split_off_chunk().ok_or_else(|| truncated(what(), NAME_BYTES, rest))?;
    let name = field_name(&field).ok_or(ContainerError::BadName { index })?;
    let version = read_u32(rest, &what())?;
    let length = u64::from_le_bytes(*rest.split_off_chunk().ok_or_else(|| truncated(what(), 8, rest))?);
    let stored = read_u32(rest, &what())?;
    let most = most_bytes(&name);
    if length > widen(most) {
        return Err(ContainerError::SectionTooLarge { name, bytes: length, most });
    }
    // The length is compared with what is left of the file before memory is allocated for it, because it may be wrong.
    let payload = usize::try_from(length).ok().and_then(|length| rest.split_off(..length)).ok_or_else(|| {
        ContainerError::Truncated { what: format!("section `{name}`"), needed: length, left: widen(rest.len()) }
    })?;
    if checksum(&field, version, length, payload) != stored {
        return Err(ContainerError::Damaged { name });
    }
    Ok(Section { name, version, payload: payload.to_vec() })
}

/// Slices of which the first `N` bytes can be split off.
trait SplitOffChunk<'a> {
    fn split_off_chunk<const N: usize>(&mut self) -> Option<&'a [u8; N]>;
}

impl<'a> SplitOffChunk<'a> for &'a [u8] {
    fn split_off_chunk<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (chunk, rest) = self.split_first_chunk()?;
        *self = rest;
        Some(chunk)
    }
}

fn read_u32(rest: &mut &[u8], what: &str) -> Result<u32, ContainerError> {
    let bytes = rest.split_off_chunk().ok_or_else(|| truncated(what.to_owned(), 4, rest))?;
    Ok(u32::from_le_bytes(*bytes))
}

fn truncated(what: String, needed: usize, rest: &[u8]) -> ContainerError {
    ContainerError::Truncated { what, needed: widen(needed), left: widen(rest.len()) }
}

fn checksum(field: &[u8; NAME_BYTES], version: u32, length: u64, payload: &[u8]) -> u32 {
    let mut crc = CRC.digest();
    crc.update(field);
    crc.update(&version.to_le_bytes());
    crc.update(&length.to_le_bytes());
    crc.update(payload);
    crc.finalize()
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

fn name_field(name: &str) -> Option<[u8; NAME_BYTES]> {
    let mut field = [0; NAME_BYTES];
    field.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    is_name(name.as_bytes()).then_some(field)
}

fn field_name(field: &[u8; NAME_BYTES]) -> Option<String> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    let (name, padding) = field.split_at_checked(end)?;
    let ok = is_name(name) && padding.iter().all(|byte| *byte == 0);
    ok.then(|| String::from_utf8(name.to_vec()).ok()).flatten()
}

/// A length in memory fits 64 bits on every target that KVM has.
fn widen(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
