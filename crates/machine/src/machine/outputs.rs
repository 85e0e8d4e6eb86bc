//! The outputs of a machine: the guest's console, and the trace.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{error::RunError, record::trace::Trace, shared::VcpuShared};
use crate::output::Outlet;

/// Where a machine's output goes.
pub struct Outputs {
    /// The guest's console output.
    pub console: Box<dyn Write + Send>,
    /// The trace.
    pub trace: TraceTo,
    /// Outputs whose reader may be slow: while one of them or the trace is full, the vCPUs wait. Empty: they never
    /// wait.
    pub outlets: Vec<Outlet>,
}

/// Where a trace goes.
pub enum TraceTo {
    /// Nowhere.
    Nowhere,
    /// To a new file. It is created with the machine, so that an older file is kept if the machine cannot be created.
    File(PathBuf),
    /// To standard output.
    Stdout,
    /// To this trace, which is continued.
    Continue(Trace),
}

impl TraceTo {
    /// Creates the file.
    pub(crate) fn begin(self) -> Result<Trace, RunError> {
        match self {
            Self::Nowhere => Ok(Trace::default()),
            Self::File(path) => Trace::to_file(&path),
            Self::Stdout => Trace::to_stdout(),
            Self::Continue(trace) => Ok(trace),
        }
    }
}

impl Outputs {
    /// The console to `console`, the trace to the file `trace`, if any.
    #[must_use]
    pub fn new(console: Box<dyn Write + Send>, trace: Option<&Path>) -> Self {
        let trace = trace.map_or(TraceTo::Nowhere, |path| TraceTo::File(path.to_owned()));
        Self { console, trace, outlets: Vec::new() }
    }

    /// The console to `console`, the trace to `trace`.
    #[must_use]
    pub fn to_outlet(console: Outlet, trace: TraceTo) -> Self {
        Self { outlets: vec![console.clone()], console: Box::new(console), trace }
    }
}

/// Collects the outputs that the vCPUs wait for while one is full, and makes each of them ring the vCPUs' doorbells
/// when there is room again.
pub(crate) fn outlets(given: Vec<Outlet>, trace: &Trace, vcpus: &[VcpuShared]) -> Vec<Outlet> {
    // A machine that is stepped never waits: the stepper's caller reads the trace itself.
    if given.is_empty() {
        return given;
    }
    let mut all = given;
    // The trace of a migrated machine is continued, and is already among `given`.
    let trace = trace.outlet().filter(|trace| !all.iter().any(|given| given.is(trace)));
    all.extend(trace);
    for outlet in &all {
        let doorbells: Vec<_> = vcpus.iter().map(|vcpu_shared| Arc::clone(&vcpu_shared.doorbell)).collect();
        outlet.on_room(move || doorbells.iter().for_each(|doorbell| doorbell.ring()));
    }
    all
}
