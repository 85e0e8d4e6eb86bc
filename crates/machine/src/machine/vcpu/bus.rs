//! Emulates a vCPU's accesses: to its LAPIC, kvmclock, TSC and the devices.

use std::sync::atomic::Ordering;

use guest_abi::{
    msr::{IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE},
    pv_eoi,
    pvclock::{MSR_SYSTEM_TIME_NEW, MSR_SYSTEM_TIME_OLD, MSR_WALL_CLOCK_NEW, MSR_WALL_CLOCK_OLD},
    steal_time,
};
use vlapic::{Effects, LocalApic};
use vmtime::{GuestTsc, Now, TscAdjust};

use super::{Local, ioapic, ipi};
use crate::{
    devices::Devices,
    kvm::{Bus, GpFault},
    machine::{
        record::trace::Event,
        shared::{Ram, Shared},
    },
    x86::emulates_msr,
};

/// Size of the xAPIC page.
const APIC_PAGE: u64 = 0x1000;

/// One vCPU's view of the machine while it runs.
pub(crate) struct VcpuBus<'a> {
    pub local: &'a mut Local,
    pub shared: &'a Shared,
    /// What must be set in KVM afterwards.
    pub changed: Changed,
}

/// What must be set in KVM after an access, besides completing it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// IA32_APIC_BASE.
    pub apic_base: bool,
    /// The guest moved its TSC.
    pub tsc: bool,
}

impl<'a> VcpuBus<'a> {
    pub(crate) fn new(local: &'a mut Local, shared: &'a Shared) -> Self {
        Self { local, shared, changed: Changed::default() }
    }

    /// Counts an operation, and returns the instant at which it takes effect.
    pub(crate) fn operation(&mut self) -> Now {
        let (mut clock, host) = self.shared.read_clock();
        clock.spend_operation();
        let now = self.local.now(&clock, host);
        self.local.advance(&clock, now);
        now
    }

    fn trace(&self, now: Now, event: &Event<'_>) {
        self.shared.event(self.local.index, now, event);
    }

    /// Where in the xAPIC page `address` is, if it is.
    fn apic_offset(&self, address: u64) -> Option<u64> {
        let base = self.local.apic.mmio_base()?;
        address.checked_sub(base).filter(|offset| *offset < APIC_PAGE)
    }

    fn apply(&mut self, effects: Effects, now: Now) {
        self.changed.apic_base |= effects.base_changed;
        if let Some(armed) = effects.timer {
            self.local.timer_written(self.shared, armed, now);
        }
        if let Some(vector) = effects.eoi {
            ioapic::end_of_interrupt(self.shared, self.local, vector);
        }
        if let Some(ipi) = effects.ipi {
            ipi::send(self.shared, self.local, ipi);
        }
        if effects.route_changed {
            ipi::publish_route(self.shared, self.local);
        }
    }

    /// Accesses the devices. `access` returns whether it can have changed the output of the 8259 pair, or when the 8254
    /// interrupts.
    fn device(&self, access: impl FnOnce(&mut Devices) -> bool) {
        if ioapic::access(self.shared, self.local, access) {
            ioapic::ring_waiting(self.shared, self.local);
        }
    }

    /// The guest writes its TSC or IA32_TSC_ADJUST, at `now`.
    fn move_tsc(&mut self, adjust: TscAdjust, now: Now) -> Result<(), GpFault> {
        if !self.shared.clock.lock().tsc_is_settable() {
            log::warn!(
                "the guest's write of its TSC gets a #GP: KVM does not move a guest's TSC here (probed), --tsc \
                 trapped can"
            );
            return Err(GpFault);
        }
        // Ticks so far were read from the TSC as it was.
        self.shared.read_rings();
        self.local.tsc_adjust = adjust;
        self.local.apic.move_tsc(now, now.ahead(adjust));
        if let Some(vcpu_shared) = self.shared.vcpu(self.local.index) {
            vcpu_shared.tsc_adjust.store(adjust.0, Ordering::Relaxed);
        }
        self.changed.tsc = true;
        if self.shared.vcpus.len() > 1 {
            // The flag stays clear even if the guest makes the TSCs equal again. It cannot write all of them at one
            // instant, so a page with the flag would have been wrong in between.
            self.shared.tsc_stable.store(false, Ordering::SeqCst);
        }
        self.publish()
    }

