//! Disassembles guest instructions for messages.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

/// Longest x86 instruction, in bytes.
pub const INSTRUCTION_MAX: usize = 15;

/// Disassembles the first instruction in `bytes`, which are at `address` in a code segment of `bits` (16, 32 or 64).
/// Returns its length and its text. Without bytes the length is 0.
#[must_use]
pub fn disassemble(bytes: &[u8], address: u64, bits: u32) -> (usize, String) {
    let mut decoder = Decoder::with_ip(bits, bytes, address, DecoderOptions::NONE);
    if !decoder.can_decode() {
        return (0, "(not in the image)".to_owned());
    }
    let instruction = decoder.decode();
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_space_after_operand_separator(true);
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.format(&instruction, &mut text);
    (instruction.len(), text)
}

/// Describes the first instruction in `bytes`, as bytes and text: `0f 0b: ud2`. If they are no instruction, shows all
/// of them.
pub(crate) fn describe(bytes: &[u8], address: u64, bits: u32) -> String {
    let (length, text) = disassemble(bytes, address, bits);
    let no_instruction = text == "(bad)";
    let shown = if no_instruction { bytes } else { bytes.get(..length).unwrap_or(bytes) };
    let hex: Vec<String> = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = if no_instruction { "no instruction" } else { &text };
    format!("{}: {text}", hex.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listing_shows_the_original_instruction() {
        assert_eq!(disassemble(&[0x0f, 0x31, 0x90], 0x1000, 64), (2, "rdtsc".to_owned()));
        assert_eq!(disassemble(&[], 0x1000, 64).0, 0);
    }

    // Catches: bytes of the next instruction. FINIT is two instructions (FWAIT, FNINIT), and KVM stops at the first.
    #[test]
    fn an_instruction_is_described_whole_and_alone() {
        assert_eq!(describe(&[0x9b, 0xdb, 0xe3, 0x90], 0x10_0020, 32), "9b: fwait");
        assert_eq!(describe(&[0xdb, 0xe3, 0x90], 0x10_0021, 32), "db e3: fninit");
        let long = [0x66, 0x67, 0x2e, 0x48, 0x81, 0x84, 0x24, 0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55];
        assert!(describe(&long, 0, 64).starts_with("66 67 2e 48 81 84 24 44 33 22 11 88 77 66 55: add "));
    }

    #[test]
    fn the_same_bytes_are_read_in_the_mode_of_their_segment() {
        let bytes = [0x48, 0x0f, 0xc7, 0xf0, 0x90];
        assert_eq!(describe(&bytes, 0, 64), "48 0f c7 f0: rdrand rax");
        assert_eq!(describe(&bytes, 0, 32), "48: dec eax");
        assert_eq!(describe(&[0xb8, 1, 2, 3, 4], 0, 16), "b8 01 02: mov ax, 0x201");
        assert_eq!(describe(&[0xb8, 1, 2, 3, 4], 0, 32), "b8 01 02 03 04: mov eax, 0x4030201");
    }

    #[test]
    fn what_is_no_instruction_is_shown_as_it_stands() {
        assert_eq!(describe(&[0x06, 0x90], 0, 64), "06 90: no instruction");
        // Cut off by the end of RAM.
        assert_eq!(describe(&[0x0f], 0, 64), "0f: no instruction");
    }
}
