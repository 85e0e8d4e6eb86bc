//! The devices: a serial console, a PC's interrupt controllers and interval timer, and ports with which a guest ends the
//! machine.
//!
//! They are everything that a guest can access besides RAM and its LAPIC. Other addresses read as all ones, as on a
//! PC's bus, and writes to them are ignored. Devices do not depend on KVM, and time is an argument.

mod exit;
mod ioapic;
mod pic;
mod pit;
mod pm;
mod serial;

use std::io::Write;

use guest_abi::ports;

pub use exit::GuestExit;
pub use ioapic::{Ioapic, IoapicState};
pub use pic::{ChipState, Expects, Pic, PicState};
pub use pit::{AccessMode, ChannelState, Counting, Pit, PitState};
pub use serial::{Console, SerialState};

use vlapic::{Destination, Ipi};
use vmtime::VmTime;

/// The timer's input of the 8259 pair, and that of the serial port.
const TIMER_IRQ: u8 = 0;
const SERIAL_IRQ: u8 = 4;
/// Their pins of the I/O APIC. In a PC the timer's is another one than its IRQ; the MADT says so.
const TIMER_PIN: u8 = guest_abi::ioapic::TIMER_PIN;
const SERIAL_PIN: u8 = SERIAL_IRQ;

/// One instant, by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Instant {
    /// VM time by the machine's kvmclock page.
    pub vm: VmTime,
    /// VM time by the reference clock, which uses no page.
    pub reference: VmTime,
}

/// The devices.
pub struct Devices {
    console: Console,
    pic: Pic,
    ioapic: Ioapic,
    pit: Pit,
    exit: Option<GuestExit>,
}

/// The state of the devices for a snapshot: of the serial port, the 8259 pair, the I/O APIC and the timer.
pub type SavedDevices = (SerialState, PicState, IoapicState, PitState);

