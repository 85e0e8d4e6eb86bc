use super::*;

fn devices() -> Devices {
    Devices::new(Box::new(std::io::sink()))
}

fn at(vm: VmTime) -> Instant {
    Instant { vm, reference: VmTime(0), wall_ns: 0 }
}

// Catches: a PM timer that follows the page, and so a fault in it.
#[test]
fn the_pm_timer_counts_by_the_reference_clock() {
    let mut data = [0; 4];
    let now = Instant { vm: VmTime(77), reference: VmTime(1_000_000_000), wall_ns: 99 };
    devices().port_in(ports::PM_TIMER, &mut data, now);
    assert_eq!(u32::from_le_bytes(data), 3_579_545);
}

// Catches: a serial port whose interrupt does not arrive, comes although the guest polls, or comes again after a
// restore.
#[test]
fn the_serial_port_interrupts_if_the_guest_wants_it_to() {
    let (data, enable, identification) = (ports::SERIAL, ports::SERIAL + 1, ports::SERIAL + 2);
    let mut devices = devices().after_firmware([8, 0x70], VmTime(0));
    // Only IRQ 4 is let through.
    devices.port_out(0x21, &[0xef], VmTime(0));
    devices.port_out(data, b"x", VmTime(0));
    assert!(!devices.interrupts(), "it polls");
    devices.port_out(enable, &[2], VmTime(0));
    assert!(devices.interrupts(), "the transmitter is empty");
    assert_eq!(devices.acknowledge(), 12);
    devices.port_out(0x20, &[0x20], VmTime(0));
    let mut cause = [0];
    devices.port_in(identification, &mut cause, at(VmTime(0)));
    assert_eq!(cause[0] & 0xf, 2);
    devices.port_out(enable, &[1], VmTime(0));
    assert!(!devices.interrupts());
    assert_eq!(devices.type_in(b"y"), 1);
    let mut restored = Devices::from_state(&devices.state(), Box::new(std::io::sink())).unwrap();
    assert!(restored.interrupts());
    assert_eq!(restored.acknowledge(), 12);
    // The scratch register: whatever the restore itself has raised would be passed on.
    restored.port_out(data + 7, &[0], VmTime(0));
    restored.port_out(0x20, &[0x20], VmTime(0));
    assert!(!restored.interrupts());
    let mut again = Devices::from_state(&restored.state(), Box::new(std::io::sink())).unwrap();
    again.port_out(data + 7, &[0], VmTime(0));
    assert!(!again.interrupts(), "acknowledged, although its cause was not read");
}

#[test]
fn debug_exit_takes_any_width() {
    for (data, code) in [(&[3u8][..], 3), (&[3, 1], 0x103), (&[3, 0, 0, 0], 3)] {
        let mut devices = devices();
        devices.port_out(ports::DEBUG_EXIT, data, VmTime(0));
        assert_eq!(devices.take_exit(), Some(GuestExit::Debug(code)));
        assert_eq!(devices.take_exit(), None);
    }
}

#[test]
fn the_keyboard_controller_resets_only_on_its_reset_command() {
    let mut devices = devices();
    devices.port_out(ports::I8042_COMMAND, &[0xd1], VmTime(0));
    assert_eq!(devices.take_exit(), None);
    devices.port_out(ports::I8042_COMMAND, &[ports::I8042_RESET], VmTime(0));
    assert_eq!(devices.take_exit(), Some(GuestExit::Reset));
}

