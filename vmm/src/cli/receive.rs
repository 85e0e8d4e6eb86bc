//! `vmm receive`.

use std::{process::ExitCode, time::Duration};

use machine::{
    HostEnvironment, Machine, Outputs, TimeMode,
    config::source::SourceChoice,
    live::{Incoming, Limits, LiveError, Waiting},
    session::block_signals,
};

use super::{
    args::{Receive, Session},
    exit::{OrFailed, Result},
    run::{self, Destinations},
    run_files::Files,
};

/// Runs `vmm receive`.
pub fn receive(args: &Receive) -> Result<ExitCode> {
    let name = format!("vmm receive {}", args.at);
    let mut files = Files::open(&args.session)?;
    let ended = receive_and_go_on(args, &name, &mut files);
    files.with_error(&name, ended)
}

fn receive_and_go_on(args: &Receive, command: &str, files: &mut Files) -> Result<ExitCode> {
    let Session { emulate_host, poll_ns, spin_limit, track_dirty, .. } = &args.session;
    let mut env = HostEnvironment::open(emulate_host.map(Into::into))?;
    env.poll = Duration::from_nanos(*poll_ns);
    env.spin_limit = spin_limit.0;
    // A signal ends the wait; later the session handles it.
    block_signals().or_failed(|| "cannot block signals")?;
    let waiting = Waiting::at(&args.at, args.insecure, env.clock)?;
    machine::say!("vmm: waiting at {}", waiting.address());
    let incoming = match waiting.receive(Limits { memory: args.max_memory }) {
        Err(LiveError::Stopped) => {
            machine::say!("vmm: stopped");
            return Ok(ExitCode::SUCCESS);
        }
        received => received?,
    };
    if let Some(host) = incoming.host.clone() {
        env.use_fingerprint(host);
    }
    let console = run::console(&args.session, files);
    let outputs = Outputs::to_outlet(console.clone(), files.trace());
    let mut machine = match build(args, &env, &incoming, outputs) {
        Ok(machine) => machine,
        Err(error) => {
            incoming.refuse(&error.one_line());
            return Err(error);
        }
    };
    if *track_dirty && let Err(error) = machine.track_changes(None) {
        incoming.refuse(&error.to_string());
        return Err(error.into());
    }
    let (mut incoming, mut answers) = (Some(incoming), None);
    let destinations = Destinations { name: command, files, console };
    let ended = run::session(&env, machine, None, &args.session, destinations, || {
        // Only now does the source let go: control socket, files and flags are fine.
        if let Some(incoming) = incoming.take() {
            answers = Some(incoming.hand_over()?.answer_questions());
        }
        Ok(())
    });
    if let (Some(incoming), Err(error)) = (incoming, &ended) {
        incoming.refuse(&error.one_line());
    }
    if let Some(answers) = answers {
        answers.end();
    }
    ended
}

fn build(args: &Receive, env: &HostEnvironment, incoming: &Incoming, outputs: Outputs) -> Result<Machine> {
    let Incoming { state, memory, .. } = incoming;
    let time = args.time.map_or(state.machine.time, TimeMode::from);
    let khz = args.tsc_khz.unwrap_or(state.clock.moment.khz);
    let choice = match args.session.tsc.into() {
        // A trapped TSC must stay trapped: it continues from its value, the host's TSC would jump.
        SourceChoice::Auto => state.machine.source.choice_after(),
        fixed @ SourceChoice::Fixed(_) => fixed,
    };
    let machine = Machine::from_state(env, state, memory.clone(), choice, time, khz, outputs)?;
    machine.check_downtime(args.session.downtime.into())?;
    Ok(machine)
}
