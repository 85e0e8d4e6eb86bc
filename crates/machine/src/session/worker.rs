//! The machine's own thread: runs it, and handles requests between runs.

use std::{collections::VecDeque, time::Duration};

use vmtime::{Khz, Length, VmTime};

use super::{
    Cycle, Finish, Options, Report, SessionError, heartbeat,
    helper_threads::{self, HelperThreads},
    memory_verification::MemoryVerification,
    moving::Move,
    request::Request,
    save::Save,
};
use crate::{
    blame::{Blame, Blamed},
    control::{
        ApiError, Command, Reply, Status,
        api::{self, RunState},
    },
    machine::{
        Machine,
        audit::Summary,
        config::{HostEnvironment, TimeMode},
        error::RunError,
        policy::{Policies, check_ratio},
        sched::mailbox::Mailbox,
        stop::StopReason,
    },
};

pub(super) struct Worker<'a, 'scope, 'env> {
    pub(super) env: &'a HostEnvironment,
    /// None only after a migration that failed half-way.
    machine: Option<Machine>,
    pub(super) verification: MemoryVerification<'env>,
    pub(super) helper_threads: &'a mut HelperThreads<'scope, 'env>,
    pub(super) options: &'a Options,
    pub(super) inbox: &'env Mailbox<Request>,
    /// The snapshot that is being made.
    pub(super) save: Option<Save<'scope>>,
    /// The VM's move to another VMM.
    pub(super) moving: Option<Move<'scope>>,
    /// Requests that have to wait for these.
    deferred: VecDeque<Request>,
    next_migration: Option<VmTime>,
    migrations: usize,
    pub(super) host_stops: u64,
}

pub(super) fn work<'env>(
    env: &HostEnvironment,
    machine: Machine,
    verification: MemoryVerification<'env>,
    helper_threads: &mut HelperThreads<'_, 'env>,
    options: &Options,
    inbox: &'env Mailbox<Request>,
) -> Result<Report, SessionError> {
    let mut worker = Worker {
        env,
        machine: Some(machine),
        verification,
        helper_threads,
        options,
        inbox,
        save: None,
        moving: None,
        deferred: VecDeque::new(),
        next_migration: None,
        migrations: 0,
        host_stops: 0,
    };
    let finish = worker.start().and_then(|()| worker.run());
    let finish = worker.finish_move(finish);
    // A requested end cancels a snapshot that is being made. If the guest ended by itself, the snapshot is completed
    // first.
    let saved = worker.end_save(!matches!(finish, Ok(Finish::Ended(_) | Finish::Saved)));
    // Before any other error is reported: damaged memory may have caused that error.
    worker.verification.check()?;
    let finish = finish?;
    saved?;
    let host_stops = worker.host_stops;
    let machine = worker.machine()?;
    let summary = machine.tick_summary();
    let (no_ring, timer, announced) = (machine.why_no_ring(), machine.timer_summary(), machine.announces_ring());
    // The guest's image announces a tick ring, but the guest was saved or stopped before it created one: no ticks so
    // far.
    let not_created_yet = announced && !matches!(finish, Finish::Ended(_));
    let summary = summary.or_else(|| not_created_yet.then(Summary::default));
    let trace = machine.finish_trace(finish.finish_limit());
    let vm_ns = machine.vm_time();
    let (costs, assists, guest_stopped) = (machine.costs(), machine.assists(), machine.guest_stopped());
    let (wall_error_ns, vmclock_error_ns) = (machine.wall_error_ns(), machine.vmclock_error_ns());
    let (migrations, migrations_here) = (machine.migrations(), machine.migrations_here());
    let downtimes = machine.downtimes();
    Ok(Report {
        finish,
        summary,
        no_ring,
        timer,
        costs,
        assists,
        vm_ns,
        migrations,
        migrations_here,
        host_stops,
        downtimes,
        guest_stopped,
        wall_error_ns,
        vmclock_error_ns,
        trace,
    })
}

