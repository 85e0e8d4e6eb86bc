//! The serial console: a 16550 at COM1, polled. Messages are short, because each byte is an exit to the VMM.

use core::fmt;

use guest_abi::ports::SERIAL;

use crate::arch::{cpu, port};

/// Register offsets, and the values written to them.
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
const FIFO_ON_AND_CLEAR: u8 = 0x07;
const EIGHT_BITS: u8 = 0x03;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// Bytes that the transmitter takes at once when it is empty and its FIFO on.
const FIFO_BYTES: usize = 16;
/// Polls before a byte is sent regardless, and may be lost: a console without a reader must not hang the guest.
const POLLS: u32 = 10_000;

/// The console.
pub struct Console;

impl Console {
    /// Sets the line up, with the UART's interrupts off.
    pub fn init() {
        port::outb(SERIAL + INTERRUPT_ENABLE, 0);
        port::outb(SERIAL + FIFO_CONTROL, FIFO_ON_AND_CLEAR);
        port::outb(SERIAL + LINE_CONTROL, EIGHT_BITS);
    }

    fn wait() {
        for _ in 0..POLLS {
            if port::inb(SERIAL + LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                return;
            }
            cpu::pause();
        }
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for chunk in s.as_bytes().chunks(FIFO_BYTES) {
            Self::wait();
            for byte in chunk {
                port::outb(SERIAL, *byte);
            }
        }
        Ok(())
    }
}

/// Prints a line.
macro_rules! line {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        // The console never fails.
        let _ = writeln!($crate::console::Console, $($arg)*);
    }};
}
pub(crate) use line;
