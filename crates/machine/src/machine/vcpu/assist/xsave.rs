//! Performs XSETBV, XGETBV, and the instructions that save and restore registers in an XSAVE area.
//!
//! By the SDM's descriptions: vol. 2, and vol. 1, "Managing State Using the XSAVE Feature Set". Supervisor components,
//! which IA32_XSS enables, are not covered. Where a CPU may choose: a component is not in use if it has its
//! initial value, and nothing is left out because it has not changed since the last XRSTOR.

use iced_x86::{Instruction, Mnemonic};

use super::{
    Stop,
    instruction::{CR0_TS, Extended},
    operand::State,
    walk::Purpose,
    xsave_area::{Form, Header, restore, saved},
};
use crate::{
    host::xstate::{components, mxcsr_mask},
    kvm::{Exception, state::HEAD_BYTES},
};

pub(super) const CR4_OSXSAVE: u64 = 1 << 18;
/// XGETBV's number for XCR0 without unused components.
const IN_USE: u64 = 1;
/// The alignment of an area.
const ALIGNMENT: u64 = 64;

/// Whether [`perform`] has `mnemonic`, but for XGETBV and XSETBV.
pub(super) fn is_xsave(mnemonic: Mnemonic) -> bool {
    form(mnemonic).is_some() || is_restore(mnemonic)
}

fn form(mnemonic: Mnemonic) -> Option<Form> {
    Some(match mnemonic {
        Mnemonic::Xsave | Mnemonic::Xsave64 => Form::Standard,
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => Form::Optimised,
        Mnemonic::Xsavec | Mnemonic::Xsavec64 | Mnemonic::Xsaves | Mnemonic::Xsaves64 => Form::Compacted,
        _ => return None,
    })
}

fn is_restore(mnemonic: Mnemonic) -> bool {
    is_supervisor_restore(mnemonic) || matches!(mnemonic, Mnemonic::Xrstor | Mnemonic::Xrstor64)
}

fn is_supervisor_restore(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Xrstors | Mnemonic::Xrstors64)
}

/// Whether pointers have 64 bits in the area, with REX.W, and no segments.
fn is_wide(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaves64
            | Mnemonic::Xrstor64
            | Mnemonic::Xrstors64
    )
}

/// Performs `instruction`, for which [`is_xsave`] is true, or XGETBV or XSETBV.
pub(super) fn perform(state: &mut State<'_>, instruction: &Instruction, extended: &impl Extended) -> Result<(), Stop> {
    if state.system.cr4 & CR4_OSXSAVE == 0 {
        return Err(Stop::Raise(Exception::INVALID_OPCODE));
    }
    let xcr0 = extended.xcr0()?.ok_or(Stop::NotCovered)?;
    let registers = &state.registers;
    let (number, value) = (registers.rcx & 0xffff_ffff, registers.rdx << 32 | registers.rax & 0xffff_ffff);
    match instruction.mnemonic() {
        Mnemonic::Xgetbv => {
            let result = match number {
                0 => xcr0,
                IN_USE => xcr0 & extended.xsave_area()?.in_use(),
                _ => return Err(Stop::Raise(Exception::GENERAL_PROTECTION)),
            };
            (state.registers.rax, state.registers.rdx) = (result & 0xffff_ffff, result >> 32);
            Ok(())
        }
        Mnemonic::Xsetbv if number == 0 && extended.set_xcr0(value)? => Ok(()),
        Mnemonic::Xsetbv => Err(Stop::Raise(Exception::GENERAL_PROTECTION)),
        mnemonic => {
            if state.system.cr0 & CR0_TS != 0 {
                return Err(Stop::Raise(Exception::DEVICE_NOT_AVAILABLE));
            }
            let is_supervisors =
                matches!(mnemonic, Mnemonic::Xsaves | Mnemonic::Xsaves64) || is_supervisor_restore(mnemonic);
            if is_supervisors && value & extended.xss()? != 0 {
                return Err(Stop::NotCovered);
            }
            match form(mnemonic) {
                Some(form) => save(state, instruction, extended, (form, xcr0 & value)),
                None => load(state, instruction, extended, (xcr0, xcr0 & value)),
            }
        }
    }
}

/// Saves the components `chosen`.
fn save(
    state: &mut State<'_>,
    instruction: &Instruction,
    extended: &impl Extended,
    (form, chosen): (Form, u64),
) -> Result<(), Stop> {
    let area = extended.xsave_area()?;
    let wide = is_wide(instruction.mnemonic());
    let parts = saved(&area, form, wide, chosen, components()).ok_or(Stop::NotCovered)?;
    let end = parts.iter().map(|(at, bytes)| at + bytes.len()).max().unwrap_or(0).max(HEAD_BYTES);
    let linear = aligned(state, instruction, end, Purpose::Store)?;
    let place = |at: usize| linear.wrapping_add(u64::try_from(at).unwrap_or(0));
    // Nothing is written if any of it faults.
    let mut all: Vec<_> = parts.iter().map(|(at, bytes)| (*at, bytes.len())).collect();
    all.push((Header::AT, Header::BYTES));
    all.sort_unstable();
    for (at, bytes) in all {
        state.check_store(place(at), bytes)?;
    }
    let mut header = [0; Header::BYTES];
    state.load_bytes(place(Header::AT), &mut header)?;
    for (at, bytes) in parts {
        state.store_bytes(place(at), &bytes)?;
    }
    let written = Header::of(&header).saved(form, chosen, area.in_use());
    state.store_bytes(place(Header::AT), &written)
}

/// Restores the components `chosen` of those in `xcr0`.
fn load(
    state: &mut State<'_>,
    instruction: &Instruction,
    extended: &impl Extended,
    (xcr0, chosen): (u64, u64),
) -> Result<(), Stop> {
    let gp = || Stop::Raise(Exception::GENERAL_PROTECTION);
    let linear = aligned(state, instruction, HEAD_BYTES, Purpose::Load)?;
    let mut head = [0; HEAD_BYTES];
    state.load_bytes(linear, &mut head)?;
    let header = Header::of(head.get(Header::AT..).unwrap_or_default());
    if !header.is_valid(xcr0) || is_supervisor_restore(instruction.mnemonic()) && !header.is_compacted() {
        return Err(gp());
    }
    let end = header.end(chosen, components()).ok_or(Stop::NotCovered)?;
    aligned(state, instruction, end, Purpose::Load)?;
    let mut area = extended.xsave_area()?;
    let wide = is_wide(instruction.mnemonic());
    let extended_parts = restore(&mut area, &head, wide, chosen, components()).ok_or(Stop::NotCovered)?;
    for (to, from, size) in extended_parts {
        let mut bytes = vec![0; size];
        state.load_bytes(linear.wrapping_add(u64::try_from(from).unwrap_or(0)), &mut bytes)?;
        area.put(to, &bytes);
    }
    if area.mxcsr() & !mxcsr_mask() != 0 {
        return Err(gp());
    }
    Ok(extended.set_xsave_area(&area)?)
}

/// The linear address of the area, of which the first `bytes` are accessed.
fn aligned(state: &mut State<'_>, instruction: &Instruction, bytes: usize, purpose: Purpose) -> Result<u64, Stop> {
    let linear = state.linear(instruction, 0, bytes, purpose)?;
    if linear.is_multiple_of(ALIGNMENT) { Ok(linear) } else { Err(Stop::Raise(Exception::GENERAL_PROTECTION)) }
}
