//! A whole machine to a directory, and back.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use vm_memory::GuestMemoryMmap;

use super::{
    DirectoryError, MEMORY_FILE, MemoryLayout, STATE_FILE, SnapshotError, StateReader, StateWriter, directory, memory,
};
use crate::run::{HostEnvironment, Machine, state::MachineState};

/// Version of the sections that have not changed yet.
const VERSION: u32 = 1;
/// 2: who has the LAPICs.
const CPUS_VERSION: u32 = 2;
/// 2: the 8259 pair and the 8254.
const DEVICES_VERSION: u32 = 2;

/// Section names, in the order in which they are written.
const MACHINE: &str = "machine";
const CLOCK: &str = "clock";
const CPUS: &str = "cpus";
const DEVICES: &str = "devices";
const SITES: &str = "trap-sites";
const JUDGE: &str = "judge";
const MEMORY: &str = "memory";

/// Writes a paused machine to the new (or empty) directory `dir`: all of it or nothing.
///
/// # Errors
/// [`SnapshotError`]; the machine is unharmed and `dir` is as it was.
pub fn save(machine: &mut Machine, env: &HostEnvironment, dir: &Path) -> Result<(), SnapshotError> {
    let state = machine.state(env)?;
    directory::save(dir, |temporary| {
        let path = temporary.join(MEMORY_FILE);
        let file = directory::create_file(temporary, MEMORY_FILE)?;
        // The file holds what the guest was loaded with, not our patches: it can be restored where nothing is patched.
        let layout = machine.with_original_code(|ram| memory::write(&file, &path, ram, &memory::in_use(ram)?))?;
        let bytes = encode(&state, &layout)?;
        let mut file = directory::create_file(temporary, STATE_FILE)?;
        let io = |source| DirectoryError::Io { action: "write", path: temporary.join(STATE_FILE), source };
        file.write_all(&bytes).map_err(io)?;
        Ok(())
    })
}

fn encode(state: &MachineState, layout: &MemoryLayout) -> Result<Vec<u8>, SnapshotError> {
    let MachineState { machine, clock, cpus, devices, sites, judge } = state;
    let mut writer = StateWriter::new();
    writer.section(MACHINE, VERSION, machine)?;
    writer.section(CLOCK, VERSION, clock)?;
    writer.section(CPUS, CPUS_VERSION, cpus)?;
    writer.section(DEVICES, DEVICES_VERSION, devices)?;
    writer.section(SITES, VERSION, sites)?;
    writer.section(JUDGE, VERSION, judge)?;
    writer.section(MEMORY, VERSION, layout)?;
    Ok(writer.finish())
}

fn decode(mut reader: StateReader) -> Result<(MachineState, MemoryLayout), SnapshotError> {
    let state = MachineState {
        machine: reader.take(MACHINE, VERSION)?,
        clock: reader.take(CLOCK, VERSION)?,
        cpus: reader.take(CPUS, CPUS_VERSION)?,
        devices: reader.take(DEVICES, DEVICES_VERSION)?,
        sites: reader.take(SITES, VERSION)?,
        judge: reader.take(JUDGE, VERSION)?,
    };
    let layout = reader.take(MEMORY, VERSION)?;
    reader.finish()?;
    Ok((state, layout))
}

/// What was loaded and is not yet known to be undamaged: the content of RAM. A guest can run meanwhile, but nothing that
/// it comes to may be passed on before [`Self::verify`] says that it ran on what was saved.
#[derive(Debug)]
#[must_use = "nothing else finds damaged memory"]
pub struct Unverified {
    file: Arc<File>,
    path: PathBuf,
    layout: MemoryLayout,
}

impl Unverified {
    /// Reads RAM from the snapshot and checks it. Calls `between` often enough to change priorities there.
    ///
    /// # Errors
    /// It is damaged, or cannot be read.
    pub fn verify(&self, between: impl FnMut()) -> Result<(), SnapshotError> {
        let Self { file, path, layout } = self;
        Ok(memory::verify(file, path, layout, between)?)
    }
}

/// A machine that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// Everything but RAM.
    pub state: MachineState,
    /// RAM, mapped privately: the files are never written.
    pub memory: Arc<GuestMemoryMmap>,
    /// What is to be checked yet.
    pub unverified: Unverified,
}

/// Reads and checks the snapshot in `dir`, but the content of RAM.
///
/// # Errors
/// [`SnapshotError`] naming the file, the section and the reason.
pub fn load(dir: &Path) -> Result<Loaded, SnapshotError> {
    let (state, layout) = decode(directory::read_state(dir)?)?;
    let (file, path) = directory::open_memory(dir)?;
    let file = Arc::new(file);
    let memory = Arc::new(memory::map(&file, &path, &layout)?);
    Ok(Loaded { state, memory, unverified: Unverified { file, path, layout } })
}

/// The machine's state in `dir`, without looking at its RAM.
///
/// # Errors
/// As [`load`].
pub fn load_state(dir: &Path) -> Result<MachineState, SnapshotError> {
    Ok(decode(directory::read_state(dir)?)?.0)
}

/// What `vmm snapshot show` tells.
#[derive(Clone, Debug, Serialize)]
pub struct Overview {
    /// The directory.
    pub dir: String,
    /// Its sections, in the file's order.
    pub sections: Vec<super::SectionInfo>,
}

/// Describes the snapshot in `dir` without looking at its RAM.
///
/// # Errors
/// [`SnapshotError`].
pub fn show(dir: &Path) -> Result<Overview, SnapshotError> {
    let sections = directory::read_state(dir)?.sections()?;
    Ok(Overview { dir: dir.display().to_string(), sections })
}
