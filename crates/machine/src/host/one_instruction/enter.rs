//! Loads registers, calls the code, stores registers.

use std::arch::global_asm;

use super::{AVX, AVX512, MASKED, RAISED, SSE, X87, mxcsr_mask};

/// The largest operand in memory: a ZMM register.
pub const OPERAND_BYTES: usize = 64;
/// An XSAVE area with AVX-512's registers fits into it.
const AREA_BYTES: usize = 4096;
const XSTATE_BV: usize = 512;
const HEADER_END: usize = 576;
const MXCSR: usize = 24;
/// The x87 control word with all exceptions masked, and the byte of the status word that has the stack's top, which is
/// all that a form changes of the two words.
const X87_MASKED: [u8; 2] = [0x7f, 0x03];
const STATUS_HIGH: usize = 3;
const TOP: u8 = 0x38;

/// An XSAVE area in standard form.
#[repr(C, align(64))]
pub(super) struct Image([u8; AREA_BYTES]);

/// An operand in memory.
#[repr(C, align(64))]
pub(super) struct Operand([u8; OPERAND_BYTES]);

/// What the code below reads and writes; it has the offsets.
#[repr(C)]
pub(super) struct Context<'a> {
    general: [u64; 16],
    flags: u64,
    components: u64,
    image: &'a mut Image,
}

global_asm!(
    ".pushsection .text.vmm_one_instruction,\"ax\",@progbits",
    // System V's calling convention: RDI is the context, RSI the code.
    "vmm_one_instruction:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "sub rsp, 16",
    "stmxcsr [rsp]",
    "fnstcw [rsp + 4]",
    "mov rax, [rdi + 136]",
    "test rax, rax",
    "jz 2f",
    "xor edx, edx",
    "mov rcx, [rdi + 144]",
    "xrstor64 [rcx]",
    "2:",
    "push rsi",
    "push qword ptr [rdi + 128]",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "popfq",
    "call [rsp]",
    // From here to PUSHFQ no instruction changes the flags. The code's address is no longer needed.
    "mov [rsp], rdi",
    "mov rdi, [rsp + 24]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 88], r11",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    "pushfq",
    "pop qword ptr [rdi + 128]",
    "pop qword ptr [rdi + 56]",
    "mov rax, [rdi + 136]",
    "test rax, rax",
    "jz 4f",
    "xor edx, edx",
    "mov rcx, [rdi + 144]",
    "xsave64 [rcx]",
    "test al, 4",
    "jz 3f",
    "vzeroupper",
    "3:",
    "test al, 1",
    "jz 4f",
    "fninit",
    "fldcw [rsp + 4]",
    "4:",
    "ldmxcsr [rsp]",
    "add rsp, 16",
    "pop rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
);

unsafe extern "sysv64" {
    fn vmm_one_instruction(context: *mut Context<'_>, code: *const u8);
}

/// Calls the code at `code` with the context's registers, and keeps what it leaves in them.
///
/// # Safety
/// The code must be one instruction with a RET behind it. It must not fault, and must not access memory but for what
/// the context's registers point to, which must be the caller's. It may change only general registers but for RSP,
/// arithmetic flags, and the context's components.
pub(super) unsafe fn enter(context: &mut Context<'_>, code: *const u8) {
    // SAFETY: the code is as this function asks. Registers that are the caller's by the calling convention are put
    // back, so are MXCSR and x87's control word; x87's stack is empty, as at a call. The image is aligned, has a valid
    // header and a valid MXCSR, and as much room as the components need.
    unsafe { vmm_one_instruction(context, code) }
}

impl<'a> Context<'a> {
    /// `components` are those in `image` that are loaded and stored: XCR0's bits, of which the upper half is not used.
    pub(super) fn new(general: [u64; 16], flags: u64, components: u64, image: &'a mut Image) -> Self {
        Self { general, flags, components, image }
    }

    pub(super) fn general(&self) -> [u64; 16] {
        self.general
    }

    pub(super) fn flags(&self) -> u64 {
        self.flags
    }
}

impl Image {
    /// The area's registers, with all exceptions masked and none raised. None if it has not the right size. Without
    /// components it is not used.
    pub(super) fn new(area: &[u8], components: u64) -> Option<Self> {
        let mut image = Self([0; AREA_BYTES]);
        if components == 0 {
            return Some(image);
        }
        image.0.get_mut(..)?.copy_from_slice(area.get(..AREA_BYTES).filter(|_| area.len() == AREA_BYTES)?);
        image.0.get_mut(XSTATE_BV..HEADER_END)?.fill(0);
        image.put(XSTATE_BV, &(components & in_use(area)).to_le_bytes());
        image.put(MXCSR, &(mxcsr(area) & mxcsr_mask() & !RAISED | MASKED).to_le_bytes());
        // The registers are stored from the stack's top on.
        let top = area.get(STATUS_HIGH).copied().unwrap_or(0) & TOP;
        image.put(0, &[X87_MASKED[0], X87_MASKED[1], 0, top]);
        Some(image)
    }

    /// Puts `components` back into the area that this was made of.
    pub(super) fn read_back(&self, area: &mut [u8], components: u64) {
        let now = in_use(area) & !components | in_use(&self.0) & components;
        let [fcw_low, fcw_high, fsw_low, fsw_high] = [0, 1, 2, 3].map(|at| area.get(at).copied().unwrap_or(0));
        for (at, (to, from)) in area.iter_mut().zip(&self.0).enumerate() {
            let is_taken = match at {
                0..24 | 32..160 => components & X87 != 0,
                24..28 | 160..416 => components & (SSE | AVX) != 0,
                28..32 | 416..HEADER_END => false,
                _ => components & (AVX | AVX512) != 0,
            };
            if is_taken {
                *to = *from;
            }
        }
        if components & X87 != 0 {
            let top = self.0[STATUS_HIGH] & TOP;
            for (to, from) in area.iter_mut().zip([fcw_low, fcw_high, fsw_low, fsw_high & !TOP | top]) {
                *to = from;
            }
        }
        for (to, from) in area.iter_mut().skip(XSTATE_BV).zip(now.to_le_bytes()) {
            *to = from;
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}

fn in_use(area: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(area.iter().skip(XSTATE_BV)) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

fn mxcsr(area: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(area.iter().skip(MXCSR)) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}

impl Operand {
    pub(super) fn new(bytes: [u8; OPERAND_BYTES]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&self) -> [u8; OPERAND_BYTES] {
        self.0
    }

    /// The address, with which the code writes to it.
    pub(super) fn address(&mut self) -> u64 {
        u64::try_from((&raw mut self.0).expose_provenance()).unwrap_or(0)
    }
}
