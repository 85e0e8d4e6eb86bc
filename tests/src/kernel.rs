//! Kernels of a few instructions that have interrupt handlers, and perhaps a second CPU.
//!
//! They are PVH images at 0x8000, in flat 32-bit mode without paging. They run in virtual time
//! too. Virtual time needs trap sites: these are an RDTSC and a PAUSE, which [`read_tsc`] executes.

use guest_abi::{lapic, sites::Kind};

use crate::raw;

/// Where the image is loaded, and what it has where.
const BASE: u32 = 0x8000;
const SECOND: u32 = BASE + 0x800;
const HANDLERS: u32 = BASE + 0xc00;
const HANDLER_BYTES: u32 = 0x40;
/// A page of its own: a start-up message names it.
const TRAMPOLINE: u32 = BASE + 0x1000;
const GDT: u32 = BASE + 0x1800;
const GDTR: u32 = BASE + 0x1820;
const IDTR: u32 = BASE + 0x1828;
const SITE: u32 = BASE + 0x1c00;
const IDT: u32 = BASE + 0x2000;
const DATA: u32 = BASE + 0x3000;
const END: u32 = BASE + 0x4000;
/// Where the CPUs' stacks end.
const STACKS: [u32; 2] = [0x7_0000, 0x7_8000];

/// Where the xAPIC is after reset.
const APIC: u32 = 0xfee0_0000;
/// Registers of the xAPIC.
pub const EOI: u32 = APIC + lapic::EOI;
/// Spurious vector and software enable.
pub const SVR: u32 = APIC + lapic::SVR;
/// Lower half of the interrupt command register: a write sends.
pub const ICR: u32 = APIC + lapic::ICR;
/// Its upper half: the destination in bits 31:24.
pub const ICR_HIGH: u32 = APIC + lapic::ICR_HIGH;
/// Timer entry of the local vector table.
pub const LVTT: u32 = APIC + lapic::LVTT;
/// LINT0 entry.
pub const LINT0: u32 = APIC + lapic::LVT_LINT0;
/// Initial count.
pub const TMICT: u32 = APIC + lapic::TMICT;
/// Divide configuration.
pub const TDCR: u32 = APIC + lapic::TDCR;

/// Conditions of a jump.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub enum If {
    /// Unsigned less.
    Below = 2,
    /// Equal.
    Equal = 4,
    /// Not equal.
    NotEqual = 5,
}

/// A 32-bit word of the kernel's own: the number of interrupts at `vector`, where [`Kernel::counting`] counts them.
#[must_use]
pub fn count(vector: u8) -> u32 {
    DATA + 4 * u32::from(vector)
}

/// A 32-bit word of the kernel's own, 0 at first.
#[must_use]
pub fn word(number: u32) -> u32 {
    DATA + 0x800 + 4 * number
}

/// `mov dword [address], value`.
#[must_use]
pub fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// `inc dword [address]`.
#[must_use]
pub fn increment(address: u32) -> Vec<u8> {
    [&[0xff, 0x05][..], &address.to_le_bytes()].concat()
}

