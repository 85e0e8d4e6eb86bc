//! The guest's machine code: only what every host executes or emulates. Needs no KVM.

use guest_abi::sites::{Kind, SECTION, SITE_BYTES, Site};
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};
use object::{LittleEndian, Object, ObjectSection, SectionKind, read::elf::ElfFile64};
use vm_tests::guest;

/// Instruction sets that the first x86-64 CPU had, less its floating point and vectors.
const BASELINE: [CpuidFeature; 13] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CPUID,
    CpuidFeature::MSR,
    CpuidFeature::TSC,
    CpuidFeature::CMOV,
    CpuidFeature::PAUSE,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::CX8,
];
/// Of SSE and SSE2 only the fences, which touch no vector register.
const FENCES: [Mnemonic; 3] = [Mnemonic::Mfence, Mnemonic::Lfence, Mnemonic::Sfence];
/// Baseline instructions that some hosts cannot emulate in supervisor code.
const NOT_EMULATED: [Mnemonic; 2] = [Mnemonic::Int3, Mnemonic::Wait];

/// Why an instruction may not be in the guest.
fn objection(instruction: &Instruction) -> Option<String> {
    if instruction.is_invalid() {
        return Some("not an instruction".to_owned());
    }
    let mnemonic = instruction.mnemonic();
    if NOT_EMULATED.contains(&mnemonic) {
        return Some(format!("{mnemonic:?} is not emulated everywhere"));
    }
    let registers = (0..instruction.op_count()).map(|operand| instruction.op_register(operand));
    if let Some(register) = registers.into_iter().find(|r| r.is_vector_register() || r.is_mm() || r.is_st()) {
        return Some(format!("it uses {register:?}"));
    }
    let features = instruction.cpuid_features();
    let baseline = FENCES.contains(&mnemonic) || features.iter().all(|feature| BASELINE.contains(feature));
    (!baseline).then(|| format!("needs {features:?}"))
}

/// All instructions of a section, with their addresses.
fn instructions(data: &[u8], bits: u32, address: u64) -> Vec<Instruction> {
    Decoder::with_ip(bits, data, address, DecoderOptions::NONE).into_iter().collect()
}

// Catches: a compiler, a flag or a library of core that brings SSE, POPCNT or another instruction into the kernel.
#[test]
fn only_baseline_integer_instructions() {
    let bytes = std::fs::read(guest()).unwrap();
    let elf = ElfFile64::<LittleEndian>::parse(bytes.as_slice()).unwrap();
    let mut seen = 0;
    for section in elf.sections() {
        if section.kind() != SectionKind::Text {
            continue;
        }
        let name = section.name().unwrap();
        let bits = match name {
            ".text" => 64,
            ".boot32" => 32,
            other => panic!("code in {other}: how is it to be read?"),
        };
        for instruction in instructions(section.data().unwrap(), bits, section.address()) {
            if let Some(why) = objection(&instruction) {
                panic!("{name} {:#x}: {instruction}: {why}", instruction.ip());
            }
            seen += 1;
        }
    }
    assert!(seen > 1000, "only {seen} instructions: the guest is larger");
}

