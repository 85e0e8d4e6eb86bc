//! Decodes code from one end to the other, and notes the instructions that can be sites.

use std::collections::VecDeque;

use guest_abi::{msr::IA32_TSC_DEADLINE, sites::Kind};
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
};
use object::Object;

use super::{Stretch, at_most};
use crate::boot::{
    code::{Begins, Piece, Symbols},
    sites::SiteError,
};

/// How many instructions before a WRMSR may load ECX.
const LOOK_BACK: usize = 16;
/// After bytes that are no instruction the decoder may be out of step. So many instructions later it is in step again:
/// code that is decoded from a wrong byte falls into step within a few instructions, or soon becomes invalid again.
const IN_STEP_AFTER: u32 = 32;

/// An instruction that can be a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) address: u64,
    pub(super) kind: Kind,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    pub(super) seen: Vec<Seen>,
    pub(super) rdtscp: Vec<u64>,
    pub(super) unsure: Vec<u64>,
    pub(super) other_wrmsr: u64,
}

impl Decoded {
    /// Decodes all of `stretch`.
    ///
    /// # Errors
    /// More sites, or more of what may be one, than a machine can have.
    pub(super) fn read(
        &mut self,
        elf: &object::File<'_>,
        symbols: &Symbols,
        stretch: &Stretch<'_>,
    ) -> Result<(), SiteError> {
        let bits = if elf.is_64() { 64 } else { 32 };
        let beginnings = stretch.beginnings(symbols, elf.entry(), std::iter::empty());
        for piece in stretch.pieces(&beginnings) {
            if piece.begins != Begins::Data {
                self.read_piece(bits, stretch, &piece)?;
            }
        }
        Ok(())
    }

    fn read_piece(&mut self, bits: u32, stretch: &Stretch<'_>, piece: &Piece<'_>) -> Result<(), SiteError> {
        let mut decoder = Decoder::with_ip(bits, piece.bytes, stretch.address_of(piece.start), DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let mut before = VecDeque::with_capacity(LOOK_BACK);
        let mut out_of_step = if piece.begins == Begins::Instruction { 0 } else { IN_STEP_AFTER };
        while decoder.can_decode() {
            let start = decoder.position();
            let address = stretch.address_of(piece.start.saturating_add(start));
            decoder.set_ip(address);
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                out_of_step = IN_STEP_AFTER;
                let _ = decoder.set_position(start.saturating_add(1));
                continue;
            }
            let code = instruction.code();
            if out_of_step > 0 {
                out_of_step = out_of_step.saturating_sub(1);
                if matches!(code, Code::Rdtsc | Code::Rdtscp) {
                    self.unsure.push(address);
                }
            } else {
                let bytes = piece.bytes.get(start..decoder.position()).unwrap_or_default();
                self.note(code, bytes, address, &before);
            }
            at_most(self.seen.len().max(self.rdtscp.len()).max(self.unsure.len()))?;
            if before.len() == LOOK_BACK {
                before.pop_front();
            }
            before.push_back(instruction);
        }
        Ok(())
    }

    fn note(&mut self, code: Code, bytes: &[u8], address: u64, before: &VecDeque<Instruction>) {
        let kind = match code {
            Code::Rdtsc => Kind::Rdtsc,
            Code::Pause => Kind::Pause,
            Code::Wrmsr if loads_ecx(before) == Some(IA32_TSC_DEADLINE) => Kind::DeadlineWrmsr,
            Code::Wrmsr => {
                self.other_wrmsr = self.other_wrmsr.saturating_add(1);
                return;
            }
            Code::Rdtscp => {
                self.rdtscp.push(address);
                return;
            }
            _ => return,
        };
        // With a prefix it is longer, and its two bytes come later. A prefix can also be within them: F3 66 90.
        let Some(prefixes) = bytes.strip_suffix(&kind.original()) else { return };
        let address = address.saturating_add(u64::try_from(prefixes.len()).unwrap_or(0));
        self.seen.push(Seen { address, kind });
    }
}

/// The constant that the code `before` loads into ECX, if it is plain to see.
fn loads_ecx(before: &VecDeque<Instruction>) -> Option<u32> {
    let mut infos = InstructionInfoFactory::new();
    for instruction in before.iter().rev() {
        if matches!(instruction.code(), Code::Mov_r32_imm32 | Code::Mov_rm32_imm32)
            && instruction.op0_register() == Register::ECX
            && instruction.op_kind(1) == OpKind::Immediate32
        {
            return Some(instruction.immediate32());
        }
        let written = infos.info(instruction).used_registers().iter().any(|used| {
            used.register().full_register() == Register::RCX
                && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
        });
        let straight = matches!(instruction.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch);
        if written || !straight {
            return None;
        }
    }
    None
}
