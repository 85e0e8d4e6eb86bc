//! The few devices: a serial console, and two ports by which a guest ends the machine.
//!
//! Everything a guest can address besides RAM and its LAPIC. Accesses nobody answers read as all ones, as on a PC bus,
//! and are ignored when written. Devices know no time and no KVM.

mod exit;
mod serial;

use std::io::Write;

use guest_abi::ports;

pub use exit::GuestExit;
pub use serial::{Console, SerialState};

/// The port bus and what is on it.
pub struct Devices {
    console: Console,
    exit: Option<GuestExit>,
}

impl Devices {
    /// Fresh devices; what the guest prints goes to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { console: Console::new(out), exit: None }
    }

    /// IN: fills `data`.
    pub fn port_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(offset), [value]) = (Console::offset(port), &mut *data) {
            *value = self.console.read(offset);
        } else if port == ports::I8042_COMMAND {
            // Status: both buffers empty, so that a guest may write its reset at once.
            data.fill(0);
        }
    }

    /// OUT.
    pub fn port_out(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (ports::DEBUG_EXIT, data) if !data.is_empty() => self.exit = Some(GuestExit::from_debug_port(data)),
            (ports::I8042_COMMAND, [ports::I8042_RESET]) => self.exit = Some(GuestExit::Reset),
            (port, [value]) => {
                if let Some(offset) = Console::offset(port) {
                    self.console.write(offset, *value);
                }
            }
            _ => {}
        }
    }

    /// Bytes typed at the console; gives how many the serial port's buffer took.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        self.console.type_in(bytes)
    }

    /// What the guest asked for, once.
    pub fn take_exit(&mut self) -> Option<GuestExit> {
        self.exit.take()
    }

    /// The serial port's state, for a snapshot.
    #[must_use]
    pub fn serial_state(&self) -> SerialState {
        self.console.state()
    }

    /// Devices as they were saved; `None` if the state is not one a serial port can have.
    #[must_use]
    pub fn from_state(serial: &SerialState, out: Box<dyn Write + Send>) -> Option<Self> {
        Some(Self { console: Console::from_state(serial, out)?, exit: None })
    }

    /// Takes the console's output away, for the devices that go on in its place.
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

    #[test]
    fn debug_exit_takes_any_width() {
        for (data, code) in [(&[3u8][..], 3), (&[3, 1], 0x103), (&[3, 0, 0, 0], 3)] {
            let mut devices = devices();
            devices.port_out(ports::DEBUG_EXIT, data);
            assert_eq!(devices.take_exit(), Some(GuestExit::Debug(code)));
            assert_eq!(devices.take_exit(), None);
        }
    }

    #[test]
    fn the_keyboard_controller_resets_only_on_its_reset_command() {
        let mut devices = devices();
        devices.port_out(ports::I8042_COMMAND, &[0xd1]);
        assert_eq!(devices.take_exit(), None);
        devices.port_out(ports::I8042_COMMAND, &[ports::I8042_RESET]);
        assert_eq!(devices.take_exit(), Some(GuestExit::Reset));
    }

    #[test]
    fn an_absent_port_reads_all_ones() {
        let mut data = [0; 4];
        devices().port_in(0x1234, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
