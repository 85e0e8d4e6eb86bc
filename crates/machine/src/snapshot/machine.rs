//! Encoding and writing the state of a whole machine, and loading it again.

use std::{io::Write, path::Path, sync::Arc};

use serde::Serialize;

use super::{
    DirectoryError, MEMORY_FILE, MemoryLayout, STATE_FILE, SnapshotError, StateReader, StateWriter,
    chain::{BASE, BASE_VERSION, BaseState, Chain, Link, MEMORY, MEMORY_VERSION},
    directory,
    memory::{self, MemoryError},
    pager::{ExitOnDamage, Pager},
    saving::Progress,
};
use crate::{
    boot::sites::SiteState,
    host::{file_signals::guard_mapped_file, writeback::begin_writeback},
    machine::{
        audit::TickAuditState,
        clock::ClockState,
        config::host_fingerprint::HostFingerprint,
        dirty::SnapshotId,
        state::{CpuStates, DevicesState, MachineSection, MachineState},
    },
    mem::ram::GuestRam,
};

/// The version of sections whose format has never changed.
const VERSION: u32 = 1;
/// 2 added the number of migrations, and the RDTSCs that are no trap sites.
const MACHINE_VERSION: u32 = 2;
/// 2 added whether KVM or the VMM emulates the LAPICs. 3 added PV EOI.
const CPUS_VERSION: u32 = 3;
/// 2 added the 8259 pair and the 8254.
const DEVICES_VERSION: u32 = 2;
/// 2 removed the wall-clock time of VM time 0, which is read again at a restore.
const CLOCK_VERSION: u32 = 2;
/// 2 added whether KVM can offset a guest's TSC.
const HOST_VERSION: u32 = 2;

/// How much of RAM is checked before the VM is created, in bytes: the lowest pages with data, where kernels are. The
/// guest would need those blocks at once, and waiting for a block takes ten times as long as reading it.
const CHECKED_FIRST_BYTES: u64 = 256 << 10;

/// Section names, in the order in which they are written.
const MACHINE: &str = "machine";
const CLOCK: &str = "clock";
const CPUS: &str = "cpus";
const DEVICES: &str = "devices";
const SITES: &str = "trap-sites";
const TICK_AUDIT: &str = "judge";
const HOST: &str = "host";

pub(super) fn write_state(temporary: &Path, bytes: &[u8]) -> Result<(), DirectoryError> {
    let mut file = directory::create_file(temporary, STATE_FILE)?;
    let io = |source| DirectoryError::Io { action: "write", path: temporary.join(STATE_FILE), source };
    file.write_all(bytes).map_err(io)?;
    begin_writeback(&file);
    Ok(())
}

/// Writes the snapshot `from` and all that it is based on as one whole snapshot to the new (or empty) directory `to`.
///
/// # Errors
/// [`SnapshotError`]; `to` is then as it was.
pub fn merge(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    let Loaded { state, host, memory: ram, .. } = load(from, Verify::First)?;
    directory::save(to, |temporary| {
        let file = directory::create_file(temporary, MEMORY_FILE)?;
        let path = temporary.join(MEMORY_FILE);
        let layout = memory::write(&file, &path, &ram, &memory::in_use(&ram)?, &Progress::default())?;
        Ok(write_state(temporary, &encode(&state, host.as_ref(), &layout, None)?)?)
    })
}

pub(super) fn encode(
    state: &MachineState,
    host: Option<&HostFingerprint>,
    layout: &MemoryLayout,
    base: Option<&BaseState>,
) -> Result<Vec<u8>, SnapshotError> {
    let mut writer = sections(state, host)?;
    writer.section(MEMORY, MEMORY_VERSION, layout)?;
    if let Some(base) = base {
        writer.section(BASE, BASE_VERSION, base)?;
    }
    Ok(writer.finish())
}

/// The machine without its RAM, as the bytes of a `state` file.
///
/// # Errors
/// If it cannot be encoded.
pub fn encode_without_memory(state: &MachineState, host: Option<&HostFingerprint>) -> Result<Vec<u8>, SnapshotError> {
    Ok(sections(state, host)?.finish())
}

