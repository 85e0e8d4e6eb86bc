//! `vmm snapshot`.

use std::process::ExitCode;

use anyhow::Result;
use vmm::snapshot;

use super::args::{Snapshot, SnapshotCommand};

pub fn run(args: &Snapshot) -> Result<ExitCode> {
    let SnapshotCommand::Show { dir, json } = &args.command;
    let overview = snapshot::machine::show(dir)?;
    if *json {
        println!("{}", serde_json::to_string_pretty(&overview)?);
        return Ok(ExitCode::SUCCESS);
    }
    let state = snapshot::machine::load_state(dir)?;
    println!("{}", overview.dir);
    for section in &overview.sections {
        println!("  {:<12} version {}  {:>6} bytes", section.name, section.version, section.bytes);
    }
    let moment = state.clock.moment;
    println!("  image {}, {} vCPU", state.machine.image, state.cpus.len());
    println!(
        "  saved at TSC {} ({}), VM time {} ns, {} time, TSC source {}",
        moment.tsc.0,
        moment.khz,
        moment.vm.0,
        state.machine.time.as_str(),
        state.machine.source.as_str()
    );
    for cpu in &state.cpus {
        println!(
            "  cpu {}: RIP {:#x}{}, timer {:?}",
            cpu.apic_config.id,
            cpu.kvm.registers.rip,
            if cpu.halted { " (halted)" } else { "" },
            cpu.apic.timer.armed
        );
    }
    Ok(ExitCode::SUCCESS)
}