    /// Publishes again if another CPU's TSC write made this page's flags untrue.
    pub(crate) fn refresh_page(&mut self) {
        if self.local.pvclock.address().is_some() && self.local.published_flags != self.shared.page_flags() {
            // A page that cannot be written was refused when the guest registered it.
            let _ = self.publish();
        }
    }

    /// Call it before an entry: clears the PV EOI bit if the interrupt in service can no longer end without an exit.
    pub(crate) fn withdraw_pv_eoi(&mut self) {
        let Local { apic, pv_eoi, .. } = &mut *self.local;
        if let Some(pv_eoi) = pv_eoi {
            pv_eoi.withdraw_unless(apic.silent_end(), &Ram(&self.shared.memory));
        }
    }

    /// Call it when an interrupt was acknowledged: sets the PV EOI bit if that interrupt may end without an exit.
    pub(crate) fn lend_pv_eoi(&mut self) {
        let Local { apic, pv_eoi, .. } = &mut *self.local;
        if let Some(pv_eoi) = pv_eoi {
            pv_eoi.lend(apic.silent_end(), &Ram(&self.shared.memory));
        }
    }

    /// Publishes this CPU's page, if it has one.
    fn publish(&mut self) -> Result<(), GpFault> {
        if let Some(vcpu_shared) = self.shared.vcpu(self.local.index) {
            vcpu_shared.page.store(self.local.pvclock.address().unwrap_or(0), Ordering::Relaxed);
        }
        let page = self.shared.clock.lock().page(self.local.tsc_adjust);
        let flags = self.shared.page_flags();
        self.local.published_flags = flags;
        let published = self.local.pvclock.publish(&Ram(&self.shared.memory), &page, flags, false);
        published.map(|_| ()).map_err(|fault| {
            log::warn!("the kvmclock page cannot be written: {fault}");
            GpFault
        })
    }

    /// The MSR is not offered to this guest, or does not exist.
    fn unknown_msr(&self, index: u32, access: &str) -> GpFault {
        self.shared.unknown_msr(index, access);
        GpFault
    }

    fn read(&mut self, index: u32, now: Now) -> Result<u64, GpFault> {
        if let (pv_eoi::MSR, Some(pv_eoi)) = (index, &self.local.pv_eoi) {
            return Ok(pv_eoi.read_msr());
        }
        if let (steal_time::MSR, Some(steal_time)) = (index, &self.local.steal_time) {
            return Ok(steal_time.read_msr());
        }
        match index {
            _ if !emulates_msr(index) => Err(self.unknown_msr(index, "RDMSR")),
            _ if LocalApic::owns_msr(index) => self.local.apic.msr_read(index, now).map_err(|_| GpFault),
            IA32_TSC => Ok(now.tsc.0),
            IA32_TSC_ADJUST => Ok(self.local.tsc_adjust.0),
            MSR_SYSTEM_TIME_OLD | MSR_SYSTEM_TIME_NEW => Ok(self.local.pvclock.read_msr()),
            MSR_WALL_CLOCK_OLD | MSR_WALL_CLOCK_NEW => Ok(self.shared.wall.lock().read_msr()),
            _ => Err(self.unknown_msr(index, "RDMSR")),
        }
    }