// Catches: a check that lets everything pass.
#[test]
fn what_some_host_cannot_run_is_found() {
    let found = |code: &[u8]| objection(&instructions(code, 64, 0)[0]).is_some();
    for (name, code) in [
        ("movaps", &[0x0f, 0x28, 0xc1][..]),
        ("movq xmm0, rax", &[0x66, 0x48, 0x0f, 0x6e, 0xc0]),
        ("movups [rax], xmm0", &[0x0f, 0x11, 0x00]),
        ("vzeroupper", &[0xc5, 0xf8, 0x77]),
        ("emms", &[0x0f, 0x77]),
        ("fld1", &[0xd9, 0xe8]),
        ("fwait", &[0x9b]),
        ("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0xc1]),
        ("lzcnt", &[0xf3, 0x48, 0x0f, 0xbd, 0xc1]),
        ("tzcnt", &[0xf3, 0x48, 0x0f, 0xbc, 0xc1]),
        ("andn", &[0xc4, 0xe2, 0xf8, 0xf2, 0xc1]),
        ("movbe", &[0x0f, 0x38, 0xf0, 0x00]),
        ("crc32", &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc1]),
        ("rdtscp", &[0x0f, 0x01, 0xf9]),
        ("rdrand", &[0x0f, 0xc7, 0xf0]),
        ("int3", &[0xcc]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("xsave", &[0x0f, 0xae, 0x20]),
        ("fxsave", &[0x0f, 0xae, 0x00]),
        ("cmpxchg16b", &[0x48, 0x0f, 0xc7, 0x08]),
        ("clac", &[0x0f, 0x01, 0xca]),
        ("stac", &[0x0f, 0x01, 0xcb]),
        ("vmcall", &[0x0f, 0x01, 0xc1]),
        ("vmmcall", &[0x0f, 0x01, 0xd9]),
        ("clflush", &[0x0f, 0xae, 0x38]),
        ("syscall", &[0x0f, 0x05]),
    ] {
        assert!(found(code), "{name} passed");
    }
    for (name, code) in [
        ("rdtsc", &[0x0f, 0x31][..]),
        ("wrmsr", &[0x0f, 0x30]),
        ("cpuid", &[0x0f, 0xa2]),
        ("pause", &[0xf3, 0x90]),
        ("mfence", &[0x0f, 0xae, 0xf0]),
        ("lfence", &[0x0f, 0xae, 0xe8]),
        ("bsr", &[0x48, 0x0f, 0xbd, 0xc1]),
        ("div", &[0x48, 0xf7, 0xf1]),
        ("cmovz", &[0x48, 0x0f, 0x44, 0xc1]),
        ("iretq", &[0x48, 0xcf]),
        ("hlt", &[0xf4]),
        ("rep stosb", &[0xf3, 0xaa]),
    ] {
        assert!(!found(code), "{name} is fine");
    }
}

// Catches: a trap-site table that names the wrong address or kind, or an RDTSC that virtual time would not see.
#[test]
fn trap_sites_stand_on_their_instructions() {
    let bytes = std::fs::read(guest()).unwrap();
    let elf = ElfFile64::<LittleEndian>::parse(bytes.as_slice()).unwrap();
    let text = elf.section_by_name(".text").unwrap();
    let code = instructions(text.data().unwrap(), 64, text.address());
    let table = elf.section_by_name(SECTION).unwrap();
    let (entries, rest) = table.data().unwrap().as_chunks::<SITE_BYTES>();
    assert!(rest.is_empty() && !entries.is_empty());
    let mut counted = 0;
    for site in entries.iter().map(Site::from_bytes) {
        let kind = Kind::from_number(site.kind).unwrap_or_else(|| panic!("an unknown kind: {site:?}"));
        assert_eq!(site.reserved, 0);
        let instruction =
            code.iter().find(|i| i.ip() == site.address).unwrap_or_else(|| panic!("within an instruction: {site:?}"));
        let expected = match kind {
            Kind::Rdtsc => Mnemonic::Rdtsc,
            Kind::DeadlineWrmsr => Mnemonic::Wrmsr,
            Kind::Pause => Mnemonic::Pause,
        };
        assert_eq!((instruction.mnemonic(), instruction.len()), (expected, 2), "{site:?}");
        let at = usize::try_from(site.address - text.address()).unwrap();
        assert_eq!(text.data().unwrap()[at..at + 2], kind.original());
        counted += usize::from(kind == Kind::Rdtsc);
    }
    let all = code.iter().filter(|i| i.mnemonic() == Mnemonic::Rdtsc).count();
    assert!(all == counted && all > 0, "{all} RDTSC, {counted} of them in the table");
}
