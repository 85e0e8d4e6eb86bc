//! Checks of a KVM backend's interface for time and interrupts: what a VMM asks for, KVM's answer, what a guest then
//! sees.
//!
//! What it is not: a decision. [`super::probe`] measures the facts on which `vmm` acts; these checks compare what KVM
//! does with what its documentation says, for those who write or choose a backend.

mod answer;
mod clock;
mod dirty;
mod interrupts;
mod msr;
mod rig;
mod running;
mod step;
mod tsc;

pub use answer::{Answer, Verdict};

use answer::Found;

use super::{Error, Host};
use crate::x86::Leaf;

/// What a check needs of the host.
struct Context<'a> {
    host: &'a Host,
    supported: &'a [Leaf],
    /// The host's TSC frequency, in kHz.
    khz: u32,
}

/// One check. A check that fails because KVM refuses a call that is not under test is an error.
struct Check {
    id: &'static str,
    rule: &'static str,
    kernel: &'static str,
    run: fn(&Context) -> Result<Found, Error>,
}

/// Runs every check, in the order in which they are documented.
#[must_use]
pub fn examine(host: &Host, supported: &[Leaf], khz: u32) -> Vec<Answer> {
    let cx = Context { host, supported, khz };
    let groups =
        [tsc::CHECKS, clock::CHECKS, msr::CHECKS, step::CHECKS, interrupts::CHECKS, running::CHECKS, dirty::CHECKS];
    groups.into_iter().flatten().map(|check| check.answer(&cx)).collect()
}

impl Check {
    fn answer(&self, cx: &Context) -> Answer {
        let Self { id, rule, kernel, run } = *self;
        let found = run(cx).unwrap_or_else(|error| Found {
            asked: "what this check needs first".to_owned(),
            said: error.to_string(),
            measured: "nothing".to_owned(),
            verdict: Verdict::Failed,
        });
        let Found { asked, said, measured, verdict } = found;
        Answer { id, asked, said, measured, verdict, rule, kernel }
    }
}