/// Reads what [`encode_without_memory`] wrote.
///
/// # Errors
/// It is damaged, or of no machine.
pub fn decode_without_memory(bytes: &[u8]) -> Result<(MachineState, Option<HostFingerprint>), SnapshotError> {
    decode(StateReader::parse(bytes)?)
}

fn sections(state: &MachineState, host: Option<&HostFingerprint>) -> Result<StateWriter, SnapshotError> {
    let MachineState { machine, clock, cpus, devices, sites, audit } = state;
    let mut writer = StateWriter::new();
    writer.section(MACHINE, MACHINE_VERSION, machine)?;
    writer.section(CLOCK, CLOCK_VERSION, clock)?;
    writer.section(CPUS, CPUS_VERSION, cpus)?;
    writer.section(DEVICES, DEVICES_VERSION, devices)?;
    writer.section(SITES, VERSION, sites)?;
    writer.section(TICK_AUDIT, VERSION, audit)?;
    if let Some(host) = host {
        writer.section(HOST, HOST_VERSION, host)?;
    }
    Ok(writer)
}

fn decode(mut reader: StateReader) -> Result<(MachineState, Option<HostFingerprint>), SnapshotError> {
    let state = MachineState {
        machine: reader.take(MACHINE, MACHINE_VERSION)?,
        clock: reader.take(CLOCK, CLOCK_VERSION)?,
        cpus: reader.take(CPUS, CPUS_VERSION)?,
        devices: reader.take(DEVICES, DEVICES_VERSION)?,
        sites: reader.take(SITES, VERSION)?,
        audit: reader.take(TICK_AUDIT, VERSION)?,
    };
    let host = reader.take_optional(HOST, HOST_VERSION)?;
    reader.finish()?;
    state.check()?;
    Ok((state, host))
}

fn open(dir: &Path) -> Result<(StateReader, Chain), SnapshotError> {
    let bytes = directory::read_state(dir)?;
    let mut reader = directory::parse_state(dir, &bytes)?;
    let chain = Chain::open(dir, bytes, &mut reader)?;
    Ok((reader, chain))
}

/// When the content of RAM is checked.
pub enum Verify {
    /// All of it, before the VM is created.
    First,
    /// Each block before its first use. If the host cannot do that, or if blocks have no checksums, all of it before
    /// the VM is created. The function is called to end the process if a damaged block leaves no other way.
    BeforeUse(ExitOnDamage),
}

/// A machine that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// Everything but RAM.
    pub state: MachineState,
    /// The host that it was saved on, if the snapshot has that.
    pub host: Option<HostFingerprint>,
    /// The id of the snapshot.
    pub id: SnapshotId,
    /// RAM, mapped privately: the files are never written.
    pub memory: Arc<GuestRam>,
    /// The files that RAM is mapped from.
    pub files: MemoryFiles,
    /// The pager that maps the rest of RAM, if not all of it is mapped yet.
    pub pager: Option<Pager>,
}

/// The memory files of a snapshot that a VM runs from.
#[derive(Debug)]
pub struct MemoryFiles(Arc<Chain>);

impl MemoryFiles {
    /// Checks, after the VM has run, that the files still have their sizes. `lost` is the reason if guest memory is
    /// already known to be lost.
    ///
    /// # Errors
    /// A file became shorter in the meantime, or `lost` is given. The guest's results are then invalid.
    pub fn check(&self, lost: Option<String>) -> Result<(), SnapshotError> {
        self.0.check_sizes()?;
        let path = self.0.mapped_path().to_owned();
        lost.map_or(Ok(()), |reason| Err(MemoryError::Lost { path, reason }.into()))
    }
}

