//! Snapshots of changes: each holds the pages that differ from its base, another snapshot.
//!
//! A snapshot's id is the SHA-256 of its `state` file, which has the checksum of its memory and, in a chain, the id of its
//! base. So an id stands for everything that a restore reads: a base that was exchanged, changed or saved again does not
//! pass, and no chain can lead back to where it began.

mod error;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::memory::{self, MemoryError, MemoryLayout};
use super::{SnapshotError, StateReader, directory};
use crate::{
    boot::GuestRam,
    run::{PageSet, SnapshotId},
};

pub use error::ChainError;

/// The most snapshots that a chain may have. Each costs a restore the reading of one more `state`.
pub const MAX_LAYERS: usize = 64;

/// The section that only a snapshot of changes has, and its version.
pub(super) const BASE: &str = "base";
pub(super) const BASE_VERSION: u32 = 1;
/// The section that every snapshot has, and its version.
pub(super) const MEMORY: &str = "memory";
pub(super) const MEMORY_VERSION: u32 = 1;

/// What a snapshot of changes says of its base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseState {
    /// The base's directory; a relative one begins at the snapshot's own.
    pub dir: PathBuf,
    /// The base's id.
    #[serde(with = "hex")]
    pub id: SnapshotId,
    /// How many snapshots the chain has, from this one down to the whole one.
    pub layers: usize,
    /// The pages that this snapshot's own memory file holds, zeros among them: first page and number of pages of each run,
    /// rising.
    pub pages: Vec<(usize, usize)>,
}

/// The id of the snapshot with this `state` file.
pub(super) fn id_of(state: &[u8]) -> SnapshotId {
    Sha256::digest(state).into()
}

/// A base that fits: `base` is the snapshot `latest`, and the new one will be `dir`.
///
/// # Errors
/// Why it does not fit.
pub(super) fn new_base(latest: SnapshotId, base: &Path, dir: &Path) -> Result<BaseState, SnapshotError> {
    let bytes = directory::read_state(base)?;
    if id_of(&bytes) != latest {
        return Err(ChainError::NotLatest { base: base.to_owned() }.into());
    }
    let mut reader = directory::parse_state(base, &bytes)?;
    let below = reader.take_optional::<BaseState>(BASE, BASE_VERSION)?.map_or(1, |base| base.layers);
    if below >= MAX_LAYERS {
        return Err(ChainError::Full { base: base.to_owned() }.into());
    }
    let place = |path: &Path| {
        path.canonicalize().map_err(|error| ChainError::Path { base: base.to_owned(), reason: error.to_string() })
    };
    let at = place(base)?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Neighbours may move together.
    let relative = match (at.parent(), at.file_name()) {
        (Some(there), Some(name)) if there == place(parent)? => Some(Path::new("..").join(name)),
        _ => None,
    };
    let path = relative.unwrap_or(at);
    if path.to_str().is_none() {
        let reason = "its path is not UTF-8, and a snapshot cannot name it".to_owned();
        return Err(ChainError::Path { base: base.to_owned(), reason }.into());
    }
    Ok(BaseState { dir: path, id: latest, layers: below.saturating_add(1), pages: Vec::new() })
}

/// One snapshot of a chain, with its memory file open.
#[derive(Debug)]
struct Layer {
    dir: PathBuf,
    file: Arc<File>,
    path: PathBuf,
    layout: MemoryLayout,
    /// The pages that its file holds; none for a whole one.
    own: Option<PageSet>,
}

/// A snapshot and what it is based on, down to a whole one.
#[derive(Debug)]
pub(super) struct Chain {
    /// The `state` file of the newest.
    state: Vec<u8>,
    /// The newest first, each with the id of the one below it.
    upper: Vec<(Layer, SnapshotId)>,
    whole: Layer,
}

/// One snapshot of a chain, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Link {
    /// Its directory.
    pub dir: String,
    /// Its id.
    #[serde(with = "hex")]
    pub id: SnapshotId,
    /// How many pages its memory file holds that are not zero.
    pub pages: u64,
}