#[test]
fn an_absent_port_reads_all_ones() {
    let mut data = [0; 4];
    devices().port_in(0x1234, &mut data, at(VmTime(0)));
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn the_timer_interrupts_through_the_controllers() {
    let mut devices = devices().after_firmware([8, 0x70], VmTime(0));
    let first = devices.next_interrupt().unwrap();
    devices.advance(VmTime(first.0 - 1));
    assert!(!devices.interrupts());
    devices.advance(first);
    assert!(devices.interrupts());
    assert_eq!(devices.next_interrupt(), None, "one waits already");
    assert_eq!(devices.acknowledge(), 8);
    assert!(!devices.interrupts());
    let second = devices.next_interrupt().unwrap();
    devices.port_out(0x20, &[0x20], second);
    assert!(devices.interrupts());
    // Command and data port of the first chip in one access.
    devices.port_out(0x20, &[0x20, 0xff], second);
    assert!(!devices.interrupts());
    assert_eq!(devices.next_interrupt(), None);
    let mut data = [0; 2];
    devices.port_in(0x20, &mut data, at(second));
    assert_eq!(data, [1, 0xff]);
}

/// One with entry `low` for `pin`, to the CPU with ID 1.
fn routed(pin: u8, low: u32) -> Devices {
    let mut devices = devices();
    for (register, value) in [(0x11 + 2 * pin, 1u32 << 24), (0x10 + 2 * pin, low)] {
        devices.mmio_write(0xfec0_0000, &[register, 0, 0, 0], VmTime(0));
        devices.mmio_write(0xfec0_0010, &value.to_le_bytes(), VmTime(0));
    }
    devices
}

fn vectors(devices: &mut Devices) -> Vec<(u8, u8)> {
    std::iter::from_fn(|| devices.take_message()).map(|(pin, message)| (pin, message.vector)).collect()
}

// Catches: a timer at another pin than the MADT says, an edge that is sent twice or only to one of the two controllers,
// and a time at which nobody wakes.
#[test]
fn the_timer_is_pin_2_of_the_io_apic() {
    let mut devices = routed(2, 0x40).after_firmware([8, 0x70], VmTime(0));
    let (first, to) = devices.next_message().unwrap();
    assert_eq!(to, (DeliveryMode::Fixed, Destination::Physical(1)));
    assert_eq!(devices.next_interrupt(), Some(first));
    devices.advance(VmTime(first.0 - 1));
    assert!(!devices.has_message());
    devices.advance(first);
    assert_eq!(vectors(&mut devices), [(2, 0x40)]);
    assert!(devices.interrupts());
    let (second, _) = devices.next_message().unwrap();
    assert!(second > first);
    assert!(devices.mmio_write(0xfec0_0010, &(1u32 << 16).to_le_bytes(), VmTime(second.0 - 1)), "masked");
    assert_eq!(devices.next_message(), None);
    devices.advance(second);
    assert_eq!(vectors(&mut devices), []);
}

// Catches: a timer whose output is high, and whose level-triggered entry waits for an edge; or one that never stops
// after the guest has made the output low.
#[test]
fn a_level_triggered_timer_follows_the_timers_output() {
    let mut devices = routed(2, 1 << 16 | 1 << 15 | 0x40);
    // Mode 2: the output is high but for one tick of each period.
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
        devices.port_out(port, &[value], VmTime(0));
    }
    devices.mmio_write(0xfec0_0010, &(1u32 << 15 | 0x40).to_le_bytes(), VmTime(1_000));
    assert_eq!(vectors(&mut devices), [(2, 0x40)]);
    devices.end_of_interrupt(0x40);
    assert_eq!(vectors(&mut devices), [(2, 0x40)]);
    // Mode 0: low until the count has ended.
    devices.port_out(0x43, &[0x30], VmTime(2_000));
    devices.advance(VmTime(2_000));
    devices.end_of_interrupt(0x40);
    assert_eq!(vectors(&mut devices), []);
}

// Catches: a serial port that a restore takes for silent, and one whose level stays when its cause was read.
#[test]
fn the_serial_port_is_pin_4_and_its_line_survives_a_restore() {
    let mut devices = routed(4, 1 << 15 | 0x41);
    devices.port_out(ports::SERIAL + 1, &[2], VmTime(0));
    assert_eq!(vectors(&mut devices), [(4, 0x41)]);
    let mut devices = Devices::from_state(&devices.state(), Box::new(std::io::sink())).unwrap();
    assert_eq!(vectors(&mut devices), [], "its EOI is awaited");
    devices.end_of_interrupt(0x41);
    assert_eq!(vectors(&mut devices), [(4, 0x41)]);
    devices.port_in(ports::SERIAL + 2, &mut [0], at(VmTime(0)));
    devices.end_of_interrupt(0x41);
    assert_eq!(vectors(&mut devices), []);
}

// Catches: memory without a device that reads as zeros, or that a guest can write.
#[test]
fn absent_memory_reads_all_ones() {
    for address in [0, 0xfec0_0004, 0xfec0_0040, 0xfed0_0000, u64::MAX] {
        let (mut devices, mut data) = (devices(), [0; 8]);
        assert!(!devices.mmio_write(address, &[0; 8], VmTime(0)));
        devices.mmio_read(address, &mut data);
        assert_eq!(data, [0xff; 8], "{address:#x}");
    }
}
