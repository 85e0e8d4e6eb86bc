//! Guests of a few instructions on two CPUs, in flat 32-bit mode, with interrupt handlers and the local APICs enabled.
//!
//! A handler counts for the CPU that runs it, does what the test gives it, and ends the interrupt.

use guest_abi::sites::Kind;

use crate::raw;

/// Offsets in the image, which is loaded at [`raw::LOAD`].
const FIRST: usize = 0x40;
const SECOND: usize = 0x800;
const TRAMPOLINE: usize = 0xa00;
const GDT: usize = 0xa40;
const GDTR: usize = 0xa60;
const IDTR: usize = 0xa68;
const HANDLERS: usize = 0xb00;
const HANDLER: usize = 0x80;
const IDT: usize = 0x1000;
const COUNTS: usize = 0x1800;
const SITES: usize = 0x1ff0;
/// The page that the second CPU starts at, in real mode.
const START_PAGE: u32 = 9;
/// Where its stack ends.
const SECOND_STACK: u32 = 0x30_0000;

/// Local APIC registers.
const APIC_ID: u32 = 0xfee0_0020;
const EOI: u32 = 0xfee0_00b0;
const SVR: u32 = 0xfee0_00f0;
const ICR: u32 = 0xfee0_0300;

/// Instructions, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Code(Vec<u8>);

impl Code {
    /// These bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Other instructions after these.
    #[must_use]
    pub fn then(self, next: &Self) -> Self {
        self.bytes(&next.0)
    }

    /// `mov dword [address], value`.
    #[must_use]
    pub fn store(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xc7, 0x05]).bytes(&address.to_le_bytes()).bytes(&value.to_le_bytes())
    }

    /// `mov dx, port; mov al, value; out dx, al`.
    #[must_use]
    pub fn out(self, port: u16, value: u8) -> Self {
        self.bytes(&[0x66, 0xba]).bytes(&port.to_le_bytes()).bytes(&[0xb0, value, 0xee])
    }

    /// `mov dx, port; in al, dx`.
    #[must_use]
    pub fn input(self, port: u16) -> Self {
        self.bytes(&[0x66, 0xba]).bytes(&port.to_le_bytes()).bytes(&[0xec])
    }

    /// Writes an I/O APIC register.
    #[must_use]
    pub fn ioapic(self, register: u8, value: u32) -> Self {
        self.store(0xfec0_0000, register.into()).store(0xfec0_0010, value)
    }

    /// Sends the interrupts at `pin` to the CPU with the local APIC ID `to`; the entry's low half is `low`.
    #[must_use]
    pub fn route(self, pin: u8, to: u8, low: u32) -> Self {
        self.ioapic(0x11 + 2 * pin, u32::from(to) << 24).ioapic(0x10 + 2 * pin, low)
    }

    /// Starts the second CPU, and waits until it runs.
    #[must_use]
    pub fn start_second(self) -> Self {
        self.store(ICR, 0xc_4500).store(ICR, 0xc_4600 | START_PAGE).poll(count(7), 1)
    }

    /// Reads a port until `[address]` is at least `least`: `in al, 0x80; cmp dword [address], least; jb -11`.
    #[must_use]
    pub fn poll(self, address: u32, least: u8) -> Self {
        self.bytes(&[0xe4, 0x80, 0x83, 0x3d]).bytes(&address.to_le_bytes()).bytes(&[least, 0x72, 0xf5])
    }

    /// Halts with interrupts on until `[address]` is at least `least`: `sti; hlt; cli; cmp …; jb -12`.
    #[must_use]
    pub fn halt_until(self, address: u32, least: u8) -> Self {
        self.bytes(&[0xfb, 0xf4, 0xfa, 0x83, 0x3d]).bytes(&address.to_le_bytes()).bytes(&[least, 0x72, 0xf4])
    }

    /// Reads a port 200 times, with interrupts on: time for an interrupt too many. `mov ecx, 200; sti; in al, 0x80;
    /// loop -4; cli`.
    #[must_use]
    pub fn linger(self) -> Self {
        self.bytes(&[0xb9, 200, 0, 0, 0, 0xfb, 0xe4, 0x80, 0xe2, 0xfc, 0xfa])
    }

    /// Ends with the code `[address] - expected`: `mov eax, [address]; sub eax, expected; out 0xf4, al; hlt`.
    #[must_use]
    pub fn end_if(self, address: u32, expected: u8) -> Self {
        self.bytes(&[0xa1]).bytes(&address.to_le_bytes()).bytes(&[0x83, 0xe8, expected, 0xe6, 0xf4, 0xf4])
    }

    /// `cli; hlt`, for good.
    #[must_use]
    pub fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4])
    }
}

fn address(offset: usize) -> u32 {
    raw::LOAD + u32::try_from(offset).expect("small")
}

