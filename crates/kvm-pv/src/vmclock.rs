//! VMClock: what the guest's TSC is in real time, published at boot and whenever that changed.
//!
//! Source: UAPI.13, <https://uapi-group.org/specifications/specs/vmclock/>. A TSC that stood still, jumped or goes at
//! another rate was disrupted. The guest then finds another disruption marker, and the relation that is true now.

use guest_abi::vmclock::{
    COUNTER_X86_TSC, FLAG_TAI_OFFSET_VALID, FLAG_TIME_MAXERROR_VALID, FLAG_VM_GEN_COUNTER, Instant, MAGIC,
    REGION_BYTES, SEQ_COUNT, STATUS_FREERUNNING, STATUS_SYNCHRONIZED, TIME_TAI, TIME_UTC, VMCLOCK_BYTES, VmClock,
};
use vmtime::{GuestTsc, Khz};

use crate::memory::{GuestWrite, RegistrationFault, place, replace};

/// The TSC in real time, at one instant and from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealTime {
    /// The guest's TSC at the instant.
    pub tsc: GuestTsc,
    /// Its frequency from then on.
    pub khz: Khz,
    /// UTC.
    pub utc: Instant,
    /// By how many nanoseconds `utc` may be wrong; none if nobody synchronizes the host's clock.
    pub error_ns: Option<u64>,
    /// TAI − UTC in seconds; none if the host does not know it.
    pub tai_offset_s: Option<i32>,
}

/// Why the page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The VM boots: the page begins.
    Boot,
    /// The TSC was disrupted, in a VM that is the only one to continue.
    Disrupted,
    /// The VM continues from a snapshot, from which others may continue, too.
    Restored {
        /// A number that no other of them has; none: the one after that of the snapshot.
        generation: Option<u64>,
    },
}

/// Writes the page at guest physical address `addr`, and returns it. Marker, generation and sequence count go on from
/// what is in memory, where a guest may have overwritten them; that harms no one else. So does the type of the time,
/// which must not change: TAI if the host knew it at boot. In memory without the magic number a page begins.
///
/// # Errors
/// [`RegistrationFault`] if `addr` is not a multiple of 4, or the structure is not wholly in RAM.
pub fn publish(addr: u64, now: &RealTime, cause: Cause, mem: &impl GuestWrite) -> Result<VmClock, RegistrationFault> {
    let there = read(addr, mem)?;
    let before = Some(there).filter(|page| page.magic == MAGIC && cause != Cause::Boot);
    let RealTime { tsc, khz, utc, error_ns, tai_offset_s } = *now;
    let known_before = before.filter(|page| page.flags & FLAG_TAI_OFFSET_VALID != 0).map(|page| page.tai_offset_sec);
    let tai_offset_sec = tai_offset_s.and_then(|seconds| i16::try_from(seconds).ok()).or(known_before);
    let is_tai = before.map_or(tai_offset_sec.is_some(), |page| page.time_type == TIME_TAI);
    let ahead = if is_tai { tai_offset_sec.unwrap_or(0) } else { 0 };
    let flag = |on: bool, flag| if on { flag } else { 0 };
    let (counter_period_frac_sec, counter_period_shift) = VmClock::period(khz.get());
    let (marker, generation) = before.map_or((0, 0), |page| {
        let next = page.vm_generation_counter.wrapping_add(1);
        let generation = match cause {
            Cause::Restored { generation } => generation.unwrap_or(next),
            Cause::Boot | Cause::Disrupted => page.vm_generation_counter,
        };
        (page.disruption_marker.wrapping_add(1), generation)
    });
    let page = VmClock {
        magic: MAGIC,
        size: REGION_BYTES,
        version: 1,
        counter_id: COUNTER_X86_TSC,
        time_type: if is_tai { TIME_TAI } else { TIME_UTC },
        seq_count: 0, // `replace` writes its own
        disruption_marker: marker,
        flags: FLAG_VM_GEN_COUNTER
            | flag(tai_offset_sec.is_some(), FLAG_TAI_OFFSET_VALID)
            | flag(error_ns.is_some(), FLAG_TIME_MAXERROR_VALID),
        clock_status: if error_ns.is_some() { STATUS_SYNCHRONIZED } else { STATUS_FREERUNNING },
        tai_offset_sec: tai_offset_sec.unwrap_or(0),
        counter_period_shift,
        counter_value: tsc.0,
        counter_period_frac_sec,
        time_sec: utc.sec.wrapping_add_signed(i64::from(ahead)),
        time_frac_sec: utc.frac,
        time_maxerror_nanosec: error_ns.unwrap_or(0),
        vm_generation_counter: generation,
        ..VmClock::default()
    };
    let bytes = page.to_bytes();
    let (constant, changing) = bytes.split_at(12);
    let (_, rest) = changing.split_at(4);
    let mut seq_count = before.map_or(0, |page| page.seq_count);
    let seq_count = replace(&mut seq_count, addr.wrapping_add(SEQ_COUNT), rest, mem)?;
    // Of a page that was there before, these are the same.
    mem.write(addr, constant)?;
    Ok(VmClock { seq_count, ..page })
}