impl Chain {
    /// Opens the memory files of the snapshot `dir`, whose `state` file is `state` and whose sections are in `reader`, and of
    /// all that it is based on. Nothing of them is read yet.
    pub(super) fn open(dir: &Path, state: Vec<u8>, reader: &mut StateReader) -> Result<Self, SnapshotError> {
        let mut upper = Vec::new();
        let (mut layer, mut base) = open_layer(dir, reader)?;
        while let Some(BaseState { dir: there, id, .. }) = base {
            if upper.len().saturating_add(1) >= MAX_LAYERS {
                return Err(ChainError::TooLong { dir: dir.to_owned() }.into());
            }
            let above = layer.dir.clone();
            let there = resolve(&above, &there);
            let unusable = |source| ChainError::Base { dir: above.clone(), source: Box::new(source) };
            let bytes = directory::read_state(&there).map_err(|error| unusable(error.into()))?;
            if id_of(&bytes) != id {
                return Err(ChainError::WrongBase { dir: above, base: there }.into());
            }
            let mut reader = directory::parse_state(&there, &bytes).map_err(|error| unusable(error.into()))?;
            let (below, next) = open_layer(&there, &mut reader).map_err(unusable)?;
            if below.layout.regions != layer.layout.regions {
                let reason = "it has other regions than its base".to_owned();
                return Err(MemoryError::Layout { reason }.into());
            }
            upper.push((std::mem::replace(&mut layer, below), id));
            base = next;
        }
        Ok(Self { state, upper, whole: layer })
    }

    /// Maps guest RAM: the whole snapshot's file, with the newest of each changed page in place. Those are read now: there
    /// are few, and as a mapping of its own each run of them would cost as much.
    pub(super) fn map(&self) -> Result<GuestRam, MemoryError> {
        let Layer { file, path, layout, .. } = &self.whole;
        let ram = memory::map(file, path, layout)?;
        let mut covered: Option<PageSet> = None;
        for (layer, _) in &self.upper {
            let Some(mut pages) = layer.own.clone() else { continue };
            match &mut covered {
                Some(covered) => {
                    pages.subtract(covered);
                    covered.union(&pages);
                }
                None => covered = Some(pages.clone()),
            }
            memory::read_pages(&layer.file, &layer.path, &ram, layout, &pages)?;
        }
        Ok(ram)
    }

    /// Reads all memory files and checks them. Calls `between` often.
    pub(super) fn verify(&self, mut between: impl FnMut()) -> Result<(), MemoryError> {
        self.layers().try_for_each(|layer| memory::verify(&layer.file, &layer.path, &layer.layout, &mut between))
    }

    /// The id of the newest.
    pub(super) fn id(&self) -> SnapshotId {
        id_of(&self.state)
    }

    /// What it consists of, the newest first.
    pub(super) fn links(&self) -> Vec<Link> {
        let link = |(layer, id): (&Layer, SnapshotId)| Link {
            dir: layer.dir.display().to_string(),
            id,
            pages: layer.layout.pages,
        };
        let ids = [self.id()].into_iter().chain(self.upper.iter().map(|(_, below)| *below));
        self.layers().zip(ids).map(link).collect()
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.upper.iter().map(|(layer, _)| layer).chain([&self.whole])
    }
}

/// The directory that the snapshot `dir` calls `base`. A relative one is followed from where `dir` really is, whatever links
/// lead there.
fn resolve(dir: &Path, base: &Path) -> PathBuf {
    let mut place = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    for part in base.components() {
        match part {
            Component::ParentDir => drop(place.pop()),
            part => place.push(part),
        }
    }
    place
}

fn open_layer(dir: &Path, reader: &mut StateReader) -> Result<(Layer, Option<BaseState>), SnapshotError> {
    let layout: MemoryLayout = reader.take(MEMORY, MEMORY_VERSION)?;
    let base = reader.take_optional::<BaseState>(BASE, BASE_VERSION)?;
    let (file, path) = directory::open_memory(dir)?;
    memory::check_size(&file, &path, &layout)?;
    let own = base.as_ref().map(|base| own_pages(dir, &base.pages, memory::pages(&layout)?)).transpose()?;
    Ok((Layer { dir: dir.to_owned(), file: Arc::new(file), path, layout, own }, base))
}

/// The set of pages that `runs` are, of `pages`.
fn own_pages(dir: &Path, runs: &[(usize, usize)], pages: usize) -> Result<PageSet, SnapshotError> {
    let mut set = PageSet::none(pages);
    let mut last = 0;
    for (first, count) in runs.iter().copied() {
        let end = first.checked_add(count).filter(|end| count != 0 && first >= last && *end <= pages);
        let Some(end) = end else {
            let reason = format!("{count} pages from page {first} on, after page {last}, of {pages}");
            return Err(ChainError::Pages { dir: dir.to_owned(), reason }.into());
        };
        set.insert(first..end);
        last = end;
    }
    Ok(set)
}
