//! Creates, saves, restores and resumes the vCPUs of a machine whose LAPICs are in user space. [`super::kvm_lapic`]
//! does that for KVM's LAPICs.

mod thaw;

pub(crate) use thaw::{saved, thaw};

use kvm_pv::{Registration, pv_eoi::PvEoi, steal_time::StealTime};
use vlapic::{self, LocalApic};
use vmtime::{Khz, TscAdjust};

use super::{
    clock::Clock,
    config::{
        BootOptions, HostEnvironment, changed_cpuid,
        first_vm_probe::FirstVmProbe,
        source::{Chosen, TscSource},
    },
    cpu_index::CpuIndex,
    error::RunError,
    shared::Ram,
    state::CpuState,
    vcpu::{Cpu, Local, Phase},
};
use crate::{
    boot::cpuid::{self, Offer},
    kvm::Vm,
    mem::ram::GuestRam,
    x86::{EntryState, Leaf},
};

/// The vCPUs of a machine about to boot, number 0 at `entry`, and the CPUID that each sees.
pub(crate) fn boot(
    vm: &Vm,
    probe: &mut FirstVmProbe<'_>,
    chosen: &Chosen,
    options: &BootOptions,
    khz: Khz,
    entry: &EntryState,
) -> Result<(Vec<Cpu>, Vec<Vec<Leaf>>), RunError> {
    let offer = Offer {
        x2apic: options.x2apic && probe.facts.x2apic_exits,
        tsc_deadline: chosen.tsc_deadline,
        ns_deadline: true,
        pv_eoi: options.pv_eoi,
        steal_time: true,
        vmclock: options.vmclock,
        // With the host's TSC a probe of KVM's offset would delay the start; with `scaled` it has run anyway.
        tsc_adjust: match chosen.source {
            TscSource::Trapped => true,
            TscSource::Scaled => probe.tsc_offset()?,
            TscSource::Host => false,
        },
        tsc_khz: khz,
        cpus: options.cpus,
    };
    let mut cpus = Vec::new();
    let mut leaves = Vec::new();
    for number in 0..options.cpus {
        let index = CpuIndex::new(number);
        let mut seen = cpuid::leaves(probe.env.supported()?, &offer, number);
        changed_cpuid::change(probe.env, &options.cpuid, &mut seen, index == CpuIndex::FIRST)?;
        let config = vlapic::Config {
            id: number,
            bsp: index == CpuIndex::FIRST,
            x2apic: offer.x2apic,
            tsc_deadline: offer.tsc_deadline,
            ns_deadline: offer.ns_deadline,
            physical_bits: cpuid::physical_bits(&seen),
        };
        let mut vcpu = probe.vcpu(vm, number, &seen, entry.rip)?;
        let mut apic = LocalApic::new(config);
        if entry.pc && index == CpuIndex::FIRST {
            apic = apic.in_virtual_wire_mode();
        }
        vcpu.set_apic_base_at_reset(apic.apic_base())?;
        if index == CpuIndex::FIRST {
            vcpu.set_flat_32bit_entry(entry)?;
        }
        leaves.push(seen);
        let local = Local {
            index,
            apic,
            pvclock: Registration::default(),
            pv_eoi: offer.pv_eoi.then(PvEoi::default),
            steal_time: offer.steal_time.then(StealTime::default),
            tsc_adjust: TscAdjust::ZERO,
            due: None,
            phase: if index == CpuIndex::FIRST { Phase::Running } else { Phase::WaitForSipi },
            halted: false,
            nmi: false,
            timer_interrupts: 0,
            expired: None,
            timers: None,
            published_flags: 0,
            sti_shadow: false,
        };
        cpus.push(Cpu { vcpu, local });
    }
    Ok((cpus, leaves))
}

