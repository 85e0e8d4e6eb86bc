//! What is executed, and that nothing else is touched.

use std::collections::BTreeSet;

use super::*;

// Catches: an instruction on the list that faults, stores elsewhere, or changes what it should not; and the host's own
// registers changed by it. Random encodings, with random registers, exceptions masked or not.
#[test]
fn every_form_leaves_the_rest_as_it_was() {
    let mut random = Random(6);
    let mut codes = BTreeSet::new();
    let starts: [&[u8]; 18] = [
        &[0x0f],
        &[0x66, 0x0f],
        &[0xf3, 0x0f],
        &[0xf2, 0x0f],
        &[0x0f, 0x38],
        &[0x66, 0x0f, 0x38],
        &[0xf2, 0x0f, 0x38],
        &[0x66, 0x0f, 0x3a],
        &[0x66, 0x48, 0x0f],
        &[0xf3, 0x48, 0x0f],
        &[0x66, 0x4c, 0x0f, 0x3a],
        &[0xc5],
        &[0xc4],
        &[0x62],
        &[0x62, 0xf1],
        &[0x62, 0xf2],
        &[0xc4, 0xe2],
        &[0xc4, 0xe3],
    ];
    for round in 0..72_000 {
        let code = [starts[round % starts.len()], &random.bytes::<12>()].concat();
        let instruction = Decoder::new(64, &code, DecoderOptions::NONE).decode();
        let Some(form) = Form::new(&instruction) else { continue };
        codes.insert(instruction.code());
        let mut cpu = Cpu::new(&mut random);
        cpu.area[24..28].copy_from_slice(&(u32::try_from(random.next() >> 48).unwrap() & 0xffbf).to_le_bytes());
        let (general, area, operand) = (cpu.general, cpu.area.clone(), cpu.operand);
        let sum = std::hint::black_box(0.1_f64) + random.next() as f64;
        cpu.execute(&form);
        let about = format!("{instruction} {:02x?}", &code[..instruction.len()]);
        assert_eq!(sum - std::hint::black_box(0.1), sum - 0.1, "{about}");
        let mut factory = InstructionInfoFactory::new();
        let written: Vec<_> = factory
            .info(&instruction)
            .used_registers()
            .iter()
            .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
            .map(|used| used.register().full_register())
            .collect();
        for (number, before) in general.into_iter().enumerate() {
            let is_written = written.iter().any(|register| register.is_gpr() && register.number() == number);
            assert!(is_written || cpu.general[number] == before, "{about}: register {number}");
        }
        let stored = form.memory().filter(|memory| memory.is_written).map_or(0, |memory| memory.bytes);
        assert_eq!(cpu.operand[stored..], operand[stored..], "{about}");
        for number in 0..16 {
            let is_written =
                written.iter().any(|register| register.is_vector_register() && register.number() == number);
            let after = &cpu.area[160 + number * 16..][..16];
            assert!(is_written || after == &area[160 + number * 16..][..16], "{about}: xmm{number}");
        }
        let Uses { mmx, vector, avx, avx512: _ } = form.uses();
        assert!(mmx || cpu.area[..24] == area[..24] && cpu.area[32..160] == area[32..160], "{about}");
        assert!(avx || cpu.area[576..] == area[576..], "{about}");
        assert!(vector || cpu.area[24..28] == area[24..28], "{about}");
        assert_eq!(cpu.area[416..512], area[416..512], "{about}");
    }
    assert!(codes.len() > 250, "{}", codes.len());
}

// Catches: instructions with an effect besides their operands', with more than one operand in memory, or whose operand
// may be partly absent.
#[test]
fn others_are_refused() {
    let refused: [&[u8]; 19] = [
        // lfence; mfence; sfence; pause; prefetcht0 [rax]; clflush [rax]; maskmovdqu xmm0, xmm1; maskmovq mm0, mm1.
        &[0x0f, 0xae, 0xe8],
        &[0x0f, 0xae, 0xf0],
        &[0x0f, 0xae, 0xf8],
        &[0xf3, 0x90],
        &[0x0f, 0x18, 0x08],
        &[0x0f, 0xae, 0x38],
        &[0x66, 0x0f, 0xf7, 0xc1],
        &[0x0f, 0xf7, 0xc1],
        // ldmxcsr [rax]; vmaskmovps xmm0, xmm0, [rax]; vgatherdps xmm0, [rax + xmm1], xmm2; fisttp qword [rax].
        &[0x0f, 0xae, 0x10],
        &[0xc4, 0xe2, 0x79, 0x2c, 0x00],
        &[0xc4, 0xe2, 0x69, 0x92, 0x04, 0x08],
        &[0xdd, 0x08],
        // vpaddd zmm0{k1}, zmm0, [rax]; mov eax, ecx; push rax; fxsave [rax]; xsave [rax]; wrmsr; syscall.
        &[0x62, 0xf1, 0x7d, 0x49, 0xfe, 0x00],
        &[0x89, 0xc8],
        &[0x50],
        &[0x0f, 0xae, 0x00],
        &[0x0f, 0xae, 0x20],
        &[0x0f, 0x30],
        &[0x0f, 0x05],
    ];
    for code in refused {
        assert!(form(code).is_none(), "{code:02x?}");
    }
    // An area of another size, for which there is no room.
    let mut registers = Registers { general: [0; 16], flags: 0, area: &mut [0; 512], operand: [0; OPERAND_BYTES] };
    assert_eq!(form(&[0x66, 0x0f, 0xfe, 0xca]).unwrap().execute(&mut registers), None);
}

// Catches: code of one thread that another executes, or is executed after it was overwritten: more forms than a page
// has room for, on two threads.
#[test]
fn pages_of_code_are_a_threads_own() {
    std::thread::scope(|scope| {
        for seed in 0..2 {
            scope.spawn(move || {
                let mut cpu = Cpu::new(&mut Random(seed));
                for immediate in (0..=255).cycle().take(1000) {
                    // pshufd xmm1, xmm2, immediate.
                    cpu.run(&[0x66, 0x0f, 0x70, 0xca, immediate]);
                    let from = |lane: usize| usize::from(immediate) >> (2 * lane) & 3;
                    let lanes = (0..4).flat_map(|lane| cpu.xmm(2)[from(lane) * 4..][..4].to_vec());
                    assert_eq!(cpu.xmm(1).to_vec(), lanes.collect::<Vec<_>>());
                }
            });
        }
    });
}