/// The shortest migration period in real time. With a shorter one the guest makes no progress between two migrations.
const SHORTEST_PERIOD: Duration = Duration::from_millis(1);

/// Checks the period and all frequencies of `cycle`, so that an impossible one is reported before the guest runs.
pub(super) fn check(env: &HostEnvironment, machine: &Machine, cycle: &Cycle) -> Result<(), SessionError> {
    if cycle.every < SHORTEST_PERIOD && machine.time_mode() == TimeMode::Real {
        return Err(RunError::Usage(format!(
            "--migrate-every {} is too short for real time: use 1ms or more",
            Length(cycle.every)
        ))
        .into());
    }
    let mut present = machine.next_khz();
    // The first frequency follows the last one again.
    for khz in cycle.khz.iter().chain(cycle.khz.first()) {
        check_ratio(present, *khz)?;
        machine.check_source(env, *khz)?;
        present = *khz;
    }
    Ok(())
}

impl<'env> Worker<'_, '_, 'env> {
    fn start(&mut self) -> Result<(), SessionError> {
        let options = self.options;
        let machine = self.machine()?;
        if !options.paused {
            machine.resume(&options.policies)?;
        }
        self.next_migration = options.migrate.as_ref().map(|cycle| self.after(cycle)).transpose()?;
        Ok(())
    }

    pub(super) fn machine(&mut self) -> Result<&mut Machine, SessionError> {
        self.machine.as_mut().ok_or(SessionError::Lost)
    }

    /// The VM time one period from now.
    fn after(&mut self, cycle: &Cycle) -> Result<VmTime, SessionError> {
        let now = self.machine()?.vm_time();
        Ok(after(now, cycle.every))
    }

    /// The VM time at which the helper threads are started; none if they are needed at once.
    fn head_start(&mut self) -> Result<Option<VmTime>, SessionError> {
        let Options { api_sock, paused, .. } = self.options;
        let no_client = api_sock.is_none() && !paused;
        let machine = self.machine()?;
        let alone = machine.cpu_count() == 1 && machine.time_mode() == TimeMode::Real;
        let end = after(machine.vm_time(), helper_threads::HEAD_START);
        // A TSC about to overflow never reaches that time, and the head start would not end.
        let reaches_end = machine.reaches(end);
        Ok((no_client && alone && reaches_end).then_some(end))
    }

    fn run(&mut self) -> Result<Finish, SessionError> {
        let inbox = self.inbox;
        let mut head_start = self.head_start()?;
        if head_start.is_none() {
            self.helper_threads.start()?;
        }
        loop {
            // Requests before the guest: it enters KVM_RUN again only when none is left that can be carried out.
            // Deferred ones come first, because they are older than those in the mailbox.
            loop {
                let finish = match self.ready() {
                    Some(request) => self.carry_out(request)?,
                    None => match inbox.take() {
                        Some(request) => self.receive(request)?,
                        None => break,
                    },
                };
                if let Some(finish) = finish {
                    return Ok(finish);
                }
            }
            if self.machine()?.is_paused() {
                if let Some(finish) = self.receive(inbox.wait_and_take())? {
                    return Ok(finish);
                }
                continue;
            }
            // A client's snapshot is completed before the one of `--save-at` starts.
            let save_at = self.options.save.as_ref().filter(|_| self.save.is_none()).map(|(at, _)| *at);
            let stop = [save_at, self.next_migration, head_start].into_iter().flatten().min();
            match self.machine()?.run(inbox, stop)? {
                StopReason::Ended(end) => return Ok(Finish::Ended(end)),
                StopReason::Requested => {}
                StopReason::HostStopped { length } => self.resume_after_host_stop(length)?,
                StopReason::Reached if stop == head_start => {
                    head_start = None;
                    self.helper_threads.start()?;
                }
                StopReason::Reached if stop == save_at => {
                    if let Some((_, dir)) = &self.options.save {
                        self.save_and_end(dir)?;
                    }
                }
                StopReason::Reached => self.next_in_cycle()?,
            }
        }
    }

