//! The serial console: vm-superio's 16550 at COM1.

use std::{
    convert::Infallible,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use guest_abi::ports;
use serde::{Deserialize, Serialize};
use vm_superio::{Serial, Trigger, serial::NoEvents};

/// IIR bit 0: no interrupt is pending.
const IIR_NONE: u8 = 1;

/// The interrupt line: whether it has risen since that was last asked.
#[derive(Clone, Default)]
struct Line(Arc<AtomicBool>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Registers of a 16550, as a snapshot holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Bytes received and not yet read.
    pub in_buffer: Vec<u8>,
}

/// The console.
pub struct Console {
    serial: Serial<Line, NoEvents, Box<dyn Write + Send>>,
    line: Line,
}

impl Console {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        let line = Line::default();
        Self { serial: Serial::new(line.clone(), out), line }
    }

    /// The register at `port`, if it is one of this device's.
    pub(super) fn offset(port: u16) -> Option<u8> {
        port.checked_sub(ports::SERIAL).and_then(|offset| u8::try_from(offset).ok()).filter(|offset| *offset < 8)
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.serial.read(offset)
    }

    pub(super) fn write(&mut self, offset: u8, value: u8) {
        // An error means that the output is closed. The guest runs on.
        let _ = self.serial.write(offset, value);
    }

    /// Whether the interrupt line has risen since the last call. It rises only if the guest has enabled interrupts.
    pub(super) fn take_edge(&self) -> bool {
        self.line.0.swap(false, Ordering::Relaxed)
    }

    /// Whether the interrupt line is high: an interrupt that the guest has enabled was not read from IIR yet.
    pub(super) fn interrupts(&self) -> bool {
        self.serial.state().interrupt_identification & IIR_NONE == 0
    }

    pub(super) fn type_in(&mut self, bytes: &[u8]) -> usize {
        self.serial.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    pub(super) fn into_output(self) -> Box<dyn Write + Send> {
        self.serial.into_writer()
    }

    pub(super) fn state(&self) -> SerialState {
        let vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.serial.state();
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        }
    }

    pub(super) fn from_state(state: &SerialState, out: Box<dyn Write + Send>) -> Option<Self> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = state.clone();
        let state = vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        let line = Line::default();
        let serial = Serial::from_state(&state, line.clone(), NoEvents, out).ok()?;
        let console = Self { serial, line };
        // The interrupt controllers' state holds what this one has requested before.
        console.take_edge();
        Some(console)
    }
}
