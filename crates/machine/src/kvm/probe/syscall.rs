//! SYSCALL from user mode: whether it arrives at IA32_LSTAR in supervisor mode.

use std::sync::Arc;

use guest_abi::msr::{IA32_LSTAR, IA32_STAR};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

use super::{Error, Exit, Host, Recorder, USER_SPACE, Vcpu, Vm};
use crate::{
    kvm::state::{flat_data, write_msr},
    mem::ram::GuestRam,
    x86::Leaf,
};

/// What becomes of a SYSCALL in user mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserSyscall {
    /// The guest goes on at IA32_LSTAR in supervisor mode, as on a CPU.
    Works,
    /// KVM goes on at IA32_LSTAR in user mode, which gets a page fault there.
    Faults,
    /// Neither.
    Other,
}

const TABLES: u64 = 0x1000;
const USER_CODE: u64 = 0x5000;
const KERNEL_CODE: u64 = 0x6000;
const FAULT_HANDLER: u64 = 0x6100;
const GDT: u64 = 0x7000;
const TSS: u64 = 0x7100;
const IDT: u64 = 0x8000;
const STACK: u64 = 0xa000;
const RAM_BYTES: usize = 0xa000;
/// Bits of an entry of a paging structure: present, writable, user, accessed, dirty.
const SUPERVISOR: u64 = 0x63;
const USER: u64 = 0x67;

const KERNEL_SELECTOR: u16 = 0x8;
/// The segments that SYSRET would load: 32-bit code, data, 64-bit code.
const USER_BASE: u16 = 0x18;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const HLT: [u8; 1] = [0xf4];

/// Executes a SYSCALL in user mode.
///
/// # Errors
/// If KVM fails in a way that says nothing about SYSCALL.
pub fn user_syscall(host: &Host, supported: &[Leaf]) -> Result<UserSyscall, Error> {
    let no_memory = |_| Error::last("mmap");
    let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).map_err(no_memory)?);
    let write = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).map_err(|_| Error::last("mmap"));
    for level in 0..3 {
        let table = TABLES + 0x1000 * level;
        write(table, &((table + 0x1000) | USER).to_le_bytes())?;
    }
    for page in (0..STACK).step_by(0x1000) {
        let flags = if page == USER_CODE { USER } else { SUPERVISOR };
        write(TABLES + 0x3000 + page / 0x1000 * 8, &(page | flags).to_le_bytes())?;
    }
    // Null; code and data of the kernel; then the user's, as SYSRET expects them.
    let descriptors = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffffu64,
    ];
    write(GDT, &descriptors.map(u64::to_le_bytes).concat())?;
    write(TSS + 4, &STACK.to_le_bytes())?;
    let gate = FAULT_HANDLER & 0xffff | u64::from(KERNEL_SELECTOR) << 16 | 0x8e << 40;
    write(IDT + 16 * 14, &gate.to_le_bytes())?;
    for (at, code) in [(USER_CODE, &SYSCALL[..]), (KERNEL_CODE, &HLT), (FAULT_HANDLER, &HLT)] {
        write(at, code)?;
    }
    let vm = Vm::new(host, Arc::clone(&memory), USER_SPACE)?;
    let mut vcpu = Vcpu::new(&vm, 0, supported)?;
    enter_user_mode(&mut vcpu)?;
    let mut seen = Recorder::default();
    let exit = vcpu.run(&mut seen)?;
    let registers = vcpu.registers();
    Ok(match (exit, registers.rip.wrapping_sub(1), registers.cpl) {
        (Exit::Halt, KERNEL_CODE, 0) => UserSyscall::Works,
        (Exit::Halt, FAULT_HANDLER, 0) => UserSyscall::Faults,
        _ => UserSyscall::Other,
    })
}

fn enter_user_mode(vcpu: &mut Vcpu) -> Result<(), Error> {
    let (_, mut system) = *vcpu.fresh;
    let data = kvm_segment { dpl: 3, ..flat_data((USER_BASE + 8) | 3) };
    system.cs = kvm_segment { selector: (USER_BASE + 16) | 3, type_: 11, db: 0, l: 1, ..data };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS.
    system.tr = kvm_segment { base: TSS, limit: 0x67, type_: 11, present: 1, ..Default::default() };
    system.gdt = kvm_dtable { base: GDT, limit: 0x2f, ..Default::default() };
    system.idt = kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() };
    // PG, NE, ET, PE; PAE; LMA, LME, SCE.
    (system.cr0, system.cr4, system.efer) = (0x8000_0031, 0x20, 0x501);
    system.cr3 = TABLES;
    vcpu.fd.set_sregs(&system).map_err(Error::call("KVM_SET_SREGS"))?;
    write_msr(&vcpu.fd, IA32_STAR, u64::from(USER_BASE) << 48 | u64::from(KERNEL_SELECTOR) << 32)?;
    write_msr(&vcpu.fd, IA32_LSTAR, KERNEL_CODE)?;
    let regs = kvm_regs { rip: USER_CODE, rflags: 2, ..Default::default() };
    vcpu.fd.set_regs(&regs).map_err(Error::call("KVM_SET_REGS"))?;
    vcpu.incomplete = true;
    Ok(())
}
