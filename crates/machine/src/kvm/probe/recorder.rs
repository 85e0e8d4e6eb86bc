//! A bus without devices, for tiny guests.

use crate::kvm::{Bus, GpFault};

/// Records the last access, and answers every one alike.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::kvm) struct Recorder {
    /// The port of the last OUT.
    pub port: Option<u16>,
    /// The last MSR that was read or written.
    pub msr: Option<u32>,
    /// What IN, RDMSR and loads return, as far as their size goes.
    pub answer: u64,
    /// Whether MSR accesses raise #GP.
    pub fault: bool,
}

impl Recorder {
    /// Forgets the last access. The answers stay.
    pub fn forget(&mut self) {
        (self.port, self.msr) = (None, None);
    }

    fn fill(&self, data: &mut [u8]) {
        for (byte, answer) in data.iter_mut().zip(self.answer.to_le_bytes()) {
            *byte = answer;
        }
    }
}

impl Bus for Recorder {
    fn cr8(&mut self, _: u8) {}
    fn port_in(&mut self, _: u16, data: &mut [u8]) {
        self.fill(data);
    }
    fn port_out(&mut self, port: u16, _: &[u8]) {
        self.port = Some(port);
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        self.fill(data);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn msr_read(&mut self, index: u32) -> Result<u64, GpFault> {
        self.msr = Some(index);
        if self.fault { Err(GpFault) } else { Ok(self.answer) }
    }
    fn msr_write(&mut self, index: u32, _: u64) -> Result<(), GpFault> {
        self.msr = Some(index);
        if self.fault { Err(GpFault) } else { Ok(()) }
    }
}