/// Loads the snapshot in `dir`: reads and checks its state, and maps RAM, which is checked as `verify` says.
///
/// # Errors
/// [`SnapshotError`] naming the file, the section and the reason.
pub fn load(dir: &Path, verify: Verify) -> Result<Loaded, SnapshotError> {
    let (reader, chain) = open(dir)?;
    let (state, host) = decode(reader)?;
    let chain = Arc::new(chain);
    let map = || -> Result<Arc<GuestRam>, SnapshotError> {
        let memory = chain.map()?;
        let path = chain.mapped_path().display();
        let why = "was truncated, or cannot be read, while it was in use";
        guard_mapped_file(&memory, &format!("vmm: snapshot {}: memory file {path} {why}", dir.display()));
        Ok(Arc::new(memory))
    };
    let before_use = match verify {
        Verify::First => None,
        Verify::BeforeUse(exit) => Some(exit),
    };
    let (id, files) = (chain.id(), MemoryFiles(Arc::clone(&chain)));
    let mut loaded = Loaded { state, host, id, memory: map()?, files, pager: None };
    let Some(exit) = before_use.filter(|_| chain.has_blocks()) else {
        // The files are checked completely, also pages that newer layers replace: a file that was changed is not to be
        // used.
        chain.verify()?;
        chain.complete(&loaded.memory, u64::MAX)?;
        return Ok(loaded);
    };
    if let Some(rest) = chain.complete(&loaded.memory, CHECKED_FIRST_BYTES)? {
        match Pager::start(&chain, &loaded.memory, rest, exit) {
            Ok(pager) => loaded.pager = Some(pager),
            Err(error) => {
                log::debug!("all of guest memory is checked first: {error}");
                loaded.memory = map()?;
                chain.complete(&loaded.memory, u64::MAX)?;
            }
        }
    }
    Ok(loaded)
}

/// The content of a snapshot, for `vmm snapshot show`.
#[derive(Debug, Serialize)]
pub struct Overview {
    /// The directory.
    pub dir: String,
    /// Its sections, in the file's order.
    pub sections: Vec<Shown>,
    /// The snapshots that make it up, the newest first: itself, and what it is based on.
    pub chain: Vec<Link>,
    /// The machine's state; the sections contain it, too.
    #[serde(skip)]
    pub state: MachineState,
}

/// One section, for `vmm snapshot show`.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// Its name, version and size.
    #[serde(flatten)]
    pub info: super::SectionInfo,
    /// Its content.
    pub payload: Payload,
}

/// The content of a section, parsed and checked. Printed again it is therefore no larger than in the file.
#[derive(Debug, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "each is named as its section")]
pub enum Payload {
    Machine(Box<MachineSection>),
    Clock(Box<ClockState>),
    Cpus(Box<CpuStates>),
    Devices(Box<DevicesState>),
    Sites(Vec<SiteState>),
    TickAudit(TickAuditState),
    Host(Box<HostFingerprint>),
    Memory(MemoryLayout),
    Base(BaseState),
}

/// Describes the snapshot in `dir` without reading its RAM.
///
/// # Errors
/// [`SnapshotError`].
pub fn show(dir: &Path) -> Result<Overview, SnapshotError> {
    let (reader, chain) = open(dir)?;
    let (state, host) = decode(reader)?;
    // `open` has taken the sections about memory out of its reader, so the state is parsed again for them.
    let mut again = directory::parse_state(dir, chain.state())?;
    let infos = again.sections();
    let mut layout = Some(again.take(MEMORY, MEMORY_VERSION)?);
    let mut base = again.take_optional(BASE, BASE_VERSION)?;
    let mut host = host.map(Box::new);
    let MachineState { machine, clock, cpus, devices, sites, audit } = &state;
    let payload = |name: &str| match name {
        MACHINE => Some(Payload::Machine(Box::new(machine.clone()))),
        CLOCK => Some(Payload::Clock(Box::new(*clock))),
        CPUS => Some(Payload::Cpus(Box::new(cpus.clone()))),
        DEVICES => Some(Payload::Devices(Box::new(devices.clone()))),
        SITES => Some(Payload::Sites(sites.clone())),
        TICK_AUDIT => Some(Payload::TickAudit(audit.clone())),
        HOST => host.take().map(Payload::Host),
        MEMORY => layout.take().map(Payload::Memory),
        BASE => base.take().map(Payload::Base),
        // There is no other section: `decode` would have failed.
        _ => None,
    };
    let shown = infos.iter().map(|info| info.name.as_str()).map(payload).collect::<Vec<_>>();
    let sections = infos.into_iter().zip(shown);
    let sections = sections.filter_map(|(info, payload)| Some(Shown { info, payload: payload? })).collect();
    Ok(Overview { dir: dir.display().to_string(), sections, chain: chain.links(), state })
}
