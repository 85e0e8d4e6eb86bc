//! What a step needs before it, and with which destination it makes sense.

use super::step::{DeadlineBy, Destination, Msr, OffsetFrom, Op, SetMsrs};

/// What the steps so far have read.
#[derive(Default)]
pub(super) struct Known {
    pub destination: Destination,
    /// The steps are those of the restore.
    pub restores: bool,
    msrs: Vec<Msr>,
    /// Steps of the save that a step of the restore needs.
    clock: bool,
    lapic: bool,
    tsc_khz: bool,
    tsc_offset: bool,
    /// KVM_GET_CLOCK of the restore.
    clock_there: bool,
    /// VMClock is written.
    vmclock: bool,
}

impl Known {
    /// Nothing read yet; the steps of the save come first.
    pub(super) fn new(destination: Destination) -> Self {
        Self { destination, ..Self::default() }
    }

    /// Notes what `op` reads, and refuses one that writes what nothing has read.
    pub(super) fn check(&mut self, op: &Op) -> Result<(), String> {
        self.suits_destination(op)?;
        if self.vmclock {
            return Err("update-vmclock is the last step of a restore".to_owned());
        }
        self.vmclock = *op == Op::UpdateVmclock;
        if self.destination != Destination::Kvm {
            return Ok(());
        }
        let missing = |what: &str| Err(format!("it writes what nothing has read: the save needs {what}"));
        match op {
            Op::SetClock(_)
            | Op::SetMsrs(_)
            | Op::SetLapic
            | Op::SetTscKhz
            | Op::SetTscOffset(_)
            | Op::KvmclockCtrl
            | Op::MasterclockUpdate
                if !self.restores =>
            {
                return Err("a save only reads: a set step, or kvmclock-ctrl, belongs into restore".to_owned());
            }
            Op::GetMsrs(_) | Op::GetLapic | Op::GetTscKhz | Op::GetTscOffset if self.restores => {
                return Err("what a restore reads is not used, except by get-clock".to_owned());
            }
            Op::Wait | Op::KvmclockCtrl | Op::MasterclockUpdate | Op::PublishPage { .. } | Op::UpdateVmclock => {}
            Op::GetClock if self.restores => self.clock_there = true,
            Op::GetClock => self.clock = true,
            Op::GetMsrs(msrs) => self.msrs.extend(msrs),
            Op::GetLapic => self.lapic = true,
            Op::GetTscKhz => self.tsc_khz = true,
            Op::GetTscOffset => self.tsc_offset = true,
            Op::SetClock(_) if !self.clock => return missing("get-clock"),
            Op::SetLapic if !self.lapic => return missing("get-lapic"),
            Op::SetTscKhz if !self.tsc_khz => return missing("get-tsc-khz"),
            Op::SetMsrs(SetMsrs { msrs, .. }) => {
                if let Some(msr) = msrs.iter().find(|msr| !self.msrs.contains(msr)) {
                    let name = format!("{msr:?}").to_lowercase();
                    return Err(format!("it writes the MSR {name}, which no get-msrs of the save reads"));
                }
            }
            Op::SetTscOffset(OffsetFrom::Elapsed) if !self.tsc_offset || !self.clock => {
                return missing("get-clock and get-tsc-offset");
            }
            Op::SetTscOffset(OffsetFrom::Elapsed) if !self.clock_there => {
                return Err("from elapsed needs a get-clock before it in the restore".to_owned());
            }
            Op::SetClock(_) | Op::SetLapic | Op::SetTscKhz | Op::SetTscOffset(_) => {}
        }
        Ok(())
    }

    /// Refuses a step that makes no sense with this destination.
    fn suits_destination(&self, op: &Op) -> Result<(), String> {
        if !self.restores && self.destination != Destination::Kvm {
            return Err("this destination has no save".to_owned());
        }
        let ahead = |msrs: &SetMsrs| msrs.tsc_ahead_ns != 0 || msrs.tsc_ahead_ns_per_cpu != 0;
        let suits = match op {
            Op::Wait | Op::KvmclockCtrl => true,
            Op::SetLapic => self.destination != Destination::Same,
            Op::SetMsrs(msrs) => match self.destination {
                Destination::Kvm => !ahead(msrs) && msrs.deadline_by == DeadlineBy::Page,
                Destination::Vmm => !msrs.msrs.contains(&Msr::Kvmclock),
                Destination::Same => msrs.msrs == [Msr::Tsc],
            },
            Op::MasterclockUpdate => self.destination != Destination::Vmm,
            Op::PublishPage { .. } | Op::UpdateVmclock => self.destination == Destination::Vmm,
            _ => self.destination == Destination::Kvm,
        };
        if suits {
            Ok(())
        } else {
            Err(format!("it makes no sense with destination {:?}", self.destination).to_lowercase())
        }
    }
}
