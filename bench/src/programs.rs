//! The programs that take part: `vmm`, the floor, the guest, and the other VMMs that are installed.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::process;

/// Paths of the programs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `vmm`.
    pub vmm: PathBuf,
    /// `floor`.
    pub floor: PathBuf,
    /// The guest's ELF file, the same for all.
    pub guest: PathBuf,
    /// Other VMMs.
    pub peers: Vec<Peer>,
}

/// Another VMM.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Which VMM it is.
    pub kind: PeerKind,
    /// Path of its program.
    pub path: PathBuf,
}

/// The VMMs that the guest boots on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerKind {
    /// QEMU, machine `microvm`.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

impl PeerKind {
    const ALL: [Self; 3] = [Self::Qemu, Self::Firecracker, Self::CloudHypervisor];

    /// Its name in the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU microvm",
            Self::Firecracker => "Firecracker",
            Self::CloudHypervisor => "Cloud Hypervisor",
        }
    }

    /// The program's name, and the environment variable for its path.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Qemu => ("qemu-system-x86_64", "BENCH_QEMU"),
            Self::Firecracker => ("firecracker", "BENCH_FIRECRACKER"),
            Self::CloudHypervisor => ("cloud-hypervisor", "BENCH_CLOUD_HYPERVISOR"),
        }
    }
}

impl Programs {
    /// `vmm` and `floor` beside this program, `guest.bin` one directory above, as cargo leaves them; peers by variable,
    /// or else on PATH.
    ///
    /// # Errors
    /// If one of ours is missing, or a variable names no file.
    pub fn find() -> Result<Self> {
        let this = env::current_exe()?;
        let beside = |name: &str| this.with_file_name(name);
        let guest = this.ancestors().skip(1).map(|dir| dir.join("guest.bin")).find(|guest| guest.is_file());
        let (vmm, floor) = (beside("vmm"), beside("floor"));
        let Some(guest) = guest.filter(|_| vmm.is_file() && floor.is_file()) else {
            bail!("vmm, floor and guest.bin are not where cargo leaves them: start scripts/bench, which builds them");
        };
        let mut peers = Vec::new();
        for kind in PeerKind::ALL {
            let (program, variable) = kind.program();
            let path = match env::var_os(variable) {
                Some(path) if !Path::new(&path).is_file() => {
                    bail!("{variable}={} is not a file: name the program", path.display())
                }
                Some(path) => Some(PathBuf::from(path)),
                None => on_path(program),
            };
            peers.extend(path.map(|path| Peer { kind, path }));
        }
        Ok(Self { vmm, floor, guest, peers })
    }
}

/// The first `program` on PATH.
#[must_use]
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

impl Peer {
    /// The command that boots `guest` with `mib` MiB of RAM and its console on standard output. `config` is the path of
    /// a file to write if the VMM needs one.
    ///
    /// # Errors
    /// If that file cannot be written.
    pub fn boot(&self, guest: &Path, mib: u64, config: &Path) -> Result<Command> {
        let mut command = Command::new(&self.path);
        let size = format!("{mib}M");
        match self.kind {
            PeerKind::Qemu => {
                command.args(["-M", "microvm", "-accel", "kvm", "-nodefaults", "-no-user-config", "-no-reboot"]);
                command.args(["-display", "none", "-serial", "stdio", "-m", &size]);
                command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel"]).arg(guest);
            }
            PeerKind::Firecracker => {
                let json = serde_json::json!({
                    "boot-source": { "kernel_image_path": guest, "boot_args": "" },
                    "drives": [],
                    "machine-config": { "vcpu_count": 1, "mem_size_mib": mib },
                });
                std::fs::write(config, json.to_string())?;
                command.args(["--no-api", "--config-file"]).arg(config);
            }
            PeerKind::CloudHypervisor => {
                command.args(["--console", "off", "--serial", "tty", "--cpus", "boot=1", "--memory"]);
                command.arg(format!("size={size}")).arg("--kernel").arg(guest);
            }
        }
        Ok(command)
    }

    /// The first line that it prints for `--version`.
    #[must_use]
    pub fn version(&self) -> String {
        version(&self.path)
    }
}

/// The first line that a program prints for `--version`.
#[must_use]
pub fn version(program: &Path) -> String {
    let said = process::finish(Command::new(program).arg("--version"));
    said.ok()
        .and_then(|ended| ended.stdout.lines().next().map(str::to_owned))
        .unwrap_or_else(|| program.file_name().map(OsString::from).unwrap_or_default().to_string_lossy().into_owned())
}
