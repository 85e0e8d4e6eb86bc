//! The devices: a serial console, a PC's interrupt controllers, interval timer and real-time clock, and ports with
//! which a guest ends the machine.
//!
//! They are everything that a guest can access besides RAM and its LAPIC. Other addresses read as all ones, as on a
//! PC's bus, and writes to them are ignored. Devices do not depend on KVM, and time is an argument.

mod exit;
mod ioapic;
mod pic;
mod pit;
mod pm;
mod rtc;
mod serial;

use std::io::Write;

use guest_abi::ports;

pub use exit::GuestExit;
pub use ioapic::{Ioapic, IoapicState};
pub use pic::{ChipState, Expects, Pic, PicState};
pub use pit::{AccessMode, ChannelState, Counting, Pit, PitState};
pub use rtc::{Rtc, RtcState};
pub use serial::{Console, SerialState};

use vlapic::{DeliveryMode, Destination, Ipi};
use vmtime::VmTime;

/// The timer's input of the 8259 pair, and that of the serial port.
const TIMER_IRQ: u8 = 0;
const SERIAL_IRQ: u8 = 4;
/// Their pins of the I/O APIC. In a PC the timer's is another one than its IRQ; the MADT says so.
const TIMER_PIN: u8 = guest_abi::ioapic::TIMER_PIN;
const SERIAL_PIN: u8 = SERIAL_IRQ;

/// One instant, by three clocks.
#[derive(Clone, Copy, Debug)]
pub struct Instant {
    /// VM time by the machine's kvmclock page.
    pub vm: VmTime,
    /// VM time by the reference clock, which uses no page.
    pub reference: VmTime,
    /// The VM's wall clock, in nanoseconds since the Unix epoch.
    pub wall_ns: u64,
}

/// The devices.
pub struct Devices {
    console: Console,
    pic: Pic,
    ioapic: Ioapic,
    pit: Pit,
    rtc: Rtc,
    exit: Option<GuestExit>,
}

/// The state of the devices for a snapshot: of the serial port, the 8259 pair, the I/O APIC, the timer and the
/// real-time clock.
pub type SavedDevices = (SerialState, PicState, IoapicState, PitState, RtcState);

impl Devices {
    /// Fresh devices; the console writes to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            console: Console::new(out),
            pic: Pic::default(),
            ioapic: Ioapic::default(),
            pit: Pit::default(),
            rtc: Rtc::default(),
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
    /// The PM timer counts by the reference clock, the real-time clock shows the wall clock, and all else goes by the
    /// page: so that a fault in the page does not change the clock by which a guest could notice it.
    pub fn port_in(&mut self, port: u16, data: &mut [u8], now: Instant) {
        data.fill(0xff);
        let Instant { vm: now, reference, wall_ns } = now;
        if Self::is_of_controllers(port) {
            self.advance(now);
            // The registers are one byte wide: a wider access is one to several ports.
            for (port, byte) in (port..).zip(data) {
                *byte = match port {
                    port if Pit::owns(port) => self.pit.read(port, now),
                    port => self.pic.read(port),
                };
            }
        } else if Rtc::owns(port) {
            for (port, byte) in (port..).zip(data).filter(|(port, _)| Rtc::owns(*port)) {
                *byte = self.rtc.read(port, wall_ns);
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
            (port, data) if Rtc::owns(port) => {
                for (port, byte) in (port..).zip(data).filter(|(port, _)| Rtc::owns(*port)) {
                    self.rtc.write(port, *byte);
                }
            }
            (ports::DEBUG_EXIT, data) if !data.is_empty() => self.exit = Some(GuestExit::from_debug_port(data)),
            (port, data) if pm::powers_off(port, data) => self.exit = Some(GuestExit::PowerOff),
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
    /// [`Self::next_message`]. Messages from before should have been taken: the write can change the entries by which
    /// they are sent.
    pub fn mmio_write(&mut self, address: u64, data: &[u8], now: VmTime) -> bool {
        let owned = Ioapic::owns(address);
        if owned {
            // The write may make the timer's entry level-triggered.
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

    /// When the timer will next make the I/O APIC send a message, which one, and which CPUs it is for; none if it will
    /// not.
    #[must_use]
    pub fn next_message(&self) -> Option<(VmTime, (DeliveryMode, Destination))> {
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
        let Self { console, pic, ioapic, pit, rtc, exit: _ } = self;
        (console.state(), pic.state(), ioapic.state(), pit.state(), rtc.state())
    }

    /// Devices with a saved state; `None` if they cannot have that state.
    #[must_use]
    pub fn from_state((serial, pic, ioapic, pit, rtc): &SavedDevices, out: Box<dyn Write + Send>) -> Option<Self> {
        let mut devices = Self {
            console: Console::from_state(serial, out)?,
            pic: Pic::from_state(pic)?,
            ioapic: Ioapic::from_state(ioapic)?,
            pit: Pit::from_state(pit)?,
            rtc: Rtc::from_state(rtc)?,
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
mod tests;
