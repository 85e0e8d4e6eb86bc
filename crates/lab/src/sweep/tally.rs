//! The instructions that a stretch costs the guest, counted by stepping through it.

use std::sync::atomic::AtomicBool;

use machine::{HostEnvironment, Outputs, boot::Image};
use serde::{Deserialize, Serialize};

use super::{Options, SweepError, code::Program, walk::Walk};

/// Instructions of a stretch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    /// All of them.
    pub instructions: u64,
    /// DIV and IDIV.
    pub divisions: u64,
    /// MUL and IMUL.
    pub multiplications: u64,
    /// Those that exit to the VMM.
    pub operations: u64,
}

/// Counts the stretch of `options`, without a migration.
///
/// # Errors
/// [`SweepError`].
pub fn tally(
    env: &HostEnvironment,
    image: &Image,
    options: &Options,
    cancel: &AtomicBool,
) -> Result<Tally, SweepError> {
    let program = Program::read(image.bytes());
    let outputs = Outputs::new(Box::new(std::io::sink()), None);
    let mut walk = Walk::begin(env, image, &program, options, outputs, cancel)?;
    let operations = walk.track.place.operations;
    let mut tally = Tally::default();
    loop {
        let mnemonic = program.mnemonic(walk.track.place.rip);
        let on = walk.next()?;
        tally.instructions = tally.instructions.saturating_add(1);
        tally.divisions = tally.divisions.saturating_add(u64::from(matches!(mnemonic.as_str(), "div" | "idiv")));
        let multiplies = matches!(mnemonic.as_str(), "mul" | "imul");
        tally.multiplications = tally.multiplications.saturating_add(u64::from(multiplies));
        tally.operations = walk.track.place.operations.saturating_sub(operations);
        if !on || tally.instructions > super::workers::STRETCH_MAX {
            return Ok(tally);
        }
    }
}
