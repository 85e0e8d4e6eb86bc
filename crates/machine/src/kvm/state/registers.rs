//! General, segment and control registers.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use serde::{Deserialize, Serialize};

/// Declares a saved type with the given fields of a KVM structure, and both conversions, which name every field.
macro_rules! mirror {
    ($(#[$meta:meta])* $name:ident = $kvm:ident { $($field:ident: $type:ty = $doc:literal,)* } without { $($skipped:ident,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $(#[doc = $doc] pub $field: $type,)*
        }

        impl $name {
            pub(super) fn from_kvm(kvm: &$kvm) -> Self {
                let $kvm { $($field,)* $($skipped: _,)* } = *kvm;
                Self { $($field: $field.into(),)* }
            }

            pub(super) fn to_kvm(self) -> $kvm {
                let Self { $($field,)* } = self;
                $kvm { $($field: $field.into(),)* $($skipped: Default::default(),)* }
            }
        }

        impl From<$kvm> for $name {
            fn from(kvm: $kvm) -> Self {
                Self::from_kvm(&kvm)
            }
        }

        impl From<$name> for $kvm {
            fn from(saved: $name) -> Self {
                saved.to_kvm()
            }
        }
    };
}

mirror! {
    /// General registers, instruction pointer and flags.
    GeneralRegisters = kvm_regs {
        rax: u64 = "RAX.", rbx: u64 = "RBX.", rcx: u64 = "RCX.", rdx: u64 = "RDX.",
        rsi: u64 = "RSI.", rdi: u64 = "RDI.", rsp: u64 = "RSP.", rbp: u64 = "RBP.",
        r8: u64 = "R8.", r9: u64 = "R9.", r10: u64 = "R10.", r11: u64 = "R11.",
        r12: u64 = "R12.", r13: u64 = "R13.", r14: u64 = "R14.", r15: u64 = "R15.",
        rip: u64 = "RIP.", rflags: u64 = "RFLAGS.",
    } without {}
}

mirror! {
    /// A segment register with its hidden part.
    Segment = kvm_segment {
        base: u64 = "Base address.", limit: u32 = "Limit, in bytes.", selector: u16 = "Selector.",
        type_: u8 = "Descriptor type.", present: u8 = "P.", dpl: u8 = "DPL.", db: u8 = "D/B.", s: u8 = "S.",
        l: u8 = "L.", g: u8 = "G.", avl: u8 = "AVL.", unusable: u8 = "KVM's mark of a null segment.",
    } without { padding, }
}

mirror! {
    /// GDTR or IDTR.
    Table = kvm_dtable {
        base: u64 = "Base address.", limit: u16 = "Limit, in bytes.",
    } without { padding, }
}

mirror! {
    /// Segments, tables, control registers, EFER and the APIC base.
    SystemRegisters = kvm_sregs {
        cs: Segment = "CS.", ds: Segment = "DS.", es: Segment = "ES.", fs: Segment = "FS.", gs: Segment = "GS.",
        ss: Segment = "SS.", tr: Segment = "TR.", ldt: Segment = "LDTR.", gdt: Table = "GDTR.", idt: Table = "IDTR.",
        cr0: u64 = "CR0.", cr2: u64 = "CR2.", cr3: u64 = "CR3.", cr4: u64 = "CR4.", cr8: u64 = "CR8.",
        efer: u64 = "EFER.", apic_base: u64 = "IA32_APIC_BASE.",
        interrupt_bitmap: [u64; 4] = "The external interrupt being delivered, as a bit.",
    } without {}
}

/// A flat, writable data segment of 4 GiB, whose descriptor is at `selector`.
pub(in crate::kvm) fn flat_data(selector: u16) -> kvm_segment {
    kvm_segment { limit: 0xffff_ffff, selector, type_: 3, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

/// The code and stack segments that SYSCALL loads for bits 47:32 of IA32_STAR (SDM vol. 2, "SYSCALL").
pub(in crate::kvm) fn syscall_segments(star: u16) -> (kvm_segment, kvm_segment) {
    let flat = flat_data(star.wrapping_add(8));
    (kvm_segment { selector: star & 0xfffc, type_: 11, db: 0, l: 1, ..flat }, flat)
}

/// Sets flat 4 GiB segments, protected mode, no paging. With a GDT (address, limit) the segments are those at its
/// selectors 0x10 and 0x18. Without one, the guest must load its own GDT before it can load a segment.
pub(super) fn make_flat_32bit(system: &mut kvm_sregs, gdt: Option<(u64, u16)>) {
    let (code_selector, data_selector) = if gdt.is_some() { (0x10, 0x18) } else { (0x8, 0x10) };
    if let Some((base, limit)) = gdt {
        system.gdt = kvm_dtable { base, limit, ..Default::default() };
    }
    let data = flat_data(data_selector);
    system.cs = kvm_segment { selector: code_selector, type_: 11, ..data };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS, limit 0x67: what the PVH boot protocol asks for.
    system.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    // CR0: PE and ET.
    system.cr0 = 0x11;
    system.cr4 = 0;
    system.efer = 0;
}