    fn next_in_cycle(&mut self) -> Result<(), SessionError> {
        let Some(cycle) = &self.options.migrate else { return Ok(()) };
        let khz = match cycle.khz.len() {
            0 => None,
            length => cycle.khz.get(self.migrations % length).copied(),
        };
        self.migrations = self.migrations.wrapping_add(1);
        let khz = khz.unwrap_or(self.machine()?.next_khz());
        self.migrate(khz, &self.options.policies)?;
        self.next_migration = Some(self.after(cycle)?);
        Ok(())
    }

    fn migrate(&mut self, khz: Khz, policies: &Policies) -> Result<(), SessionError> {
        let was_paused = self.machine()?.is_paused();
        self.pause()?;
        let machine = self.machine.take().ok_or(SessionError::Lost)?;
        let (mut machine, migration) = machine.migrate(self.env, khz, policies)?;
        log::debug!("migrated from {} to {}", migration.from_khz, migration.to_khz);
        if was_paused {
            machine.pause()?;
        }
        self.machine = Some(machine);
        Ok(())
    }

    /// Takes the oldest deferred request, if it can be carried out now.
    fn ready(&mut self) -> Option<Request> {
        if self.deferred.front().is_some_and(|request| self.has_to_wait(request)) {
            return None;
        }
        self.deferred.pop_front()
    }

    /// Whether a request has to wait for the snapshot that is being made, or for the VM's move. A request that changes
    /// the machine's state waits until RAM is written, another snapshot or a move until this one is complete. During a
    /// move all of these wait.
    fn has_to_wait(&self, request: &Request) -> bool {
        let (saves, moves) = (self.save.as_ref(), self.moving.is_some());
        match request {
            Request::Command(Command::Status | Command::Quit, _) => false,
            Request::Command(Command::Snapshot(_) | Command::Migrate(api::Migrate { to: Some(_), .. }), _) => {
                moves || saves.is_some()
            }
            Request::Command(..) | Request::Type(..) => moves || saves.is_some_and(|save| !save.has_memory()),
            Request::Stop | Request::TimedOut(_) | Request::Heartbeat(_) | Request::Move(_) => false,
            Request::Damaged | Request::MemorySaved | Request::Saved => false,
        }
    }

    /// Carries a request out, now or when it is [ready](Self::ready).
    fn receive(&mut self, request: Request) -> Result<Option<Finish>, SessionError> {
        // Commands are carried out in order: one that comes after a deferred one is deferred too. Except those that do
        // not change the machine.
        let urgent = matches!(request, Request::Command(Command::Status | Command::Quit, _));
        let behind = !self.deferred.is_empty() && matches!(request, Request::Command(..)) && !urgent;
        if self.has_to_wait(&request) || behind {
            self.deferred.push_back(request);
            return Ok(None);
        }
        self.carry_out(request)
    }

    fn carry_out(&mut self, request: Request) -> Result<Option<Finish>, SessionError> {
        match request {
            Request::MemorySaved => self.memory_saved().map(|()| None),
            Request::Saved => self.saved(),
            Request::Stop => Ok(Some(Finish::Stopped)),
            Request::Damaged => self.verification.check().map(|()| None),
            Request::TimedOut(after) => {
                let cpus = self.machine()?.positions()?;
                Ok(Some(Finish::TimedOut { after, cpus }))
            }
            Request::Heartbeat(after) => {
                heartbeat::say(self.machine()?, after);
                Ok(None)
            }
            Request::Type(bytes, answer) => {
                answer.send(self.machine()?.type_in(&bytes));
                Ok(None)
            }
            Request::Command(Command::Snapshot(snapshot), answer) => self.save(snapshot, answer).map(|()| None),
            Request::Command(Command::Migrate(migrate @ api::Migrate { to: Some(_), .. }), answer) => {
                self.begin_move(migrate, answer).map(|()| None)
            }
            Request::Move(request) => self.move_request(request),
            Request::Command(command, answer) => {
                let quit = command == Command::Quit;
                match self.command(command) {
                    Ok(result) => answer.send(result),
                    Err(error) => {
                        answer.send(Err(ApiError::Internal(error.to_string())));
                        return Err(error);
                    }
                }
                Ok(quit.then_some(Finish::Stopped))
            }
        }
    }