/// The address at which the handlers count for the CPU with this local APIC ID, up to 6.
#[must_use]
pub fn count(cpu: u8) -> u32 {
    address(COUNTS + 4 * usize::from(cpu))
}

/// A PVH kernel: the code of the first CPU, that of the second, and what the handlers of these vectors do besides. Its
/// trap sites, which it never executes, are there for virtual time.
#[must_use]
pub fn image(first: Code, second: Code, handlers: &[(u8, Code)]) -> Vec<u8> {
    let mut bytes = vec![0; SITES];
    let mut put = |at: usize, room: usize, parts: &[&[u8]]| {
        let part = parts.concat();
        assert!(part.len() <= room, "no room for {} bytes", part.len());
        bytes[at..at + part.len()].copy_from_slice(&part);
    };
    let le = |offset: usize| address(offset).to_le_bytes();
    // jmp first.
    put(0, 5, &[&[0xe9], &u32::try_from(FIRST - 5).expect("small").to_le_bytes()]);
    let load_idt = Code::default().bytes(&[0x0f, 0x01, 0x1d]).bytes(&le(IDTR)).store(SVR, 0x1ff);
    let first = Code::default()
        // lgdt; mov esp, 0x200000; mov esi, trampoline; mov edi, its page; mov ecx, 64; rep movsb.
        .bytes(&[0x0f, 0x01, 0x15])
        .bytes(&le(GDTR))
        .bytes(&[0xbc, 0, 0, 0x20, 0, 0xbe])
        .bytes(&le(TRAMPOLINE))
        .bytes(&[0xbf])
        .bytes(&(START_PAGE << 12).to_le_bytes())
        .bytes(&[0xb9, 64, 0, 0, 0, 0xf3, 0xa4])
        .bytes(&load_idt.0)
        .bytes(&first.0);
    put(FIRST, SECOND - FIRST, &[&first.0]);
    let second = Code::default()
        // mov eax, 16; mov ds, eax; mov es, eax; mov ss, eax; mov esp, its stack.
        .bytes(&[0xb8, 16, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc])
        .bytes(&SECOND_STACK.to_le_bytes())
        .bytes(&load_idt.0)
        .store(count(7), 1)
        .bytes(&second.0);
    put(SECOND, TRAMPOLINE - SECOND, &[&second.0]);
    put(
        TRAMPOLINE,
        GDT - TRAMPOLINE,
        &[
            // cli; cld; lgdt cs:[26]; mov eax, 0x11; mov cr0, eax; jmp 8:second; limit and address of the GDT.
            &[0xfa, 0xfc, 0x66, 0x2e, 0x0f, 0x01, 0x16, 26, 0, 0x66, 0xb8, 0x11, 0, 0, 0, 0x0f, 0x22, 0xc0, 0x66, 0xea],
            &le(SECOND),
            &[8, 0, 23, 0],
            &le(GDT),
        ],
    );
    // Null, flat code at 8, flat data at 16.
    put(GDT, 24, &[&[0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat()]);
    put(GDTR, 6, &[&23u16.to_le_bytes(), &le(GDT)]);
    put(IDTR, 6, &[&0x7ffu16.to_le_bytes(), &le(IDT)]);
    for (number, (vector, work)) in handlers.iter().enumerate() {
        let at = HANDLERS + HANDLER * number;
        let handler = Code::default()
            // push eax; push edx; mov eax, [ID]; shr eax, 24; inc dword [counts + 4 * eax].
            .bytes(&[0x50, 0x52, 0xa1])
            .bytes(&APIC_ID.to_le_bytes())
            .bytes(&[0xc1, 0xe8, 24, 0xff, 0x04, 0x85])
            .bytes(&le(COUNTS))
            .bytes(&work.0)
            .store(EOI, 0)
            // Some hosts emulate no 32-bit IRET. mov eax, [esp+8]; mov edx, [esp+16]; mov [esp+16], eax; mov [esp+12],
            // edx: EFLAGS and EIP trade places. pop edx; pop eax; add esp, 4; popf, after which another may enter; ret.
            .bytes(&[0x8b, 0x44, 0x24, 8, 0x8b, 0x54, 0x24, 16, 0x89, 0x44, 0x24, 16, 0x89, 0x54, 0x24, 12])
            .bytes(&[0x5a, 0x58, 0x83, 0xc4, 4, 0x9d, 0xc3]);
        put(at, HANDLER, &[&handler.0]);
        let [a, b, c, d] = le(at);
        // A 32-bit interrupt gate.
        put(IDT + 8 * usize::from(*vector), 8, &[&[a, b, 8, 0, 0, 0x8e, c, d]]);
    }
    let sites = [(address(SITES), Kind::Rdtsc), (address(SITES + 2), Kind::Pause)];
    raw::pvh_with_sites(raw::LOAD, &[&bytes[..], &[0x0f, 0x31, 0xf3, 0x90]].concat(), &sites)
}