impl Devices {
    /// Fresh devices; the console writes to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            console: Console::new(out),
            pic: Pic::default(),
            ioapic: Ioapic::default(),
            pit: Pit::default(),
            exit: None,
        }
    }

    /// The same with interrupt controllers and timer as a PC's firmware leaves them at `now`.
    #[must_use]
    pub fn after_firmware(self, pic_vectors: [u8; 2], now: VmTime) -> Self {
        Self { pic: Pic::initialized(pic_vectors), pit: Pit::ticking(now), ..self }
    }

    /// IN: fills `data`.
    ///
    /// The PM timer counts by the reference clock, and all else by the page: so that a fault in the page does not
    /// change the clock by which a guest could notice it.
    pub fn port_in(&mut self, port: u16, data: &mut [u8], now: Instant) {
        data.fill(0xff);
        let Instant { vm: now, reference } = now;
        if Self::is_of_controllers(port) {
            self.advance(now);
            // The registers are one byte wide: a wider access is one to several ports.
            for (port, byte) in (port..).zip(data) {
                *byte = match port {
                    port if Pit::owns(port) => self.pit.read(port, now),
                    port => self.pic.read(port),
                };
            }
        } else if let (Some(offset), [value]) = (Console::offset(port), &mut *data) {
            *value = self.console.read(offset);
            self.sense_console();
        } else if port == ports::PM_TIMER {
            pm::read(data, reference);
        } else if pm::owns_pm1(port) {
            pm::read_pm1(port, data);
        } else if port == ports::I8042_COMMAND {
            // Status: both buffers empty. A guest waits for that before it writes the reset command.
            data.fill(0);
        }
    }

    /// OUT. Returns whether the serial port has just requested an interrupt.
    pub fn port_out(&mut self, port: u16, data: &[u8], now: VmTime) -> bool {
        match (port, data) {
            (port, data) if Self::is_of_controllers(port) => {
                self.advance(now);
                for (port, byte) in (port..).zip(data) {
                    if Pit::owns(port) {
                        self.pit.write(port, *byte, now);
                    } else {
                        self.pic.write(port, *byte);
                    }
                }
            }
            (ports::DEBUG_EXIT, data) if !data.is_empty() => self.exit = Some(GuestExit::from_debug_port(data)),
            (ports::I8042_COMMAND, [ports::I8042_RESET]) => self.exit = Some(GuestExit::Reset),
            (port, [value]) => {
                if let Some(offset) = Console::offset(port) {
                    self.console.write(offset, *value);
                    return self.sense_console();
                }
            }
            _ => {}
        }
        false
    }

    /// A guest reads `data.len()` bytes of memory that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if Ioapic::owns(address) {
            self.ioapic.read(address, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A guest writes `data` to memory that is not RAM. Returns whether that can have changed the result of
    /// [`Self::next_message`].
    pub fn mmio_write(&mut self, address: u64, data: &[u8], now: VmTime) -> bool {
        let owned = Ioapic::owns(address);
        if owned {
            self.advance(now);
            // The write may make the entry level-triggered.
            self.ioapic.set_line(TIMER_PIN, self.pit.output(now));
            self.ioapic.write(address, data);
        }
        owned
    }

    /// Whether `port` is one of the 8259 pair's or the timer's: any access can change the results of
    /// [`Self::interrupts`], [`Self::next_interrupt`] and [`Self::next_message`].
    #[must_use]
    pub fn is_of_controllers(port: u16) -> bool {
        Pic::owns(port) || Pit::owns(port)
    }

    /// Passes the serial port's interrupt line on, and returns whether it has risen.
    fn sense_console(&mut self) -> bool {
        let edge = self.console.take_edge();
        if edge {
            self.pic.edge(SERIAL_IRQ);
            self.ioapic.edge(SERIAL_PIN);
        }
        self.ioapic.set_line(SERIAL_PIN, self.console.interrupts());
        edge
    }

    /// Advances the timer to `now`.
    pub fn advance(&mut self, now: VmTime) {
        if self.pit.take_edge(now) {
            self.pic.edge(TIMER_IRQ);
            self.ioapic.edge(TIMER_PIN);
        }
        if self.ioapic.is_level(TIMER_PIN) {
            self.ioapic.set_line(TIMER_PIN, self.pit.output(now));
        }
    }

    /// The output of the 8259 pair, which is LINT0 of the first CPU.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.pic.interrupts()
    }

    /// When the timer will next change that output; none if it cannot.
    #[must_use]
    pub fn next_interrupt(&self) -> Option<VmTime> {
        self.pit.next_edge().filter(|_| self.pic.would_request(TIMER_IRQ))
    }

    /// Whether the I/O APIC has a message to send.
    #[must_use]
    pub fn has_message(&self) -> bool {
        self.ioapic.has_message()
    }

    /// Takes the I/O APIC's next message to the local APICs, and the pin that it is from.
    pub fn take_message(&mut self) -> Option<(u8, Ipi)> {
        self.ioapic.take_message()
    }

    /// No local APIC accepted the last message from `pin`.
    pub fn not_accepted(&mut self, pin: u8) {
        self.ioapic.not_accepted(pin);
    }

    /// A local APIC has ended the level-triggered interrupt `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    /// When the timer will next make the I/O APIC send a message, and which CPUs that is for; none if it will not.
    #[must_use]
    pub fn next_message(&self) -> Option<(VmTime, Destination)> {
        Some((self.pit.next_edge()?, self.ioapic.would_send(TIMER_PIN)?))
    }

    /// Acknowledges the 8259 pair's interrupt for the first CPU, and returns its vector.
    pub fn acknowledge(&mut self) -> u8 {
        self.pic.acknowledge()
    }

    /// Puts bytes typed at the console into the serial port's buffer, and returns how many it took.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        let took = self.console.type_in(bytes);
        self.sense_console();
        took
    }

    /// Takes the guest's request to end the machine, if there is one.
    pub fn take_exit(&mut self) -> Option<GuestExit> {
        self.exit.take()
    }

    /// Their state, for a snapshot.
    #[must_use]
    pub fn state(&self) -> SavedDevices {
        // An exit request has ended the machine, so that there is none to save.
        let Self { console, pic, ioapic, pit, exit: _ } = self;
        (console.state(), pic.state(), ioapic.state(), pit.state())
    }

    /// Devices with a saved state; `None` if they cannot have that state.
    #[must_use]
    pub fn from_state((serial, pic, ioapic, pit): &SavedDevices, out: Box<dyn Write + Send>) -> Option<Self> {
        let mut devices = Self {
            console: Console::from_state(serial, out)?,
            pic: Pic::from_state(pic)?,
            ioapic: Ioapic::from_state(ioapic)?,
            pit: Pit::from_state(pit)?,
            exit: None,
        };
        devices.ioapic.set_line(SERIAL_PIN, devices.console.interrupts());
        Some(devices)
    }

    /// Returns the console's output, for the devices that replace these.
    #[must_use]
    pub fn into_output(self) -> Box<dyn Write + Send> {
        self.console.into_output()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(Box::new(std::io::sink()))
    }

    fn at(vm: VmTime) -> Instant {
        Instant { vm, reference: VmTime(0) }
    }

    // Catches: a PM timer that follows the page, and so a fault in it.
    #[test]
    fn the_pm_timer_counts_by_the_reference_clock() {
        let mut data = [0; 4];
        let now = Instant { vm: VmTime(77), reference: VmTime(1_000_000_000) };
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
}