    fn write(&mut self, index: u32, value: u64, now: Now) -> Result<(), GpFault> {
        let ram = Ram(&self.shared.memory);
        if let (pv_eoi::MSR, Some(pv_eoi)) = (index, &mut self.local.pv_eoi) {
            return pv_eoi.write_msr(value, &ram).map_err(|fault| {
                log::warn!("the guest's write of MSR_KVM_PV_EOI_EN {value:#x} gets a #GP: {fault}");
                GpFault
            });
        }
        if let (steal_time::MSR, Some(steal_time)) = (index, &mut self.local.steal_time) {
            return steal_time.write_msr(value, &ram).map_err(|fault| {
                log::warn!("the guest's write of MSR_KVM_STEAL_TIME {value:#x} gets a #GP: {fault}");
                GpFault
            });
        }
        match index {
            _ if !emulates_msr(index) => Err(self.unknown_msr(index, "WRMSR")),
            _ if LocalApic::owns_msr(index) => {
                let effects = self.local.apic.msr_write(index, value, now).map_err(|_| GpFault)?;
                self.apply(effects, now);
                Ok(())
            }
            // TSC and TSC_ADJUST move together (SDM vol. 3, "IA32_TSC_ADJUST Register").
            IA32_TSC => self.move_tsc(self.local.tsc_adjust.moved(now.tsc, GuestTsc(value)), now),
            IA32_TSC_ADJUST => self.move_tsc(TscAdjust(value), now),
            MSR_SYSTEM_TIME_OLD | MSR_SYSTEM_TIME_NEW => {
                self.local.pvclock.write_msr(value, &ram).map_err(|fault| {
                    log::warn!("the guest's kvmclock page {value:#x} gets a #GP: {fault}");
                    GpFault
                })?;
                self.publish()
            }
            MSR_WALL_CLOCK_OLD | MSR_WALL_CLOCK_NEW => {
                let wall_ns = self.shared.clock.lock().wall_ns_at_zero();
                self.shared.wall.lock().write_msr(value, wall_ns, &ram).map_err(|fault| {
                    log::warn!("the guest's wall-clock address {value:#x} gets a #GP: {fault}");
                    GpFault
                })
            }
            _ => Err(self.unknown_msr(index, "WRMSR")),
        }
    }
}

impl Bus for VcpuBus<'_> {
    fn cr8(&mut self, cr8: u8) {
        let Local { apic, pv_eoi, .. } = &mut *self.local;
        if let Some(vector) = pv_eoi.as_mut().and_then(|pv_eoi| pv_eoi.take_ended(&Ram(&self.shared.memory))) {
            apic.end_silently(vector);
        }
        if self.local.apic.cr8() != cr8 {
            self.local.apic.set_cr8(cr8);
        }
    }

    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        let now = self.operation();
        let instant = self.shared.clock.lock().instant(now);
        self.device(|devices| {
            devices.port_in(port, data, instant);
            Devices::is_of_controllers(port)
        });
        self.trace(now, &Event::PortIn { port, data });
    }

    fn port_out(&mut self, port: u16, data: &[u8]) {
        let now = self.operation();
        self.device(|devices| devices.port_out(port, data, now.vm) || Devices::is_of_controllers(port));
        self.trace(now, &Event::PortOut { port, data });
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        let now = self.operation();
        match self.apic_offset(address) {
            Some(offset) => self.local.apic.mmio_read(offset, data, now),
            None => self.shared.devices.lock().mmio_read(address, data),
        }
        self.trace(now, &Event::MmioRead { address, data });
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        let now = self.operation();
        if let Some(offset) = self.apic_offset(address) {
            let effects = self.local.apic.mmio_write(offset, data, now);
            self.apply(effects, now);
        } else {
            // What the timer has caused before the write is sent by the entry as it was.
            ioapic::access(self.shared, self.local, |devices| devices.advance(now.vm));
            self.device(|devices| devices.mmio_write(address, data, now.vm));
        }
        self.trace(now, &Event::MmioWrite { address, data });
    }

    fn msr_read(&mut self, index: u32) -> Result<u64, GpFault> {
        let now = self.operation();
        let result = self.read(index, now);
        self.trace(now, &Event::MsrRead { index, value: result.ok() });
        result
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), GpFault> {
        if index == IA32_TSC_DEADLINE && self.shared.swallow_deadline {
            return Ok(());
        }
        self.msr_write_at_site(index, value)
    }
}

impl VcpuBus<'_> {
    /// WRMSR that the VMM performs in place of the guest's instruction at a trap site.
    pub(crate) fn msr_write_at_site(&mut self, index: u32, value: u64) -> Result<(), GpFault> {
        let now = self.operation();
        let result = self.write(index, value, now);
        self.trace(now, &Event::MsrWrite { index, value, faulted: result.is_err() });
        result
    }
}
