//! The interface through which a vCPU's accesses are emulated.

/// The access faults: #GP(0) is to be raised in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpFault;

/// Emulates a vCPU's I/O, MMIO and MSR accesses. Data is little endian, as long as the access.
pub trait Bus {
    /// Takes the guest's CR8 at this exit. It is called before the method for the exit's access, so that a MOV CR8 and
    /// a later write of TPR keep their order.
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

/// The kind of an access that the [`Bus`] has emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// IN or OUT.
    Port,
    /// A load or store outside RAM.
    Mmio,
    /// RDMSR or WRMSR.
    Msr,
}
