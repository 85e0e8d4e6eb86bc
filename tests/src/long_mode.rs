//! Guests of a few instructions in 64-bit mode that check their own results.
//!
//! A guest is put together instruction by instruction. Each check has a number; the first that fails ends the guest
//! with it.

use guest_abi::sites::Kind;

use crate::raw;

/// Offsets in the image, which is loaded at [`raw::LOAD`].
const GDT: usize = 0x80;
const GDTR: usize = 0xc0;
const IDTR: usize = 0xd0;
const STUBS: usize = 0x100;
const TSS: usize = 0x400;
const TABLES: usize = 0x1000;
const IDT: usize = 0x5000;
const USER: usize = 0x6000;
const BODY: usize = 0x7000;
/// The handler that all stubs jump to, and the size of a stub.
const COMMON: usize = STUBS + 32 * STUB;
const STUB: usize = 16;
/// Where the stub of [`INTERRUPT`] is.
const INTERRUPT_STUB: usize = COMMON + 0x20;
/// The one vector behind those of exceptions that has a handler.
pub const INTERRUPT: u8 = 0x20;

/// A page that is not present.
pub const ABSENT: u64 = 0x60_0000;
/// A page that may be read only.
pub const READ_ONLY: u64 = 0x60_1000;
/// A page that may be written; the next one is not present.
pub const WRITABLE: u64 = 0x60_2000;

/// A page that user code executes, and the end of its stack. All other pages are the kernel's.
pub const USER_CODE: u64 = 0x60_4000;
const USER_STACK_END: u64 = 0x60_6000;
/// The top of the kernel's stack.
const STACK_END: u32 = 0x20_0000;
/// Selectors: the kernel's code and data, the task's state; SYSRET's base, behind which are the user's data and code.
const KERNEL_CODE: u16 = 8;
const KERNEL_DATA: u16 = 0x10;
const USER_BASE: u16 = 0x10;
const TASK: u16 = 0x28;

/// A register, by its number in an instruction.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    /// RAX.
    Rax = 0,
    /// RCX.
    Rcx = 1,
    /// RDX.
    Rdx = 2,
    /// RBX.
    Rbx = 3,
    /// RSI.
    Rsi = 6,
    /// RDI.
    Rdi = 7,
    /// RSP of user code that executed SYSCALL.
    UserRsp = 8,
    /// The flags, after an instruction.
    Flags = 9,
    /// The flags that SYSCALL saved.
    SavedFlags = 11,
    /// CR2, after an exception.
    Cr2 = 12,
    /// RIP in the exception's frame.
    FrameRip = 13,
    /// The exception's error code; 0 if it has none.
    ErrorCode = 14,
    /// The exception's vector.
    Vector = 15,
}

/// The code of a guest, as it grows.
#[derive(Debug, Default)]
pub struct Body {
    code: Vec<u8>,
    /// What each check was about.
    checks: Vec<String>,
    /// The trap sites.
    sites: Vec<(u32, Kind)>,
    user: Vec<u8>,
}

impl Body {
    /// An instruction, or several.
    pub fn code(&mut self, code: &[u8]) -> &mut Self {
        self.code.extend(code);
        self
    }

    /// Where the next instruction will be.
    fn here(&self) -> u32 {
        address(BODY + self.code.len())
    }

    /// Sets a register: `mov register, value`.
    pub fn set(&mut self, register: Register, value: u64) -> &mut Self {
        let number = register as u8;
        self.code(&[0x48 | number >> 3, 0xb8 | number & 7]).code(&value.to_le_bytes())
    }

    /// Sets the arithmetic flags: `push flags; popfq`.
    pub fn set_flags(&mut self, flags: u32) -> &mut Self {
        self.code(&[0x68]).code(&flags.to_le_bytes()).code(&[0x9d])
    }

    /// Keeps those of the flags that are in `mask` for a check: `pushfq; pop r9; mov r10, mask; and r9, r10`.
    pub fn keep_flags(&mut self, mask: u64) -> &mut Self {
        self.code(&[0x9c, 0x41, 0x59, 0x49, 0xba]).code(&mask.to_le_bytes()).code(&[0x4d, 0x21, 0xd1])
    }

    /// Checks a register; `about` is what the test is told if it has another value.
    pub fn expect(&mut self, register: Register, value: u64, about: &str) -> &mut Self {
        self.checks.push(format!("{about}: {register:?} is not {value:#x}"));
        let check = u8::try_from(self.checks.len()).expect("too many checks for one byte");
        let number = register as u8;
        // mov r10, value; cmp register, r10; je +5; mov al, check; out 0xf4, al; hlt.
        self.code(&[0x49, 0xba]).code(&value.to_le_bytes());
        self.code(&[0x4c | number >> 3, 0x39, 0xd0 | number & 7, 0x74, 5, 0xb0, check, 0xe6, 0xf4, 0xf4])
    }

