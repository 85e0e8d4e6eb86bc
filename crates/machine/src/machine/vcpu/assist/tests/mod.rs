//! Tests of the assists without KVM: a vCPU is its registers, and RAM is RAM.

mod on_cpu;
mod operand;
mod perform;
mod syscall;
mod walk;
mod x87;
mod xsave;

use std::cell::{Cell, RefCell};

use iced_x86::{Decoder, DecoderOptions, Instruction};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Stop,
    instruction::{Extended, perform},
    operand::State,
    walk::Paging,
};
use crate::{
    host::x87::X87,
    kvm::{
        Error, Exception,
        state::{GeneralRegisters, Segment, SystemRegisters, XsaveArea},
    },
    mem::ram::{self, GuestRam},
};

/// Where tests put their page tables, from the topmost level down, a page each.
const TABLES: u64 = 0x10_0000;

/// The registers that XSAVE saves, XCR0, and IA32_XSS.
struct Fpu {
    xcr0: Cell<Option<u64>>,
    xss: u64,
    area: RefCell<XsaveArea>,
}

impl Fpu {
    fn new(xcr0: Option<u64>, fsw: u16) -> Self {
        let mut area = XsaveArea::initial();
        area.set_x87(&X87 { fsw, ..area.x87() });
        Self { xcr0: Cell::new(xcr0), xss: 0, area: RefCell::new(area) }
    }

    fn x87(&self) -> X87 {
        self.area.borrow().x87()
    }
}

impl Extended for Fpu {
    fn xcr0(&self) -> Result<Option<u64>, Error> {
        Ok(self.xcr0.get())
    }

    // A CPU that has x87, SSE and AVX, and does not check that they are sensible together.
    fn set_xcr0(&self, value: u64) -> Result<bool, Error> {
        let is_taken = value & !7 == 0 && value & 1 != 0;
        if is_taken {
            self.xcr0.set(Some(value));
        }
        Ok(is_taken)
    }

    fn xss(&self) -> Result<u64, Error> {
        Ok(self.xss)
    }

    fn xsave_area(&self) -> Result<XsaveArea, Error> {
        Ok(XsaveArea::from_bytes(self.area.borrow().bytes().to_vec()))
    }

    fn set_xsave_area(&self, area: &XsaveArea) -> Result<(), Error> {
        *self.area.borrow_mut() = area.clone();
        Ok(())
    }
}

fn memory() -> GuestRam {
    ram::allocate(2 << 20).unwrap()
}

/// A flat segment of 4 GiB: data that may be written, or code that may be read.
fn flat(code: bool) -> Segment {
    let type_ = if code { 11 } else { 3 };
    Segment { limit: 0xffff_ffff, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

/// 64-bit mode with four levels of page tables, write protection and NX.
fn long_mode() -> SystemRegisters {
    let data = flat(false);
    let cs = Segment { l: 1, db: 0, ..flat(true) };
    SystemRegisters {
        cs,
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        cr0: 0x8001_0001,
        cr3: TABLES,
        cr4: 0x20,
        efer: 0xd00,
        ..Default::default()
    }
}

/// Protected mode without paging, of 32 bits.
fn protected_mode() -> SystemRegisters {
    let data = flat(false);
    SystemRegisters { cs: flat(true), ds: data, es: data, ss: data, fs: data, gs: data, cr0: 1, ..Default::default() }
}

fn put<T: vm_memory::ByteValued>(memory: &GuestRam, at: u64, value: T) {
    memory.write_obj(value, GuestAddress(at)).unwrap();
}

/// Maps the page at `linear` by four levels, each of which has a table of its own: `leaf` is the last entry.
fn map(memory: &GuestRam, linear: u64, leaf: u64) {
    for (level, shift) in [39, 30, 21, 12].into_iter().enumerate() {
        let table = TABLES + 0x1000 * level as u64;
        let entry = if shift == 12 { leaf } else { (table + 0x1000) | 7 };
        put(memory, table + (linear >> shift & 0x1ff) * 8, entry);
    }
}

/// The entry of the last level that [`map`] wrote.
fn leaf_of(memory: &GuestRam, linear: u64) -> u64 {
    memory.read_obj(GuestAddress(TABLES + 0x3000 + (linear >> 12 & 0x1ff) * 8)).unwrap()
}

fn bits(system: &SystemRegisters) -> u32 {
    if system.cs.l != 0 { 64 } else { 32 }
}

fn state<'a>(memory: &'a GuestRam, system: &'a SystemRegisters, registers: GeneralRegisters) -> State<'a> {
    let paging = Paging::new(system, registers.rflags & 1 << 18 != 0);
    State { registers, system, paging, memory, bits: bits(system) }
}

fn decode(code: &[u8], bits: u32) -> Instruction {
    let instruction = Decoder::with_ip(bits, code, 0, DecoderOptions::NONE).decode();
    assert!(!instruction.is_invalid() && instruction.len() == code.len(), "{code:02x?}");
    instruction
}

/// Performs `code`. Returns the registers after it and the exception that it raised as its effect.
fn run(
    memory: &GuestRam,
    system: &SystemRegisters,
    registers: GeneralRegisters,
    code: &[u8],
) -> Result<(GeneralRegisters, Option<Exception>), Stop> {
    let mut state = state(memory, system, registers);
    let raised = perform(&mut state, &decode(code, bits(system)), code, &Fpu::new(Some(7), 0))?;
    Ok((state.registers, raised))
}

/// The exception with which `result` ended.
#[track_caller]
fn fault<T: std::fmt::Debug>(result: Result<T, Stop>) -> Exception {
    match result {
        Err(Stop::Raise(exception)) => exception,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn not_covered<T: std::fmt::Debug>(result: Result<T, Stop>) {
    assert!(matches!(result, Err(Stop::NotCovered)), "{result:?}");
}
