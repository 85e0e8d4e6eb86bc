//! The floor that `vmm`'s start and restore are compared with: the least that a program can do to run the guest under
//! KVM until it prints.
//!
//! It emulates nothing. Reads of ports and of the local APIC's page return a constant with which the guest gets to its
//! console. KVM emulates kvmclock, and nothing is probed, checked or recorded. A VMM can be as fast as this, but hardly
//! faster. It also pauses a guest of a few instructions, for what one KVM_SET_CLOCK makes of the guest's clock.

mod catch_up;
mod image;
mod machine;
mod saved;

use std::{io, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};

use machine::FloorVm;

const USAGE: &str = "usage: floor run GUEST MIB BYTES         boot, print the guest's first BYTES bytes, end
       floor save GUEST MIB BYTES DIR   the same, then save registers and RAM into DIR
       floor restore DIR MIB BYTES      go on from there, print BYTES bytes, end
       floor catch-up PAUSES MS         pause so often for MS ms, print the step of the guest's clock in ns each time";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", guest, mib, bytes] => boot(Path::new(guest), mib, bytes).map(drop),
        ["save", guest, mib, bytes, dir] => {
            boot(Path::new(guest), mib, bytes).and_then(|mut machine| saved::save(&mut machine, Path::new(dir)))
        }
        ["restore", dir, mib, bytes] => restore(Path::new(dir), mib, bytes),
        ["catch-up", pauses, ms] => catch_up(pauses, ms),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn boot(guest: &Path, mib: &str, bytes: &str) -> Result<FloorVm> {
    let mut machine = FloorVm::new(None, size(mib)?)?;
    let entry = image::load(guest, machine.ram())?;
    machine.enter(entry)?;
    machine.print(number(bytes)?, &mut io::stdout())?;
    Ok(machine)
}

fn restore(dir: &Path, mib: &str, bytes: &str) -> Result<()> {
    let mut machine = saved::restore(dir, size(mib)?)?;
    machine.print(number(bytes)?, &mut io::stdout())
}

fn catch_up(pauses: &str, ms: &str) -> Result<()> {
    let length = Duration::from_millis(u64::try_from(number(ms)?)?);
    for step in catch_up::steps(number(pauses)?, length)? {
        println!("{step}");
    }
    Ok(())
}

fn size(mib: &str) -> Result<usize> {
    match number(mib)?.checked_mul(1 << 20) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => bail!("{mib} MiB is no size of a memory"),
    }
}

fn number(word: &str) -> Result<usize> {
    word.parse().with_context(|| format!("{word} is not a whole number"))
}