    /// `instruction` raises the exception `vector`, with this error code and CR2 (0: not looked at). RIP in its frame
    /// is `behind` bytes behind `instruction`'s address: 0 for a fault.
    pub fn raises(&mut self, instruction: &[u8], (vector, behind): (u8, u64), error: u64, cr2: u64) -> &mut Self {
        let length = u32::try_from(instruction.len()).expect("short");
        // xor r15d, r15d; lea r11, [rip + length]: the handler returns there.
        self.code(&[0x45, 0x31, 0xff, 0x4c, 0x8d, 0x1d]).code(&length.to_le_bytes());
        let at = u64::from(self.here());
        let about = format!("{instruction:02x?}");
        self.code(instruction)
            .expect(Register::Vector, u64::from(vector), &about)
            .expect(Register::ErrorCode, error, &about)
            .expect(Register::FrameRip, at + behind, &about);
        if cr2 == 0 { self } else { self.expect(Register::Cr2, cr2, &about) }
    }

    /// A trap site, a WRMSR, that raises #GP.
    pub fn wrmsr_site_raises_gp(&mut self) -> &mut Self {
        // `raises` begins with 10 bytes of its own.
        let site = self.here() + 10;
        self.sites.push((site, Kind::DeadlineWrmsr));
        self.raises(&[0x0f, 0x30], (13, 0), 0, 0)
    }

    /// Goes to user code: `user`, from [`USER_CODE`] on, with arithmetic flags clear and a stack. Its SYSCALLs come to
    /// the code that follows, which begins with its own stack, [`Register::UserRsp`] set, and RDX and R9 lost. Those of
    /// the flags that are in `mask` were cleared.
    pub fn enter_user(&mut self, mask: u32, user: &[u8]) -> &mut Self {
        self.user = user.to_vec();
        let wrmsr = |index: u32, low: u32, high: u32| {
            let [index, low, high] = [index, low, high].map(u32::to_le_bytes);
            [&[0xb9][..], &index, &[0xb8], &low, &[0xba], &high, &[0x0f, 0x30]].concat()
        };
        let enter = |entry: u32| {
            let segments = u32::from(USER_BASE) << 16 | u32::from(KERNEL_CODE);
            [
                // EFER: LME, LMA and SCE.
                wrmsr(0xc000_0080, 0x501, 0),
                wrmsr(0xc000_0081, 0, segments),
                wrmsr(0xc000_0082, entry, 0),
                wrmsr(0xc000_0084, mask, 0),
                // An access of a port that is not there: a VMM that must do something for SYSCALL has a chance to.
                vec![0xe6, 0x80],
                // mov ax, TASK; ltr ax; mov esp, USER_STACK_END; mov ecx, USER_CODE; mov r11d, 0x202; sysretq.
                [&[0x66, 0xb8][..], &TASK.to_le_bytes(), &[0x0f, 0x00, 0xd8]].concat(),
                [&[0xbc][..], &small(USER_STACK_END), &[0xb9], &small(USER_CODE)].concat(),
                vec![0x41, 0xbb, 0x02, 0x02, 0, 0, 0x48, 0x0f, 0x07],
            ]
            .concat()
        };
        let length = u32::try_from(enter(0).len()).expect("short");
        let code = enter(self.here() + length);
        // mov r8, rsp; mov esp, STACK_END.
        self.code(&code).code(&[0x49, 0x89, 0xe0, 0xbc]).code(&STACK_END.to_le_bytes())
    }

    /// Where the code that follows will be, after [`Self::enter_user`]: minus the bytes that it begins with.
    #[must_use]
    pub fn entry(&self) -> u32 {
        self.here() - 8
    }

    /// Checks that the segments and the privilege level are the kernel's.
    pub fn expect_kernel(&mut self, about: &str) -> &mut Self {
        // mov edx, cs; then SS.
        self.code(&[0x8c, 0xca]).expect(Register::Rdx, u64::from(KERNEL_CODE), about);
        self.code(&[0x8c, 0xd2]).expect(Register::Rdx, u64::from(KERNEL_DATA), about)
    }

    /// `part`, if EBX is `number`.
    pub fn when(&mut self, number: u8, part: impl FnOnce(&mut Self)) -> &mut Self {
        // cmp ebx, number; jne over it.
        self.code(&[0x83, 0xfb, number, 0x0f, 0x85, 0, 0, 0, 0]);
        let begin = self.code.len();
        part(self);
        let length = u32::try_from(self.code.len() - begin).expect("short");
        self.code[begin - 4..begin].copy_from_slice(&length.to_le_bytes());
        self
    }

    /// Returns to user code behind its SYSCALL: `mov rsp, r8; sysretq`.
    pub fn return_to_user(&mut self) -> &mut Self {
        self.code(&[0x4c, 0x89, 0xc4, 0x48, 0x0f, 0x07])
    }

    /// What check number `number` was about.
    #[must_use]
    pub fn about(&self, number: usize) -> &str {
        number.checked_sub(1).and_then(|index| self.checks.get(index)).map_or("?", String::as_str)
    }

