//! The command line of `vmm sites`, and the flag `--sites`.

use std::path::PathBuf;

use clap::Args;

/// Find the instructions of a kernel that read the TSC, write the TSC deadline, or spin.
///
/// vmm can answer these itself (--tsc trapped, --time virtual). The kernel is an ELF file with a PVH entry, or a
/// bzImage, whose payload is unpacked.
#[derive(Debug, Args)]
pub struct Sites {
    /// The kernel.
    pub kernel: PathBuf,
    /// Write the sites to this file, for --sites FILE; - is standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Where a guest's trap sites come from.
#[derive(Clone, Debug)]
pub enum SitesFrom {
    /// Its code is searched.
    Auto,
    /// A file that `vmm sites` wrote.
    File(PathBuf),
}

/// Parses the value of `--sites`.
pub fn sites_from(text: &str) -> Result<SitesFrom, String> {
    match text {
        "" => Err("neither auto nor a file".to_owned()),
        "auto" => Ok(SitesFrom::Auto),
        file => Ok(SitesFrom::File(file.into())),
    }
}