/// The page as it is in memory, for a VMM that judges it.
///
/// # Errors
/// As [`publish`].
pub fn read(addr: u64, mem: &impl GuestWrite) -> Result<VmClock, RegistrationFault> {
    Ok(VmClock::from_bytes(&place::<VMCLOCK_BYTES>(addr, mem)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Recorder;

    fn now(tsc: u64, khz: u64) -> RealTime {
        let utc = Instant { sec: 1_000, frac: 1 << 63 };
        RealTime { tsc: GuestTsc(tsc), khz: Khz::new(khz).unwrap(), utc, error_ns: Some(25), tai_offset_s: Some(37) }
    }

    // Catches: a marker or generation that stays, or changes without a cause, and fields written under an even count.
    #[test]
    fn each_cause_changes_what_it_should() {
        let mem = Recorder::new(4096);
        let boot = publish(512, &now(5, 2_000_000), Cause::Boot, &mem).unwrap();
        assert_eq!(read(512, &mem), Ok(boot));
        assert_eq!((boot.seq_count, boot.disruption_marker, boot.vm_generation_counter), (2, 0, 0));
        assert_eq!((boot.magic, boot.size, boot.version), (MAGIC, 4096, 1));
        assert_eq!((boot.tai_offset_sec, boot.time_maxerror_nanosec, boot.flags), (37, 25, 0x141));
        // Written as TAI, read as UTC.
        assert_eq!((boot.time_type, boot.at(5).sec), (TIME_TAI, 1_037));
        assert_eq!(boot.utc_at(5 + 2_000_000_000).ns(), 1_001_500_000_000);
        publish(512, &now(7, 1_000_000), Cause::Disrupted, &mem).unwrap();
        publish(512, &now(8, 1_000_000), Cause::Restored { generation: None }, &mem).unwrap();
        let last = publish(512, &now(9, 1_000_000), Cause::Restored { generation: Some(77) }, &mem).unwrap();
        assert_eq!((last.seq_count, last.disruption_marker, last.vm_generation_counter), (8, 3, 77));
        assert_eq!((last.counter_value, last.utc_at(9 + 1_000_000_000).ns()), (9, 1_001_500_000_000));
        mem.check_seqlock(512 + SEQ_COUNT, VMCLOCK_BYTES - 12).unwrap();
    }

    // Catches: a type of time that changes with the host, and TAI that is lost on a host that was not told of it.
    #[test]
    fn the_type_of_the_time_stays_that_of_the_boot() {
        let mem = Recorder::new(4096);
        let told = now(5, 2_000_000);
        let untold = RealTime { tai_offset_s: None, ..told };
        let restored = Cause::Restored { generation: None };
        publish(0, &told, Cause::Boot, &mem).unwrap();
        let page = publish(0, &untold, restored, &mem).unwrap();
        assert_eq!(
            (page.time_type, page.tai_offset_sec, page.at(5).sec, page.utc_at(5).sec),
            (TIME_TAI, 37, 1_037, 1_000)
        );
        publish(0, &untold, Cause::Boot, &mem).unwrap();
        let page = publish(0, &told, restored, &mem).unwrap();
        assert_eq!(
            (page.time_type, page.tai_offset_sec, page.at(5).sec, page.utc_at(5).sec),
            (TIME_UTC, 37, 1_000, 1_000)
        );
    }

    #[test]
    fn what_is_not_known_is_not_claimed() {
        let mem = Recorder::new(4096);
        let unknown = RealTime { error_ns: None, tai_offset_s: Some(1 << 20), ..now(5, 2_000_000) };
        let page = publish(0, &unknown, Cause::Boot, &mem).unwrap();
        assert_eq!((page.flags, page.tai_offset_sec, page.time_maxerror_nanosec), (FLAG_VM_GEN_COUNTER, 0, 0));
        assert_eq!((page.clock_status, page.time_type), (STATUS_FREERUNNING, TIME_UTC));
    }

    // Catches: a page that was never written, taken for one; and a guest's bytes in it that the VMM falls over.
    #[test]
    fn a_page_that_is_none_begins_and_one_of_any_bytes_goes_on() {
        let mem = Recorder::new(4096);
        let page = publish(0, &now(5, 2_000_000), Cause::Disrupted, &mem).unwrap();
        assert_eq!((page.seq_count, page.disruption_marker), (2, 0));
        mem.write(4, &[0xff; VMCLOCK_BYTES - 4]).unwrap();
        let page = publish(0, &now(5, 2_000_000), Cause::Restored { generation: None }, &mem).unwrap();
        assert_eq!((page.seq_count % 2, page.disruption_marker, page.vm_generation_counter), (0, 0, 0));
        assert_eq!(page.utc_at(5).sec, 1_000);
    }

    #[test]
    fn a_page_outside_ram_is_refused() {
        let mem = Recorder::new(64);
        assert!(publish(0, &now(5, 2_000_000), Cause::Disrupted, &mem).is_err());
        assert_eq!(mem.stores(), 0);
    }
}
