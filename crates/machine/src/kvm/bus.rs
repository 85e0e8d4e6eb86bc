//! Where a vCPU's accesses go.

/// The access faults: #GP(0) is to be raised in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpFault;

/// Where a vCPU's I/O, MMIO and MSR accesses go. Data is little endian, as long as the access.
pub trait Bus {
    /// The guest's CR8 at this exit: told before the access that follows, so that MOV CR8 and a write of TPR keep their
    /// order.
    fn cr8(&mut self, cr8: u8);
    /// IN from `port`.
    fn port_in(&mut self, port: u16, data: &mut [u8]);
    /// OUT to `port`.
    fn port_out(&mut self, port: u16, data: &[u8]);
    /// A load from a guest physical address without RAM.
    fn mmio_read(&mut self, address: u64, data: &mut [u8]);
    /// A store to a guest physical address without RAM.
    fn mmio_write(&mut self, address: u64, data: &[u8]);
    /// RDMSR of an MSR that exits.
    ///
    /// # Errors
    /// [`GpFault`] if it is to fault.
    fn msr_read(&mut self, index: u32) -> Result<u64, GpFault>;
    /// WRMSR of an MSR that exits.
    ///
    /// # Errors
    /// [`GpFault`] if it is to fault.
    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), GpFault>;
}

/// What kind of access was answered by the [`Bus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// IN or OUT.
    Port,
    /// A load or store outside RAM.
    Mmio,
    /// RDMSR or WRMSR.
    Msr,
}
