//! Measures snapshots of a running VM over its control socket: from the request to the answer, which comes when all
//! data is on the disk.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    api::Api,
    lab::{Lab, number},
    process::{Running, mappings},
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

/// Size of the guest's RAM disk: so much of its RAM is touched and holds no zeros.
const TOUCHED: usize = 4 << 20;
/// Allowance for the state file and the file system's overhead.
const MORE: f64 = 65_536.0;
const MS: f64 = 1e6;
/// The guest's option to write 64 pages a tick.
const DIRTY: &str = "touch=64";

/// A running guest, and its control socket.
pub(crate) struct Guest {
    process: Running,
    api: Api,
    memory: u64,
    dirs: PathBuf,
    number: u32,
}

impl Guest {
    /// Starts a guest with `mib` MiB, 4 of them touched, and waits until it makes ticks.
    pub(crate) fn start(lab: &Lab, mib: u32, cmdline: &str, flags: &str) -> Result<Self> {
        let (disk, socket) = (lab.path("random"), lab.path("api.sock"));
        let mut random = oorandom::Rand64::new(1);
        let bytes: Vec<u8> = (0..TOUCHED / 8).flat_map(|_| random.rand_u64().to_le_bytes()).collect();
        fs::write(&disk, bytes)?;
        let _ = fs::remove_file(&socket);
        let mut command = lab.guest(&format!("scenario=idle {cmdline}"), &format!("--memory {mib}M {flags}"));
        let process = Running::start(command.arg("--initrd").arg(&disk).arg("--api-sock").arg(&socket))?;
        let api = Api::wait(&socket)?;
        while number(&api.status()?, "/ticks")? < 3.0 {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { process, api, memory: u64::from(mib) << 20, dirs: lab.path("snapshots"), number: 0 })
    }

    /// Starts a guest that writes 64 pages at every tick, with dirty tracking on.
    pub(crate) fn start_dirty(lab: &Lab) -> Result<Self> {
        Self::start(lab, 128, &format!("hz=100 {DIRTY}"), "--track-dirty")
    }

    /// The resident part of its RAM, and the process's other resident memory, in bytes.
    pub(super) fn resident(&self) -> Result<(u64, u64)> {
        resident(self.process.id(), self.memory)
    }

    /// Takes a snapshot into a new directory, based on `base` if given. Returns the time it took, and the directory.
    pub(crate) fn snapshot(&mut self, base: Option<&Path>) -> Result<(f64, PathBuf)> {
        fs::create_dir_all(&self.dirs)?;
        self.number += 1;
        let dir = self.dirs.join(self.number.to_string());
        let body = match base {
            Some(base) => json!({ "dir": dir, "base": base }),
            None => json!({ "dir": dir }),
        };
        let took = self.api.put("snapshot", &body)?;
        Ok((took.as_secs_f64() * 1e9, dir))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dirs);
    }
}

/// The resident part of the guest's RAM of `memory` bytes, and the other resident memory of process `pid`.
pub(super) fn resident(pid: u32, memory: u64) -> Result<(u64, u64)> {
    let mappings = mappings(pid)?;
    let all: u64 = mappings.iter().map(|mapping| mapping.resident).sum();
    let ram = mappings.iter().find(|mapping| mapping.size == memory).context("no mapping has the size of guest RAM")?;
    Ok((ram.resident, all.saturating_sub(ram.resident)))
}

/// Disk space of the files in `dir`, in bytes.
fn on_disk(dir: &Path) -> Result<f64> {
    let mut blocks = 0_u32;
    for entry in fs::read_dir(dir)? {
        blocks = blocks.saturating_add(u32::try_from(entry?.metadata()?.blocks())?);
    }
    // stat(2): the unit is 512 bytes, whatever the file system's block size.
    Ok(f64::from(blocks) * 512.0)
}

pub(super) fn full(lab: &Lab) -> Result<Outcome> {
    let mut guest = Guest::start(lab, 128, "hz=100", "")?;
    let (touched, _) = guest.resident()?;
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for round in 0..=lab.rounds(12) {
        let (took, dir) = guest.snapshot(None)?;
        // The first warms up.
        if round > 0 {
            times.push(took);
            sizes.push(on_disk(&dir)?);
        }
        fs::remove_dir_all(&dir)?;
    }
    let touched = touched as f64;
    let measured = Measured::default().with("vmm", Unit::Ns, times).with("vmm, on disk", Unit::Bytes, sizes);
    let [time, size] = ["vmm", "vmm, on disk"].map(|who| measured.median_of(who));
    Ok(Outcome::Measured(
        measured
            .check("request to answer", Unit::Ns, time, Bound::AtMost(10.0 * MS))
            .check("on disk beyond what was touched", Unit::Bytes, size.map(|size| size - touched), Bound::AtMost(MORE))
            .note(format!("{} of guest RAM were touched", Unit::Bytes.show(touched))),
    ))
}

/// Why incremental snapshots cannot be measured here; none if they can.
pub(crate) fn lacks_incremental(lab: &Lab) -> Result<Option<String>> {
    if !lab.vmm_takes("ctl --api-sock x snapshot", "--base")? {
        return Ok(Some("this vmm has no snapshot --base".to_owned()));
    }
    Ok((!lab.guest_takes(DIRTY)?).then(|| format!("this guest has no {DIRTY}")))
}

pub(super) fn incremental(lab: &Lab) -> Result<Outcome> {
    if let Some(why) = lacks_incremental(lab)? {
        return Ok(Outcome::NotThere(why));
    }
    let mut guest = Guest::start_dirty(lab)?;
    let (_, mut base) = guest.snapshot(None)?;
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for round in 0..=lab.rounds(12) {
        // Waits for some ticks. Each touches the same 64 pages.
        thread::sleep(Duration::from_millis(50));
        let (took, dir) = guest.snapshot(Some(&base))?;
        if round > 0 {
            times.push(took);
            sizes.push(on_disk(&dir)?);
        }
        base = dir;
    }
    let measured = Measured::default().with("vmm", Unit::Ns, times).with("vmm, on disk", Unit::Bytes, sizes);
    let time = measured.median_of("vmm");
    Ok(Outcome::Measured(measured.check("request to answer", Unit::Ns, time, Bound::AtMost(2.0 * MS))))
}
