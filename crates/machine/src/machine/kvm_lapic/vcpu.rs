//! One vCPU whose LAPIC is KVM's, and the accesses that still exit to the VMM.

use std::sync::atomic::Ordering;

use vlapic::Armed;
use vm_memory::{Bytes, GuestAddress};
use vmtime::{Due, TscAdjust};

use super::choose;
use crate::{
    boot::{cpuid::Offer, cpuid_changes::CpuidChanges},
    kvm::{Bus, GpFault, Vcpu, Vm},
    machine::{
        config::{HostEnvironment, changed_cpuid},
        cpu_index::CpuIndex,
        error::RunError,
        record::trace::Event,
        shared::Shared,
        state::{KvmCpuState, KvmLapicState},
    },
    x86::{EntryState, Leaf},
};

/// One vCPU.
pub struct KvmCpu {
    /// Its number.
    pub index: CpuIndex,
    /// KVM's vCPU.
    pub vcpu: Vcpu,
    /// The state of KVM's LAPIC when the machine stopped; none while it runs and before its first run.
    pub(crate) frozen: Option<KvmLapicState>,
    /// What a TSC deadline was before a resume moved it, if one did.
    pub(crate) due: Option<Due>,
    /// KVM's LAPIC is a new one, whose state must be set from `frozen`.
    pub(crate) new: bool,
}

/// The vCPUs of a machine about to boot: number 0 at `entry`, the others as KVM creates them, waiting for INIT. Also
/// returns the CPUID that each sees.
pub fn boot(
    vm: &Vm,
    env: &HostEnvironment,
    changes: &CpuidChanges,
    offer: &Offer,
    entry: &EntryState,
) -> Result<(Vec<KvmCpu>, Vec<Vec<Leaf>>), RunError> {
    let mut cpus = Vec::new();
    let mut cpuids = Vec::new();
    for number in 0..offer.cpus {
        let index = CpuIndex::new(number);
        let mut seen = choose::leaves(env.supported()?, offer, number);
        changed_cpuid::change(env, changes, &mut seen, index == CpuIndex::FIRST)?;
        let mut vcpu = Vcpu::new(vm, number, &seen)?;
        if index == CpuIndex::FIRST {
            vcpu.set_flat_32bit_entry(entry)?;
        }
        cpus.push(KvmCpu { index, vcpu, frozen: None, due: None, new: false });
        cpuids.push(seen);
    }
    Ok((cpus, cpuids))
}

/// The vCPUs as they were saved. Their LAPICs are set later, when the machine is resumed.
pub fn restore(vm: &Vm, saved: &[KvmCpuState]) -> Result<Vec<KvmCpu>, RunError> {
    let mut cpus = Vec::new();
    for (index, KvmCpuState { cpuid, kvm, lapic }) in CpuIndex::all().zip(saved) {
        if matches!(lapic.armed, Armed::Ns(_)) {
            return Err(RunError::BadState(format!("cpu {index}: KVM's LAPIC has no nanosecond deadline")));
        }
        let bad = |error: crate::kvm::Error| RunError::BadState(format!("cpu {index}: {error}"));
        let mut vcpu = Vcpu::new(vm, index.get(), cpuid).map_err(bad)?;
        vcpu.set_state(kvm).map_err(bad)?;
        cpus.push(KvmCpu { index, vcpu, frozen: Some(lapic.clone()), due: lapic.due, new: true });
    }
    Ok(cpus)
}

impl KvmCpu {
    /// Completes the last instruction, and emulates the accesses that it still makes.
    pub(crate) fn drain(&mut self, shared: &Shared) -> Result<(), RunError> {
        Ok(self.vcpu.drain(&mut KvmLapicBus { index: self.index, shared })?)
    }

    /// The state of KVM's LAPIC when the machine stopped; before the first run, that of a new LAPIC.
    pub(crate) fn frozen(&self) -> Result<KvmLapicState, RunError> {
        match &self.frozen {
            Some(frozen) => Ok(frozen.clone()),
            None => super::freeze::never_run(&self.vcpu),
        }
    }

    /// How far this CPU's TSC is to be ahead of the base, modulo 2^64.
    pub(crate) fn tsc_adjust(&self) -> TscAdjust {
        self.frozen.as_ref().map_or(TscAdjust::ZERO, |frozen| frozen.tsc_adjust)
    }

    /// The address of the guest's kvmclock page, while the machine is stopped; none if it has registered none.
    pub(crate) fn page_address(&self) -> Option<u64> {
        self.frozen.as_ref().and_then(|frozen| page_address(frozen.system_time))
    }

    /// The version of the guest's kvmclock page; 0 if it has registered none.
    pub(crate) fn page_version(&self, shared: &Shared) -> u32 {
        self.page_address().and_then(|page| shared.memory.read_obj(GuestAddress(page)).ok()).unwrap_or(0)
    }

    /// Notes where the guest has registered this vCPU's kvmclock page, for the audit of its ticks.
    pub(crate) fn note_page(&self, shared: &Shared) -> Result<(), RunError> {
        let address = page_address(self.vcpu.kvmclock_msr()?).unwrap_or(0);
        if let Some(vcpu_shared) = shared.vcpu(self.index) {
            vcpu_shared.page.store(address, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The address in MSR_KVM_SYSTEM_TIME_NEW; none unless bit 0 enables the page.
fn page_address(system_time: u64) -> Option<u64> {
    const ENABLED: u64 = 1;
    (system_time & ENABLED != 0).then_some(system_time & !ENABLED)
}

/// Emulates what still exits: ports, memory that is not there, MSRs that KVM does not emulate or that a filter denies
/// it.
pub(crate) struct KvmLapicBus<'a> {
    pub index: CpuIndex,
    pub shared: &'a Shared,
}

impl KvmLapicBus<'_> {
    fn trace(&self, event: &Event<'_>) {
        if self.shared.trace.is_on() {
            let now = self.shared.clock.lock().now(TscAdjust::ZERO);
            self.shared.event(self.index, now, event);
        }
    }
}

impl Bus for KvmLapicBus<'_> {
    fn cr8(&mut self, _: u8) {}

    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        let now = {
            let clock = self.shared.clock.lock();
            let now = clock.now(TscAdjust::ZERO);
            clock.instant(now)
        };
        self.shared.devices.lock().port_in(port, data, now);
        self.trace(&Event::PortIn { port, data });
    }

    fn port_out(&mut self, port: u16, data: &[u8]) {
        let now = self.shared.clock.lock().now(TscAdjust::ZERO);
        self.shared.devices.lock().port_out(port, data, now.vm);
        self.trace(&Event::PortOut { port, data });
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.trace(&Event::MmioRead { address, data });
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        self.trace(&Event::MmioWrite { address, data });
    }

    fn msr_read(&mut self, index: u32) -> Result<u64, GpFault> {
        self.shared.unknown_msr(index, "RDMSR");
        self.trace(&Event::MsrRead { index, value: None });
        Err(GpFault)
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), GpFault> {
        self.shared.unknown_msr(index, "WRMSR");
        self.trace(&Event::MsrWrite { index, value, faulted: true });
        Err(GpFault)
    }
}
