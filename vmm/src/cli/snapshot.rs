//! `vmm snapshot`.

use std::{path::Path, process::ExitCode};

use machine::{LapicKind, kvm::state::MpState, snapshot, state::CpuStates};
use vlapic::Armed;

use super::{
    args::{Snapshot, SnapshotCommand},
    exit::{About, Result},
    text::{self, Text},
};

/// Characters of an image's name that are shown at most.
const IMAGE_CHARS: usize = 200;

pub fn run(args: &Snapshot) -> Result<ExitCode> {
    match &args.command {
        SnapshotCommand::Show { dir, json } => show(dir, *json),
        SnapshotCommand::Merge { dir, out } => {
            snapshot::machine::merge(dir, out).about(|| name(dir))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn name(dir: &Path) -> String {
    format!("snapshot {}", dir.display())
}

fn show(dir: &Path, json: bool) -> Result<ExitCode> {
    let overview = snapshot::machine::show(dir).about(|| name(dir))?;
    if json {
        Text::json(&overview)?.print()?;
        return Ok(ExitCode::SUCCESS);
    }
    let state = &overview.state;
    let mut text = Text::default();
    text.line(&overview.dir);
    for section in overview.sections.iter().map(|section| &section.info) {
        text.line(format_args!("  {:<12} version {}  {:>6} bytes", section.name, section.version, section.bytes));
    }
    if let [_, below @ ..] = overview.chain.as_slice()
        && !below.is_empty()
    {
        for link in &overview.chain {
            let id: String = hex::encode(link.id).chars().take(16).collect();
            text.line(format_args!("  {:<12} {id}  {:>6} pages  {}", "chain", link.pages, link.dir));
        }
    }
    let moment = state.clock.moment;
    let lapic = match state.cpus.lapic() {
        LapicKind::User => "vmm's",
        LapicKind::Kvm => "KVM's",
    };
    let image = text::printable(&state.machine.image, IMAGE_CHARS);
    text.line(format_args!("  image {image}, {} vCPU, {lapic} LAPIC", state.cpus.count()));
    text.line(format_args!(
        "  saved at TSC {} ({}), VM time {} ns, {} time, TSC source {}",
        moment.tsc.0,
        moment.khz,
        moment.vm.0,
        state.machine.time.as_str(),
        state.machine.source.as_str()
    ));
    let mut tell = |index, address, halted, armed: Armed| {
        let halted = if halted { " (halted)" } else { "" };
        text.line(format_args!("  cpu {index}: at {address:#x}{halted}, timer {armed:?}"));
    };
    match &state.cpus {
        CpuStates::User(cpus) => {
            for (index, cpu) in cpus.iter().enumerate() {
                tell(index, cpu.kvm.code_address(), cpu.halted, cpu.apic.timer.armed);
            }
        }
        CpuStates::Kvm(cpus) => {
            for (index, cpu) in cpus.iter().enumerate() {
                tell(index, cpu.kvm.code_address(), cpu.lapic.mp_state == MpState::Halted, cpu.lapic.armed);
            }
        }
    }
    text.print()?;
    Ok(ExitCode::SUCCESS)
}
