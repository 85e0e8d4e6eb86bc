//! What goes over the connection: frames with a kind, a length, a number and a checksum.
//!
//! ```text
//! 0   kind       u32
//! 4   length     u32   bytes of the payload
//! 8   number     u32   from 0, one more for each frame in this direction
//! 12  checksum   u32   CRC-32 (IEEE) of the 12 bytes before it and the payload
//! 16  payload
//! ```
//!
//! Integers are little-endian. A frame of another kind, length, number or checksum than can be is an error, and ends
//! the connection. The first frame says which version of all this the peer speaks ([`VERSION`]).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The version of the protocol. Peers must speak the same.
pub(super) const VERSION: u32 = 1;

/// The most pages in one frame.
pub(super) const PAGES_MAX: usize = 64;
/// Bytes in a page.
pub(super) const PAGE_BYTES: usize = 4096;
/// The most bytes of a payload of pages.
const PAGES_BYTES_MAX: usize = 8 + PAGES_MAX * PAGE_BYTES;
/// The most bytes of a machine's state. Real ones are some tens of KiB.
const STATE_BYTES_MAX: usize = 16 << 20;
/// The most bytes of any other payload.
const SMALL_MAX: usize = 4096;
const HEADER_BYTES: usize = 16;

/// The kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Source: a migration begins ([`Hello`]).
    Hello = 1,
    /// Source: pages of RAM: the first one's number as u64, then their content.
    Pages = 2,
    /// Source: pages that are zero now: the first one's number and how many, each as u64.
    Zero = 3,
    /// Source: a round of pages is over.
    RoundEnd = 4,
    /// Source: the machine's state, as in a snapshot's `state` file.
    State = 5,
    /// Source: run it.
    Commit = 6,
    /// Source: the destination's `started` has arrived.
    Done = 7,
    /// Source, anew: does the destination run the guest ([`Question`])?
    Ask = 8,
    /// Destination: go on ([`Welcome`]).
    Welcome = 16,
    /// Destination: all pages of the round are in memory.
    RoundReceived = 17,
    /// Destination: the machine is built.
    Prepared = 18,
    /// Destination: why it refuses, as text.
    Refused = 19,
    /// Destination: the guest runs here.
    Started = 20,
    /// Destination: the answer to [`Kind::Ask`] ([`Answered`]).
    Answer = 21,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Hello,
        Self::Pages,
        Self::Zero,
        Self::RoundEnd,
        Self::State,
        Self::Commit,
        Self::Done,
        Self::Ask,
        Self::Welcome,
        Self::RoundReceived,
        Self::Prepared,
        Self::Refused,
        Self::Started,
        Self::Answer,
    ];

    fn most_bytes(self) -> usize {
        match self {
            Self::Pages => PAGES_BYTES_MAX,
            Self::State => STATE_BYTES_MAX,
            _ => SMALL_MAX,
        }
    }
}

/// Names a migration: random, so that an old question is not taken for one about another migration.
pub(super) type MigrationId = [u8; 16];

/// The first frame of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// The migration, in hexadecimal.
    pub id: String,
    /// Guest RAM in bytes.
    pub memory: u64,
}

/// The destination's first frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Welcome {
    /// [`VERSION`].
    pub version: u32,
}

/// A source that lost its connection asks what became of this migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Question {
    /// [`VERSION`].
    pub version: u32,
    /// The migration.
    pub id: String,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Answered {
    /// Whether the destination runs the guest; if not, it never will.
    pub runs: bool,
}

/// A frame, without its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub kind: Kind,
    pub payload: Vec<u8>,
}

/// Why a frame cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The connection has ended, or is silent for too long.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no frame.
    #[error("frame {number}: {why}")]
    Bad {
        /// Its number.
        number: u32,
        /// What is wrong.
        why: String,
    },
}

