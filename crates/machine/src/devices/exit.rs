//! The ports with which a guest ends the machine.

/// A guest's request to end the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestExit {
    /// A code at the debug-exit port; 0 is success.
    Debug(u32),
    /// The keyboard controller's reset.
    Reset,
    /// ACPI's power-off.
    PowerOff,
}

impl GuestExit {
    /// The code in an OUT of one to four bytes, as QEMU's `isa-debug-exit` takes it.
    pub(super) fn from_debug_port(data: &[u8]) -> Self {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        Self::Debug(u32::from_le_bytes(bytes))
    }
}