    /// Carries a command out. The inner error is one that the client gets; the outer one ends the session.
    fn command(&mut self, command: Command) -> Result<Result<Reply, ApiError>, SessionError> {
        let (env, policies) = (self.env, self.options.policies.clone());
        let saving = self.save.as_ref().map(Save::status);
        let moving = self.moving.as_ref().map(Move::status);
        let ends = self.save.as_ref().is_some_and(Save::ends_the_session);
        let machine = self.machine()?;
        Ok(match command {
            Command::Resume(_) | Command::Migrate(_) if ends => {
                Err(ApiError::WrongState("the VM is being saved by --save-at, and ends then".to_owned()))
            }
            Command::Status => Ok(Reply::Status(Box::new(status(machine, saving, moving)))),
            Command::Pause => {
                self.pause()?;
                Ok(Reply::Done)
            }
            Command::Resume(api::Resume { deadline, downtime }) => {
                let downtime = downtime.unwrap_or(policies.downtime);
                let deadline = deadline.unwrap_or(policies.deadline);
                let policies = Policies { deadline, downtime, ..policies.clone() };
                match machine.check_downtime(downtime).and_then(|()| machine.resume(&policies)) {
                    // Its clock has started, and not all of it has: it must not run.
                    Err(error) if !machine.is_paused() => return Err(error.into()),
                    resumed => resumed.map(|_| Reply::Done).map_err(|error| refusal(&error)),
                }
            }
            Command::Migrate(api::Migrate { to: _, max_downtime_ms, insecure, tsc_khz, deadline, downtime }) => {
                if max_downtime_ms.is_some() || insecure {
                    let why = "`max_downtime_ms` and `insecure` are for a move to another VMM: say where (`to`)";
                    return Ok(Err(ApiError::BadRequest(why.to_owned())));
                }
                let (deadline, downtime) = (deadline.unwrap_or_default(), downtime.unwrap_or_default());
                let khz = tsc_khz.unwrap_or(machine.next_khz());
                match machine.check_migration(env, khz).and_then(|()| machine.check_downtime(downtime)) {
                    Err(error) => Err(refusal(&error)),
                    Ok(()) => {
                        let policies = Policies { deadline, downtime, ..policies.clone() };
                        self.migrate(khz, &policies)?;
                        Ok(Reply::Done)
                    }
                }
            }
            Command::Quit | Command::Snapshot(_) => Ok(Reply::Done),
        })
    }
}

fn after(now: VmTime, length: Duration) -> VmTime {
    VmTime(now.0.saturating_add(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)))
}

fn refusal(error: &RunError) -> ApiError {
    match error.blame() {
        Blame::Usage => ApiError::BadRequest(error.to_string()),
        Blame::Run | Blame::Host => ApiError::Internal(error.to_string()),
    }
}

fn status(machine: &Machine, saving: Option<api::Saving>, moving: Option<api::Moving>) -> Status {
    // In virtual time the rings are read at fixed places of the run, and a status must not add another.
    let ticks = match machine.time_mode() {
        TimeMode::Virtual => machine.ticks_read(),
        TimeMode::Real => machine.tick_summary().map(|summary| summary.next_seq),
    };
    let announced = machine.announces_ring();
    let now = machine.now();
    let state = if machine.is_paused() { RunState::Paused } else { RunState::Running };
    Status {
        state,
        lapic: machine.lapic(),
        tsc_source: machine.tsc_source(),
        tsc_khz: machine.tsc_khz(),
        guest_tsc: now.tsc,
        vm_time_ns: now.vm,
        judged: ticks.is_some(),
        // A ring that the guest has not created yet has no ticks.
        ticks: ticks.or_else(|| announced.then_some(0)),
        migrations: machine.migrations(),
        migrations_here: machine.migrations_here(),
        saving,
        moving,
    }
}
