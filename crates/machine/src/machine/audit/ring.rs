//! Tick rings in guest RAM: finds them, and checks which of their bytes are records.

use guest_abi::report::{CAPACITY, HEADER_BYTES, Header, LAYOUT, MAGIC, RECORD_BYTES, RING_BYTES, Record};
use vm_memory::{Bytes, GuestAddress};

use crate::mem::ram::GuestRam;

/// The result of [`find_ring`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingFound {
    /// The guest has not written a header yet, or there is no RAM.
    Nothing,
    /// A ring that this build reads.
    Ring(Header),
    /// Data that is no ring of this build's layout.
    Other(OtherRing),
}

/// A ring that this build does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OtherRing {
    /// Another magic number.
    #[error("it begins with {0:02x?}, a ring with {expected:02x?} (\"TICKRING\")", expected = MAGIC.to_le_bytes())]
    Magic([u8; 8]),
    /// Another layout.
    #[error(
        "it has layout {layout} and {capacity} records; this vmm reads layout {LAYOUT}, whose rings have {CAPACITY} \
         records of {RECORD_BYTES} bytes"
    )]
    Layout {
        /// Its layout.
        layout: u32,
        /// Its records.
        capacity: u32,
    },
}

/// The address of CPU number `cpu`'s ring, if CPU 0's is at `first`.
pub(crate) fn address(first: u64, cpu: usize) -> Option<u64> {
    first.checked_add(u64::try_from(RING_BYTES.checked_mul(cpu)?).ok()?)
}

/// Reads the header at `ring`, where CPU number `cpu` should have its ring.
pub(crate) fn find_ring(memory: &GuestRam, ring: u64, cpu: usize) -> RingFound {
    let mut bytes = [0; HEADER_BYTES];
    if memory.read_slice(&mut bytes, GuestAddress(ring)).is_err() {
        return RingFound::Nothing;
    }
    let header = Header::from_bytes(&bytes);
    match header {
        // The guest stores the magic number last.
        Header { magic: 0, .. } => RingFound::Nothing,
        Header { magic: MAGIC, layout: LAYOUT, capacity: CAPACITY, .. } => RingFound::Ring(header),
        Header { magic: MAGIC, layout, capacity, .. } => RingFound::Other(OtherRing::Layout { layout, capacity }),
        Header { magic, .. } if cpu == 0 => RingFound::Other(OtherRing::Magic(magic.to_le_bytes())),
        // The guest's section has fewer rings than the machine has CPUs, and ends before this one.
        Header { .. } => RingFound::Nothing,
    }
}

/// The header at `ring`, if it is one that this build reads.
pub(crate) fn header(memory: &GuestRam, ring: u64) -> Option<Header> {
    match find_ring(memory, ring, 0) {
        RingFound::Ring(header) => Some(header),
        RingFound::Nothing | RingFound::Other(_) => None,
    }
}

/// Record number `number` of the ring at `ring`.
pub(crate) fn record(memory: &GuestRam, ring: u64, number: u64) -> Option<Record> {
    let slot = number % u64::from(CAPACITY);
    let record_bytes = u64::try_from(RECORD_BYTES).ok()?;
    let offset = u64::try_from(HEADER_BYTES).ok()?.checked_add(slot.checked_mul(record_bytes)?)?;
    let mut bytes = [0; RECORD_BYTES];
    memory.read_slice(&mut bytes, GuestAddress(ring.checked_add(offset)?)).ok()?;
    Some(Record::from_bytes(&bytes))
}

/// Whether `record` can be record number `number` of the ring with this header, after a tick numbered less than
/// `next_seq`. If the guest's records have another size, other fields' bytes are in these places.
pub(crate) fn is_record(record: &Record, number: u64, header: &Header, next_seq: Option<u64>) -> bool {
    // Ticks are numbered from 0 and rise, so that a tick's number is no less than its record's.
    record.seq >= number.max(next_seq.unwrap_or(0)) && record.cpu == header.cpu && record.reserved == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(parts: &[(u64, &[u8])]) -> GuestRam {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x4_0000)]).unwrap();
        for (at, bytes) in parts {
            memory.write_slice(bytes, GuestAddress(*at)).unwrap();
        }
        memory
    }

    fn header_bytes(magic: u64, layout: u32, capacity: u32) -> Vec<u8> {
        [magic.to_le_bytes(), (u64::from(capacity) << 32 | u64::from(layout)).to_le_bytes()].concat()
    }

    #[test]
    fn another_layout_or_magic_is_reported_with_what_was_found() {
        let layout = memory(&[(0x1000, &header_bytes(MAGIC, 1, 512))]);
        let RingFound::Other(other) = find_ring(&layout, 0x1000, 0) else { panic!() };
        assert_eq!(other, OtherRing::Layout { layout: 1, capacity: 512 });
        assert!(other.to_string().contains("layout 1 and 512 records"), "{other}");
        let magic = memory(&[(0x1000, &header_bytes(u64::from_le_bytes(*b"RINGTICK"), LAYOUT, CAPACITY))]);
        assert_eq!(find_ring(&magic, 0x1000, 0), RingFound::Other(OtherRing::Magic(*b"RINGTICK")));
        assert_eq!(find_ring(&magic, 0x1000, 1), RingFound::Nothing);
        assert_eq!(find_ring(&magic, 0x2000, 0), RingFound::Nothing);
        assert_eq!(find_ring(&magic, u64::MAX - 8, 0), RingFound::Nothing);
        let right = memory(&[(0x1000, &header_bytes(MAGIC, LAYOUT, CAPACITY))]);
        assert!(matches!(find_ring(&right, 0x1000, 0), RingFound::Ring(_)));
    }

    /// `count` records of a guest whose records are `stride` bytes long.
    fn ring(stride: usize, count: u64) -> GuestRam {
        let mut parts = Vec::new();
        for seq in 0..count {
            let at = 10_000_000 * (seq + 1);
            let words = [seq, at, at - 9_000_000, at + 5, at + 5, at * 2, at * 2, 2, 0];
            let bytes = words.map(u64::to_le_bytes).concat();
            parts.push((0x1000 + 128 + seq * stride as u64, bytes[..stride.min(72)].to_vec()));
        }
        let parts: Vec<(u64, &[u8])> = parts.iter().map(|(at, bytes)| (*at, bytes.as_slice())).collect();
        memory(&parts)
    }

    #[test]
    fn records_at_another_distance_are_none() {
        let header = Header::default();
        for stride in [56, 64, 68, 76, 80, 96, 128] {
            let memory = ring(stride, 200);
            let read = |number| record(&memory, 0x1000, number).unwrap();
            // The first record is at the right place. That the second is impossible is found by `RecordCheck`.
            let good = (0..200).take_while(|n| is_record(&read(*n), *n, &header, Some(*n))).count();
            assert!(good <= 2, "stride {stride}: {good}");
        }
        let memory = ring(72, 200);
        assert!((0..200).all(|n| is_record(&record(&memory, 0x1000, n).unwrap(), n, &header, Some(n))));
    }
}