/// `cmp dword [address], value`.
#[must_use]
pub fn compare(address: u32, value: u32) -> Vec<u8> {
    [&[0x81, 0x3d][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// `body` once, and again while the condition that it leaves holds.
#[must_use]
pub fn again(body: &[u8], condition: If) -> Vec<u8> {
    let back = -i32::try_from(body.len() + 6).unwrap();
    [body, &[0x0f, 0x80 | condition as u8], &back.to_le_bytes()].concat()
}

/// `body`, unless the condition holds.
#[must_use]
pub fn unless(condition: If, body: &[u8]) -> Vec<u8> {
    let over = i32::try_from(body.len()).unwrap();
    [&[0x0f, 0x80 | condition as u8][..], &over.to_le_bytes(), body].concat()
}

/// `body`, `times` times; it leaves EBX alone.
#[must_use]
pub fn times(times: u32, body: &[u8]) -> Vec<u8> {
    // mov ebx, times; body; dec ebx.
    let body = [body, &[0x4b]].concat();
    [&[0xbb][..], &times.to_le_bytes(), &again(&body, If::NotEqual)].concat()
}

/// `body`, `times` times or until the word at `address` is at least `value`; it leaves EBX alone.
#[must_use]
pub fn times_or_until(times: u32, body: &[u8], address: u32, value: u32) -> Vec<u8> {
    // mov ebx, times; again: body; cmp [address], value; jae end; dec ebx; jnz again; end:
    let mut round = [body, &compare(address, value)].concat();
    round.extend([0x73, 7, 0x4b]);
    [&[0xbb][..], &times.to_le_bytes(), &again(&round, If::NotEqual)].concat()
}

/// WRMSR.
#[must_use]
pub fn wrmsr(index: u32, value: u64) -> Vec<u8> {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [&[0xb9][..], &index.to_le_bytes(), &[0xb8, a, b, c, d, 0xba, e, f, g, h, 0x0f, 0x30]].concat()
}

/// RDMSR; what it reads is added to the word at `address` by OR, both halves.
#[must_use]
pub fn rdmsr_or(index: u32, address: u32) -> Vec<u8> {
    let address = address.to_le_bytes();
    [&[0xb9][..], &index.to_le_bytes(), &[0x0f, 0x32, 0x09, 0x05], &address, &[0x09, 0x15], &address].concat()
}

/// LFENCE, RDTSC, PAUSE; then the low half of the TSC is in the word at `address`.
#[must_use]
pub fn read_tsc(address: u32) -> Vec<u8> {
    // mov eax, SITE - 3; call eax; mov [address], eax.
    [&[0xb8][..], &(SITE - 3).to_le_bytes(), &[0xff, 0xd0, 0xa3], &address.to_le_bytes()].concat()
}

/// `out port, value`.
#[must_use]
pub fn out(port: u8, value: u8) -> Vec<u8> {
    vec![0xb0, value, 0xe6, port]
}

/// An operation that does nothing: `in al, 0x80`. It costs virtual time, and lets another CPU have its turn.
pub const PASS: [u8; 2] = [0xe4, 0x80];
/// `sti`.
pub const STI: [u8; 1] = [0xfb];
/// `cli`.
pub const CLI: [u8; 1] = [0xfa];
/// `sti; hlt; jmp -3`: interrupts only, for ever.
pub const IDLE: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];

/// Prints a character.
#[must_use]
pub fn print(character: u8) -> Vec<u8> {
    // mov dx, 0x3f8; mov al, character; out dx, al.
    vec![0x66, 0xba, 0xf8, 0x03, 0xb0, character, 0xee]
}

/// Waits until the word at `address` is at least `value`.
#[must_use]
pub fn until(address: u32, value: u32) -> Vec<u8> {
    again(&[&PASS[..], &compare(address, value)].concat(), If::Below)
}

/// Ends with failure.
#[must_use]
pub fn fail() -> Vec<u8> {
    [out(0xf4, 1), vec![0xf4]].concat()
}

/// Fails unless the word at `address` is `value`.
#[must_use]
pub fn expect(address: u32, value: u32) -> Vec<u8> {
    [compare(address, value), unless(If::Equal, &fail())].concat()
}

/// Starts the second CPU, after INIT.
#[must_use]
pub fn start_second() -> Vec<u8> {
    [init_second(), store(ICR_HIGH, 1 << 24), store(ICR, 0x4600 | TRAMPOLINE >> 12)].concat()
}

/// Sends INIT to the second CPU.
#[must_use]
pub fn init_second() -> Vec<u8> {
    [store(ICR_HIGH, 1 << 24), store(ICR, 0x4500)].concat()
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    code: Vec<u8>,
    second: Vec<u8>,
    handlers: Vec<(u8, Vec<u8>)>,
}

impl Kernel {
    /// One that executes `parts` with interrupts off and its LAPIC enabled, and then ends with success.
    #[must_use]
    pub fn new(parts: &[Vec<u8>]) -> Self {
        Self { code: parts.concat(), second: Vec::new(), handlers: Vec::new() }
    }

    /// What the second CPU executes in the same way, but then halts. It starts anew at each start-up message.
    #[must_use]
    pub fn second(self, parts: &[Vec<u8>]) -> Self {
        Self { second: parts.concat(), ..self }
    }

    /// Counts the interrupts at `vector`, with `also` in the handler, which must keep all registers.
    #[must_use]
    pub fn counting(mut self, vector: u8, also: &[u8]) -> Self {
        // push [esp+8]; popf; ret 8: some hosts emulate no 32-bit IRET.
        let end = [0xff, 0x74, 0x24, 8, 0x9d, 0xc2, 8, 0];
        self.handlers.push((vector, [&increment(count(vector))[..], also, &end].concat()));
        self
    }

    /// The same for one of the LAPIC's interrupts.
    #[must_use]
    pub fn counting_apic(self, vector: u8) -> Self {
        self.counting(vector, &store(EOI, 0))
    }

    /// The image.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        let mut contents = vec![0; (END - BASE) as usize];
        let mut put = |address: u32, room: u32, bytes: &[u8]| {
            assert!(bytes.len() <= room as usize, "no room: {} bytes at {address:#x}", bytes.len());
            let at = (address - BASE) as usize;
            contents[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let begin = |stack: u32| {
            let tables =
                [&[0x0f, 0x01, 0x15][..], &GDTR.to_le_bytes(), &[0x0f, 0x01, 0x1d], &IDTR.to_le_bytes()].concat();
            [tables, [&[0xbc][..], &stack.to_le_bytes()].concat(), store(SVR, 0x1ff)].concat()
        };
        put(BASE, SECOND - BASE, &[&begin(STACKS[0])[..], &self.code, &raw::SUCCESS].concat());
        put(SECOND, HANDLERS - SECOND, &[&begin(STACKS[1])[..], &self.second, &CLI, &[0xf4, 0xeb, 0xfd]].concat());
        // In 16-bit mode: o32 lgdt [GDTR]; mov eax, cr0; or al, 1; mov cr0, eax; jmp far 8:...
        let [a, b, ..] = GDTR.to_le_bytes();
        let trampoline = [0xfa, 0x66, 0x0f, 0x01, 0x16, a, b, 0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0x66, 0xea];
        let [a, b, c, d] = (TRAMPOLINE + 0x20).to_le_bytes();
        put(TRAMPOLINE, 0x20, &[&trampoline[..], &[a, b, c, d, 8, 0]].concat());
        // In 32-bit mode: mov eax, 16; mov ds, eax; mov es, eax; mov ss, eax; mov eax, SECOND; jmp eax.
        let [a, b, c, d] = SECOND.to_le_bytes();
        let flat = [0xb8, 16, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xb8, a, b, c, d, 0xff, 0xe0];
        put(TRAMPOLINE + 0x20, 0x20, &flat);
        // Null, flat code at 8, flat data at 16.
        put(GDT, 32, &[0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat());
        put(GDTR, 8, &[&23u16.to_le_bytes()[..], &GDT.to_le_bytes()].concat());
        put(IDTR, 8, &[&0x7ffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat());
        let [rdtsc, pause] = [Kind::Rdtsc, Kind::Pause].map(Kind::original);
        put(SITE - 3, 8, &[&[0x0f, 0xae, 0xe8][..], &rdtsc, &pause, &[0xc3]].concat());
        for (number, (vector, handler)) in (0u32..).zip(&self.handlers) {
            let address = HANDLERS + number * HANDLER_BYTES;
            assert!(address < TRAMPOLINE, "too many handlers");
            put(address, HANDLER_BYTES, handler);
            // A 32-bit interrupt gate.
            let [a, b, c, d] = address.to_le_bytes();
            put(IDT + u32::from(*vector) * 8, 8, &[a, b, 8, 0, 0, 0x8e, c, d]);
        }
        raw::pvh_with_sites(BASE, &contents, &[(SITE, Kind::Rdtsc), (SITE + 2, Kind::Pause)])
    }
}