    /// A PVH kernel that enters 64-bit mode, runs this code with interrupts off, and ends with success. Besides
    /// its own it lists a trap site that it never executes: virtual time needs one.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        const RDTSC: [u8; 2] = [0x0f, 0x31];
        let contents = contents(&self.code, &self.user);
        let site = address(contents.len());
        let sites = [&self.sites[..], &[(site, Kind::Rdtsc)]].concat();
        raw::pvh_with_sites(raw::LOAD, &[contents, RDTSC.to_vec()].concat(), &sites)
    }
}

fn address(offset: usize) -> u32 {
    raw::LOAD + u32::try_from(offset).expect("small")
}

/// An address below 4 GiB, as an immediate operand.
fn small(address: u64) -> [u8; 4] {
    u32::try_from(address).expect("below 4 GiB").to_le_bytes()
}

fn contents(body: &[u8], user: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; BODY];
    let mut put = |at: usize, parts: &[&[u8]]| {
        let part = parts.concat();
        bytes[at..at + part.len()].copy_from_slice(&part);
    };
    let le = |offset: usize| address(offset).to_le_bytes();
    put(
        0,
        &[
            // lgdt [gdtr]; lidt [idtr]; mov eax, tables; mov cr3, eax; mov eax, 0x20 (PAE); mov cr4, eax.
            &[0x0f, 0x01, 0x15],
            &le(GDTR),
            &[0x0f, 0x01, 0x1d],
            &le(IDTR),
            &[0xb8],
            &le(TABLES),
            &[0x0f, 0x22, 0xd8, 0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0],
            // mov ecx, EFER; rdmsr; or eax, 0x100 (LME); wrmsr.
            &[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x0d, 0, 1, 0, 0, 0x0f, 0x30],
            // mov eax, cr0; or eax, 0x80010020 (PG, WP, NE); mov cr0, eax; mov esp, STACK_END; jmp 8:body.
            &[0x0f, 0x20, 0xc0, 0x0d, 0x20, 0, 1, 0x80, 0x0f, 0x22, 0xc0, 0xbc],
            &STACK_END.to_le_bytes(),
            &[0xea],
            &le(BODY),
            &[8, 0],
        ],
    );
    // Null, the kernel's code and data, where the entry's segments already are, the user's data and code, the task's
    // state.
    let tss = u64::from(address(TSS));
    let task = 0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24) << 56;
    let flat = [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    put(GDT, &[&flat.map(u64::to_le_bytes).concat(), &task.to_le_bytes(), &[0; 8]]);
    put(GDTR, &[&55u16.to_le_bytes(), &le(GDT)]);
    // RSP0: below the stack of the code that enters user mode.
    put(TSS + 4, &[&u64::from(STACK_END - 0x1000).to_le_bytes()]);
    put(USER, &[user]);
    put(IDTR, &[&0x20fu16.to_le_bytes(), &le(IDT)]);
    for vector in 0..=INTERRUPT {
        let at = if vector == INTERRUPT { INTERRUPT_STUB } else { STUBS + STUB * usize::from(vector) };
        let has_error_code = matches!(vector, 8 | 10..=14 | 17 | 21);
        // push 0, if the CPU pushes no error code; push vector; jmp common.
        let pushes = if has_error_code { vec![0x6a, vector] } else { vec![0x6a, 0, 0x6a, vector] };
        let next = at + pushes.len() + 5;
        let [common, next] = [COMMON, next].map(|at| u32::try_from(at).expect("small"));
        put(at, &[&pushes, &[0xe9], &common.wrapping_sub(next).to_le_bytes()]);
        let [a, b, c, d] = le(at);
        put(IDT + 16 * usize::from(vector), &[&[a, b, 8, 0, 0, 0x8e, c, d]]);
    }
    // pop r15; pop r14; mov r13, [rsp]; mov r12, cr2; mov [rsp], r11; iretq.
    put(
        COMMON,
        &[
            &[0x41, 0x5f, 0x41, 0x5e, 0x4c, 0x8b, 0x2c, 0x24, 0x41, 0x0f, 0x20, 0xd4, 0x4c, 0x89, 0x1c, 0x24],
            &[0x48, 0xcf],
        ],
    );
    // Three levels to 2 MiB pages, where a linear address is a physical one; a table of pages for the fourth of them.
    // User code may use what a page's own entry lets it.
    let table = |number: usize| u64::from(address(TABLES + 0x1000 * number)) | 7;
    let entry = |value: u64| value.to_le_bytes();
    put(TABLES, &[&entry(table(1))]);
    put(TABLES + 0x1000, &[&entry(table(2))]);
    put(TABLES + 0x2000, &[&entry(0x83), &entry(0x20_0083), &entry(0x40_0083), &entry(table(3))]);
    let small_pages = [0, READ_ONLY | 1, WRITABLE | 3, 0, u64::from(address(USER)) | 5, (USER_STACK_END - 0x1000) | 7];
    put(TABLES + 0x3000, &[&small_pages.map(u64::to_le_bytes).concat()]);
    [&bytes, body, &raw::SUCCESS].concat()
}
