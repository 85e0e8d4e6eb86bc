//! The state in which a vCPU starts.

/// ESP of a loaded image: RAM below all boot data. The boot protocols promise no stack, but PC firmware leaves one, and
/// Nanos makes calls before it sets its own.
pub const ENTRY_STACK: u64 = 0x6000;

/// The state in which a loaded image is entered, in flat 32-bit protected mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryState {
    /// First instruction.
    pub rip: u64,
    /// EAX: Multiboot's magic number.
    pub rax: u64,
    /// EBX: the address of the PVH start info or of the Multiboot information.
    pub rbx: u64,
    /// ESI: the address of Linux' boot parameters.
    pub rsi: u64,
    /// The address and limit of a GDT with flat segments at selectors 0x10 (code) and 0x18, which are then loaded.
    pub gdt: Option<(u64, u16)>,
    /// The guest expects the state in which a PC's firmware leaves the interrupt controllers: the 8259 pair's
    /// interrupts reach the first CPU.
    pub pc: bool,
}