/// The vCPUs, to be saved.
pub(crate) fn states(
    cpus: &mut [Cpu],
    cpuids: &[Vec<Leaf>],
    env: &HostEnvironment,
    clock: &Clock,
) -> Result<Vec<CpuState>, RunError> {
    let msrs = env.msrs()?;
    let mut states = Vec::new();
    for (Cpu { vcpu, local }, cpuid) in cpus.iter_mut().zip(cpuids) {
        // The STI shadow is in KVM's events too, or ends with the step that made it. Flags and counts are computed
        // again. Messages have been delivered before their receiver is saved.
        let Local {
            index: _,
            apic,
            pvclock,
            pv_eoi,
            steal_time,
            tsc_adjust,
            due,
            phase,
            halted,
            nmi: _,
            timer_interrupts: _,
            expired: _,
            timers: _,
            published_flags: _,
            sti_shadow: _,
        } = local;
        let mut kvm = vcpu.state(msrs)?;
        // KVM's copy of CR8 is as of the last entry, and the LAPIC's TPR may have changed since.
        kvm.system.cr8 = u64::from(apic.cr8());
        states.push(CpuState {
            cpuid: cpuid.clone(),
            apic_config: apic.config().state(),
            kvm,
            apic: apic.state(clock.now(*tsc_adjust)),
            pvclock: pvclock.state(),
            pv_eoi: pv_eoi.as_ref().map(PvEoi::state),
            steal_time: steal_time.as_ref().map(StealTime::state).filter(|state| state.msr != 0),
            tsc_adjust: *tsc_adjust,
            due: *due,
            phase: *phase,
            halted: *halted,
        });
    }
    Ok(states)
}

/// An address at which every machine has RAM.
const ANY_RAM: u64 = 0x1000;

/// The vCPUs as they were saved.
pub(crate) fn restore(
    vm: &Vm,
    probe: &mut FirstVmProbe<'_>,
    memory: &GuestRam,
    saved: &[CpuState],
) -> Result<Vec<Cpu>, RunError> {
    let mut cpus = Vec::new();
    for (index, cpu) in CpuIndex::all().zip(saved) {
        let CpuState {
            cpuid: seen,
            apic_config,
            kvm,
            apic: saved_apic,
            pvclock,
            pv_eoi,
            steal_time,
            tsc_adjust,
            due,
            phase,
            halted,
        } = cpu;
        let bad = |reason: String| RunError::BadState(format!("cpu {index}: {reason}"));
        // Features that this host lacks were reported before. So what KVM refuses here is a state that no CPU has.
        let mut vcpu = probe.vcpu(vm, index.get(), seen, ANY_RAM).map_err(|e| bad(e.to_string()))?;
        vcpu.set_state(kvm).map_err(|e| bad(e.to_string()))?;
        let config = vlapic::Config::from_state(*apic_config, cpuid::physical_bits(seen));
        let local = Local {
            index,
            apic: LocalApic::from_state(saved_apic, config, saved_apic.saved_at.now(*tsc_adjust))
                .map_err(|e| bad(e.to_string()))?,
            pvclock: Registration::from_state(*pvclock, &Ram(memory)).map_err(|e| bad(e.to_string()))?,
            pv_eoi: pv_eoi
                .map(|state| PvEoi::from_state(state, &Ram(memory)))
                .transpose()
                .map_err(|e| bad(e.to_string()))?,
            steal_time: cpuid::has_steal_time(seen)
                .then(|| StealTime::from_state(steal_time.unwrap_or_default(), &Ram(memory)))
                .transpose()
                .map_err(|e| bad(e.to_string()))?,
            tsc_adjust: *tsc_adjust,
            due: *due,
            phase: *phase,
            halted: *halted,
            nmi: kvm.events.nmi_pending > 0,
            timer_interrupts: 0,
            expired: None,
            timers: None,
            published_flags: 0,
            sti_shadow: false,
        };
        cpus.push(Cpu { vcpu, local });
    }
    Ok(cpus)
}

/// Checks that this host has every feature that the guest saw, whether KVM or the VMM emulates it.
pub(crate) fn check_features(probe: &FirstVmProbe<'_>, cpu: &CpuState, chosen: &Chosen) -> Result<(), RunError> {
    let mut missing = cpuid::missing(&cpu.cpuid, probe.env.features()?);
    if cpu.apic_config.x2apic && !probe.facts.x2apic_exits {
        missing.push("x2apic (its MSRs do not exit on this host)".to_owned());
    }
    if cpu.apic_config.tsc_deadline && !chosen.tsc_deadline {
        missing.push("tsc_deadline_timer (this host swallows its MSR)".to_owned());
    }
    if cpuid::has_tsc_adjust(&cpu.cpuid) && chosen.source != TscSource::Trapped && !probe.tsc_offset()? {
        missing.push(format!(
            "tsc_adjust (KVM does not move a guest's TSC here, so that one from --tsc {} cannot be moved; use --tsc \
             trapped)",
            chosen.source.as_str()
        ));
    }
    if missing.is_empty() { Ok(()) } else { Err(RunError::MissingFeatures(missing)) }
}
