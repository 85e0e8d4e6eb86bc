//! The I/O APIC: interrupts of serial port and timer that reach the CPU that its entries name, in real and in virtual
//! time, and go on after a restore.

use std::fs;

use vm_tests::{
    Ended, Lab, require_kvm,
    two_cpus::{Code, count, image},
};

const BOTH: [&str; 2] = ["--time real --timeout 60s", "--time virtual --tsc-khz 1000000"];
const TIMER: u8 = 0x40;
const SERIAL: u8 = 0x41;
const LEVEL: u32 = 1 << 15;
/// The serial port's registers: which interrupts are enabled, and which one there is.
const IER: u16 = 0x3f9;
const IIR: u16 = 0x3fa;

fn boot(lab: &Lab, image: &[u8], flags: &str) -> Ended {
    fs::write(lab.path("image"), image).unwrap();
    lab.run(&format!("--guest image {flags}"))
}

/// Starts the second CPU, programs the timer's channel 0 to interrupt every 3.4 ms, and sends that to `to`. The 8259
/// pair is masked, as in every PVH kernel.
fn timer_to(to: u8, low: u32) -> Code {
    Code::default()
        .start_second()
        // The second one halts meanwhile, and waits for nothing.
        .linger()
        .route(2, to, low | u32::from(TIMER))
        .out(0x43, 0x34)
        .out(0x40, 0)
        .out(0x40, 0x10)
}

/// A guest in which one CPU halts until it has had 20 ticks, and the other for good, with interrupts off.
fn ticking(to: u8, low: u32) -> Vec<u8> {
    let wait = Code::default().halt_until(count(to), 20).end_if(count(1 - to), 0);
    let (first, second) = match to {
        0 => (timer_to(0, low).then(&wait), Code::default().halt()),
        _ => (timer_to(to, low).halt(), wait),
    };
    image(first, second, &[(TIMER, Code::default())])
}

// Catches: a timer that the I/O APIC does not get, or sends to another CPU; a CPU that does not wait for it, because it
// is not the first, or because the first is halted for good.
#[test]
fn the_timer_wakes_the_cpu_that_its_entry_names() {
    require_kvm!();
    let (logical, lowest) = (1 << 11, 1 << 8);
    for flags in BOTH {
        for to in [0, 1] {
            boot(&Lab::new(), &ticking(to, 0), &format!("--cpus 2 {flags}")).expect(0);
        }
    }
    // To all CPUs with a bit in common: none has one before it writes LDR, so that none gets it.
    let virtual_time = "--cpus 2 --time virtual --tsc-khz 1000000";
    boot(&Lab::new(), &ticking(1, logical), virtual_time).refused(1, &["nothing will wake it"]);
    boot(&Lab::new(), &ticking(1, lowest), virtual_time).expect(0);
}

// Catches: an NMI that does not wake a CPU from a HLT with interrupts off, or one that comes as a vector. (Its handler
// does not end with IRET, so that no second one comes.)
#[test]
fn the_timer_wakes_a_cpu_by_nmi() {
    require_kvm!();
    // cli; hlt, then success if its handler has counted.
    let second = Code::default().halt().end_if(count(1), 1);
    for flags in BOTH {
        let image = image(timer_to(1, 4 << 8).halt(), second.clone(), &[(2, Code::default())]);
        boot(&Lab::new(), &image, &format!("--cpus 2 {flags}")).expect(0);
    }
}

// Catches: an I/O APIC, or a timer's edge, that a snapshot loses; one that a restore on the other kind of time does not
// continue.
#[test]
fn the_timer_goes_on_after_a_restore() {
    require_kvm!();
    for (save, restore) in [(BOTH[0], BOTH[0]), (BOTH[1], BOTH[1]), (BOTH[1], BOTH[0])] {
        for to in [0, 1] {
            let lab = Lab::new();
            // The twentieth tick comes after 69 ms.
            let flags = format!("--cpus 2 {save} --save-at 40ms --save-to snap");
            boot(&lab, &ticking(to, 0), &flags).expect(0);
            lab.run(&format!("restore snap {}", restore.replace("--tsc-khz 1000000", ""))).expect(0);
        }
    }
}

// Catches: an instant at which the timer interrupts that depends on the host.
#[test]
fn two_runs_in_virtual_time_write_the_same_trace() {
    require_kvm!();
    let trace = || {
        let lab = Lab::new();
        boot(&lab, &ticking(1, 0), "--cpus 2 --time virtual --tsc-khz 1000000 --trace trace").expect(0);
        fs::read_to_string(lab.path("trace")).unwrap()
    };
    let first = trace();
    assert_eq!(first.lines().filter(|line| line.contains("\"event\":\"inject\"")).count(), 20, "{first}");
    assert_eq!(first, trace());
}

// Catches: a serial port whose interrupt reaches no CPU but the first, comes more than once for one cause, or is lost
// because another CPU caused it: user space of a Linux guest prints by it.
#[test]
fn the_serial_port_interrupts_the_cpu_that_its_entry_names() {
    require_kvm!();
    for flags in BOTH {
        for to in [0, 1] {
            let first = Code::default()
                .start_second()
                .route(4, to, SERIAL.into())
                .bytes(&[0xfb])
                // When the transmitter is empty, as it is.
                .out(IER, 2)
                .poll(count(to), 1)
                .linger()
                .end_if(count(to), 1);
            // sti; in al, 0x80; jmp -4.
            let second = Code::default().bytes(&[0xfb, 0xe4, 0x80, 0xeb, 0xfc]);
            let image = image(first, second, &[(SERIAL, Code::default().input(IIR))]);
            boot(&Lab::new(), &image, &format!("--cpus 2 {flags}")).expect(0);
        }
    }
}

// Catches: a level that interrupts once, though its cause stays, or goes on after its cause is gone; an EOI that does
// not reach the I/O APIC.
#[test]
fn a_level_triggered_entry_interrupts_until_its_cause_is_gone() {
    require_kvm!();
    // cmp dword [count], 3; jb over the read of the cause, which takes 5 bytes.
    let third = Code::default().bytes(&[0x83, 0x3d]).bytes(&count(0).to_le_bytes()).bytes(&[3, 0x72, 5]).input(IIR);
    for flags in BOTH {
        let first = Code::default().route(4, 0, LEVEL | u32::from(SERIAL)).out(IER, 2).linger().end_if(count(0), 3);
        let image = image(first, Code::default(), &[(SERIAL, third.clone())]);
        boot(&Lab::new(), &image, flags).expect(0);
    }
}