/// Writes frames, and counts the bytes.
pub(super) struct Writer<W> {
    to: W,
    number: u32,
    pub bytes: u64,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, number: 0, bytes: 0 }
    }

    /// Writes a frame whose payload is `parts`, one behind the other.
    pub(super) fn frame(&mut self, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length > kind.most_bytes() {
            return Err(io::Error::other(format!("a frame {kind:?} of {length} bytes is too long")));
        }
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let mut header = Vec::with_capacity(HEADER_BYTES);
        for word in [kind as u32, length, self.number] {
            header.extend(word.to_le_bytes());
        }
        let mut sum = crc32fast::Hasher::new();
        sum.update(&header);
        parts.iter().for_each(|part| sum.update(part));
        header.extend(sum.finalize().to_le_bytes());
        self.to.write_all(&header)?;
        for part in parts {
            self.to.write_all(part)?;
        }
        self.number = self.number.wrapping_add(1);
        self.bytes = self.bytes.saturating_add(u64::from(length)).saturating_add(HEADER_BYTES as u64);
        Ok(())
    }

    /// Writes a frame whose payload is JSON, and all that is buffered.
    pub(super) fn json<T: Serialize>(&mut self, kind: Kind, value: &T) -> io::Result<()> {
        let payload = serde_json::to_vec(value).map_err(io::Error::other)?;
        self.frame(kind, &[&payload])?;
        self.flush()
    }

    /// Writes an empty frame, and all that is buffered.
    pub(super) fn signal(&mut self, kind: Kind) -> io::Result<()> {
        self.frame(kind, &[])?;
        self.flush()
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Reads frames.
pub(super) struct Reader<R> {
    from: R,
    number: u32,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, number: 0 }
    }

    /// Reads the next frame. Its memory is bounded by what its kind may have.
    pub(super) fn frame(&mut self) -> Result<Frame, FrameError> {
        let mut header = [0; HEADER_BYTES];
        self.from.read_exact(&mut header)?;
        let number = self.number;
        let bad = |why: String| FrameError::Bad { number, why };
        let (words, _) = header.as_chunks::<4>();
        let [kind, length, its_number, checksum] = words else { return Err(bad("no header".to_owned())) };
        let [kind, length, its_number, checksum] = [kind, length, its_number, checksum].map(|w| u32::from_le_bytes(*w));
        let found = Kind::ALL.into_iter().find(|known| *known as u32 == kind);
        let kind = found.ok_or_else(|| bad(format!("there is no kind {kind}")))?;
        if its_number != number {
            return Err(bad(format!("it has the number {its_number}")));
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > kind.most_bytes() {
            return Err(bad(format!("{length} bytes are too many for {kind:?}")));
        }
        let mut payload = vec![0; length];
        self.from.read_exact(&mut payload)?;
        let mut sum = crc32fast::Hasher::new();
        sum.update(header.get(..12).unwrap_or_default());
        sum.update(&payload);
        if sum.finalize() != checksum {
            return Err(bad("its checksum differs: it was changed on the way".to_owned()));
        }
        self.number = number.wrapping_add(1);
        Ok(Frame { kind, payload })
    }

    /// The value of a frame's JSON.
    pub(super) fn json<T: DeserializeOwned>(&self, frame: &Frame) -> Result<T, FrameError> {
        let Frame { kind, payload } = frame;
        let number = self.number.wrapping_sub(1);
        serde_json::from_slice(payload)
            .map_err(|error| FrameError::Bad { number, why: format!("{kind:?} is not usable: {error}") })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        for Frame { kind, payload } in frames {
            let (a, b) = payload.split_at(payload.len() / 2);
            writer.frame(*kind, &[a, b]).unwrap();
        }
        let counted = writer.bytes;
        assert_eq!(u64::try_from(bytes.len()), Ok(counted));
        bytes
    }

    fn frames() -> Vec<Frame> {
        let frame = |kind, payload: &[u8]| Frame { kind, payload: payload.to_vec() };
        vec![frame(Kind::Hello, b"{}"), frame(Kind::Pages, &[7; 8 + 4096]), frame(Kind::Commit, b"")]
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = written(&frames());
        let mut reader = Reader::new(bytes.as_slice());
        for frame in frames() {
            assert_eq!(reader.frame().unwrap(), frame);
        }
        assert!(matches!(reader.frame(), Err(FrameError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof));
    }

    // Catches: a length that is believed and allocated.
    #[test]
    fn a_long_frame_is_refused_before_it_is_read() {
        let mut bytes = written(&frames());
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = Reader::new(bytes.as_slice()).frame().unwrap_err().to_string();
        assert!(error.contains("too many for Hello"), "{error}");
        let too_long = vec![0; SMALL_MAX + 1];
        assert!(Writer::new(Vec::new()).frame(Kind::Hello, &[&too_long]).is_err());
    }

    // Catches: frames that are taken in another order, or one that was lost.
    #[test]
    fn a_frame_that_is_missing_is_noticed() {
        let bytes = written(&frames());
        let first = HEADER_BYTES + 2;
        let error = Reader::new(&bytes[first..]).frame().unwrap_err().to_string();
        assert!(error.contains("frame 0: it has the number 1"), "{error}");
    }

    proptest! {
        // Catches: a changed bit that goes unnoticed.
        #[test]
        fn every_changed_bit_is_noticed(at in 0usize..(3 * 16 + 2 + 8 + 4096), bit in 0u8..8) {
            let mut bytes = written(&frames());
            bytes[at] ^= 1 << bit;
            let mut reader = Reader::new(bytes.as_slice());
            let read: Result<Vec<_>, _> = frames().iter().map(|_| reader.frame()).collect();
            prop_assert!(read.is_err());
        }

        // Catches: a panic on what a hostile peer sends.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(bytes.as_slice());
            while reader.frame().is_ok() {}
        }
    }
}
