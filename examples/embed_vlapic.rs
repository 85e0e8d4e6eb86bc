//! A local APIC in the loop of a toy VMM. There is no KVM here: the guest is a list of what a real one would exit for.
//!
//! It shows what a VMM has to do: pass accesses on with the time, do what they ask of the outside, wait for the timer
//! while the CPU halts, and inject what is pending.

use anyhow::Context;
use guest_abi::{
    lapic::{EOI, ICR, LVTT, SVR, TMICT},
    msr::IA32_TSC_DEADLINE,
};
use vlapic::{Config, Deadline, Destination, LocalApic};
use vmtime::{GuestTsc, Khz, Now, PageClock, Scale, VmTime};

/// Why the guest's CPU stops executing.
enum Exit {
    /// A write of 4 bytes to the xAPIC page.
    Mmio(u32, u32),
    /// WRMSR.
    Wrmsr(u32, u64),
    /// HLT.
    Halt,
}

const GUEST: &[Exit] = &[
    Exit::Mmio(SVR, 0x1ff),     // enable
    Exit::Mmio(LVTT, 0x2_0040), // vector 0x40, periodic
    Exit::Mmio(TMICT, 500_000), // divided by 2: every millisecond
    Exit::Halt,                 // a first period
    Exit::Halt,                 // a second
    Exit::Mmio(LVTT, 0x4_0041), // vector 0x41, TSC-deadline mode; this stops the count
    Exit::Wrmsr(IA32_TSC_DEADLINE, 6_000_000),
    Exit::Halt,
    Exit::Mmio(ICR, 0x4_0050), // an IPI with vector 0x50 to itself
    Exit::Mmio(ICR, 0xc_0051), // and one to all others, of which there are none
    Exit::Halt,                // nothing is left to wait for
];

fn main() -> anyhow::Result<()> {
    // The guest's clocks: a TSC of 2 GHz, and VM time as a kvmclock page of that frequency shows it. A real VMM reads
    // the TSC at each exit.
    let scale = Scale::from_khz(Khz::new(2_000_000)?);
    let clock = PageClock { tsc_timestamp: GuestTsc(0), system_time: VmTime(0), scale };
    let mut now = clock.now(GuestTsc(0));
    let config = Config { id: 0, bsp: true, x2apic: true, tsc_deadline: true, ns_deadline: false, physical_bits: 46 };
    let mut apic = LocalApic::new(config);

    for exit in GUEST {
        now = clock.now(GuestTsc(now.tsc.0 + 1000)); // the guest ran for half a microsecond
        match *exit {
            Exit::Mmio(offset, value) => {
                say(now, &format!("the guest writes {value:#x} to register {offset:#x}"));
                let effects = apic.mmio_write(offset.into(), &value.to_le_bytes(), now);
                if let Some(ipi) = effects.ipi {
                    // The APIC has delivered what is for itself alone. Find the other CPUs with `Route::addressed_by`.
                    say(now, &format!("vector {:#x} is for {:?}: no such CPU", ipi.vector, ipi.destination));
                    anyhow::ensure!(ipi.destination == Destination::Others);
                }
            }
            Exit::Wrmsr(index, value) => {
                say(now, &format!("the guest writes {value} to MSR {index:#x}"));
                apic.msr_write(index, value, now).context("this guest would get #GP")?;
            }
            Exit::Halt => {
                let Some(deadline) = apic.next_wake() else {
                    say(now, "the guest halts for ever");
                    break;
                };
                say(now, &format!("the guest halts; wait for {deadline:?}"));
                // A real VMM sleeps until then, or until another thread has an interrupt for this CPU.
                let wake = match deadline {
                    Deadline::Tsc(tsc) => tsc,
                    Deadline::Vm(time) => clock.least_tsc(time).context("after the end of the TSC")?,
                };
                now = clock.now(wake);
                apic.advance(now);
            }
        }
        // Before the guest runs on: inject, if its RFLAGS.IF allows. The highest priority comes first.
        while let Some(vector) = apic.pending() {
            apic.acknowledge(vector);
            say(now, &format!("vector {vector:#x} enters; its handler writes EOI"));
            apic.mmio_write(EOI.into(), &[0; 4], now);
        }
    }
    Ok(())
}

fn say(now: Now, what: &str) {
    println!("{:>7} ns  {what}", now.vm.0);
}
