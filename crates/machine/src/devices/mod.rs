//! The devices: a serial console, a PC's interrupt controllers and interval timer, and two ports with which a guest
//! ends the machine.
//!
//! They are everything that a guest can access besides RAM and its LAPIC. Other addresses read as all ones, as on a
//! PC's bus, and writes to them are ignored. Devices do not depend on KVM, and time is an argument.

mod exit;
mod pic;
mod pit;
mod pm;
mod serial;

use std::io::Write;

use guest_abi::ports;

pub use exit::GuestExit;
pub use pic::{ChipState, Expects, Pic, PicState};
pub use pit::{AccessMode, ChannelState, Counting, Pit, PitState};
pub use serial::{Console, SerialState};

use vmtime::VmTime;

/// The timer's input of the 8259 pair, and that of the serial port.
const TIMER_IRQ: u8 = 0;
const SERIAL_IRQ: u8 = 4;

/// One instant, by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Instant {
    /// VM time by the machine's kvmclock page.
    pub vm: VmTime,
    /// VM time by the reference clock, which uses no page.
    pub reference: VmTime,
}

/// The devices on the port bus.
pub struct Devices {
    console: Console,
    pic: Pic,
    pit: Pit,
    exit: Option<GuestExit>,
}

impl Devices {
    /// Fresh devices; the console writes to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { console: Console::new(out), pic: Pic::default(), pit: Pit::default(), exit: None }
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

    /// Whether `port` is one of the interrupt controllers' or the timer's: any access can change the results of
    /// [`Self::interrupts`] and [`Self::next_interrupt`].
    #[must_use]
    pub fn is_of_controllers(port: u16) -> bool {
        Pic::owns(port) || Pit::owns(port)
    }

    /// Passes an edge of the serial port's interrupt line on, and returns whether there was one.
    fn sense_console(&mut self) -> bool {
        let edge = self.console.take_edge();
        if edge {
            self.pic.edge(SERIAL_IRQ);
        }
        edge
    }

    /// Advances the timer to `now`.
    pub fn advance(&mut self, now: VmTime) {
        if self.pit.take_edge(now) {
            self.pic.edge(TIMER_IRQ);
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

    /// The state of the serial port, the interrupt controllers and the timer, for a snapshot.
    #[must_use]
    pub fn state(&self) -> (SerialState, PicState, PitState) {
        // An exit request has ended the machine, so that there is none to save.
        let Self { console, pic, pit, exit: _ } = self;
        (console.state(), pic.state(), pit.state())
    }

    /// Devices with a saved state; `None` if they cannot have that state.
    #[must_use]
    pub fn from_state(
        serial: &SerialState,
        pic: &PicState,
        pit: &PitState,
        out: Box<dyn Write + Send>,
    ) -> Option<Self> {
        let (pic, pit) = (Pic::from_state(pic)?, Pit::from_state(pit)?);
        Some(Self { console: Console::from_state(serial, out)?, pic, pit, exit: None })
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
        let (serial, pic, pit) = devices.state();
        let mut restored = Devices::from_state(&serial, &pic, &pit, Box::new(std::io::sink())).unwrap();
        assert!(restored.interrupts());
        assert_eq!(restored.acknowledge(), 12);
        // The scratch register: whatever the restore itself has raised would be passed on.
        restored.port_out(data + 7, &[0], VmTime(0));
        restored.port_out(0x20, &[0x20], VmTime(0));
        assert!(!restored.interrupts());
        let (serial, pic, pit) = restored.state();
        let mut again = Devices::from_state(&serial, &pic, &pit, Box::new(std::io::sink())).unwrap();
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
