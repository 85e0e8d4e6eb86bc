//! Snapshots of changes: each holds the pages that differ from its base, another snapshot.
//!
//! A snapshot's id is the SHA-256 of its `state` file. That file has the checksum of the snapshot's memory and, in a
//! chain, the id of its base. So the id covers everything that a restore reads: a base that was replaced, changed or
//! saved again is refused, and a chain cannot contain itself.

mod error;
#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    SnapshotError, StateReader, directory,
    memory::{self, MemoryError, MemoryLayout, PAGE_BYTES},
};
use crate::{
    machine::dirty::SnapshotId,
    mem::{pages::PageSet, ram::GuestRam},
};

pub use error::ChainError;

/// The most snapshots that a chain may have. For each, a restore reads one more `state` file.
pub const MAX_LAYERS: usize = 64;

/// The section that only a snapshot of changes has, and its version.
pub(super) const BASE: &str = "base";
pub(super) const BASE_VERSION: u32 = 1;
/// The section that every snapshot has, and its version.
pub(super) const MEMORY: &str = "memory";
/// 2: a checksum for each block.
pub(super) const MEMORY_VERSION: u32 = 2;

/// The section of a snapshot of changes that describes its base and its own pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseState {
    /// The base's directory; a relative path is relative to the snapshot's directory.
    pub dir: PathBuf,
    /// The base's id.
    #[serde(with = "hex")]
    pub id: SnapshotId,
    /// How many snapshots the chain has, from this one down to the whole one.
    pub layers: usize,
    /// The pages that this snapshot's memory file holds, including pages that became zero: first page and number of
    /// pages of each run, in rising order.
    pub pages: Vec<(usize, usize)>,
}

/// The id of the snapshot with this `state` file.
pub(super) fn id_of(state: &[u8]) -> SnapshotId {
    Sha256::digest(state).into()
}

/// Describes `base` as the base of the new snapshot `dir`, after checking that `base` is the snapshot `latest`.
///
/// # Errors
/// It is another snapshot, its chain is full, or its path cannot be stored.
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
    // In the same parent directory the path is relative, so that both can be moved together.
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

/// A snapshot and those that it is based on, down to a whole one.
#[derive(Debug)]
pub(super) struct Chain {
    /// The `state` file of the newest.
    state: Vec<u8>,
    /// The snapshots of changes, the newest first, each with the id of its base.
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
    /// Opens the memory files of the snapshot `dir` and of all snapshots that it is based on, without reading them.
    /// `state` is the `state` file of `dir`, and `reader` has its sections.
    ///
    /// Each base is compared with the id that the snapshot above has for it before anything in it is used. The number
    /// of snapshots is bounded during the walk; the numbers that the snapshots store are checked after it, when the
    /// true number is known.
    pub(super) fn open(dir: &Path, state: Vec<u8>, reader: &mut StateReader) -> Result<Self, SnapshotError> {
        let mut upper = Vec::new();
        let mut counts = Vec::new();
        let (mut layer, mut base) = open_layer(dir, reader)?;
        while let Some(BaseState { dir: there, id, layers, .. }) = base {
            counts.push(layers);
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
            if below.layout.regions != layer.layout.regions || below.layout.blocks.bytes != layer.layout.blocks.bytes {
                let reason = "it has other regions or blocks than its base".to_owned();
                return Err(MemoryError::Layout { reason }.into());
            }
            upper.push((std::mem::replace(&mut layer, below), id));
            base = next;
        }
        for (found, (layers, (layer, _))) in (2..).zip(counts.into_iter().zip(&upper).rev()) {
            if layers != found {
                return Err(ChainError::Layers { dir: layer.dir.clone(), layers, found }.into());
            }
        }
        Ok(Self { state, upper, whole: layer })
    }

    /// Maps guest RAM from the whole snapshot's file. [`Self::complete`] then adds the newer pages.
    pub(super) fn map(&self) -> Result<GuestRam, MemoryError> {
        let Layer { file, path, layout, .. } = &self.whole;
        memory::map(file, path, layout)
    }

    /// Checks `ram`, which was just mapped, and writes the newest version of each changed page into it. It begins at
    /// the start of RAM, and ends at the end of the block in which `most` bytes were read. Returns the number of the
    /// first block that is still to be done, or none.
    pub(super) fn complete(&self, ram: &GuestRam, most: u64) -> Result<Option<u64>, MemoryError> {
        let Layer { file, path, layout, .. } = &self.whole;
        let rest = memory::check_mapped(ram, file, path, layout, most)?;
        let mut buffer = Vec::new();
        let mut next = 0;
        while let Some(block) = self.next_changed(next).filter(|block| rest.is_none_or(|rest| *block < rest)) {
            for (at, page) in self.changes(block, &mut buffer)? {
                memory::write_page(ram, layout, at, &page)?;
            }
            next = block.saturating_add(1);
        }
        Ok(rest)
    }

    /// Reads and checks all memory files.
    pub(super) fn verify(&self) -> Result<(), MemoryError> {
        self.layers().try_for_each(|layer| memory::verify(&layer.file, &layer.path, &layer.layout))
    }

    /// Whether all memory files have checksums by block, so that each block can be checked separately.
    pub(super) fn has_blocks(&self) -> bool {
        self.layers().all(|layer| layer.layout.has_blocks())
    }

    /// The layout of the memory files, which is the same for all.
    pub(super) fn layout(&self) -> &MemoryLayout {
        &self.whole.layout
    }

    /// The number of the block from which on RAM is known to be zero; at least `first`.
    pub(super) fn end_of_data(&self, first: u64) -> Result<u64, MemoryError> {
        let layout = self.layout();
        let (total, size) = (layout.file_bytes()?, layout.blocks.bytes);
        let changed = self.upper.iter().filter_map(|(layer, _)| layer.own.as_ref()?.runs().last());
        let changed = changed.map(|run| self.block_of(run.end.saturating_sub(1)).saturating_add(1)).max().unwrap_or(0);
        let listed = layout.blocks.sums.last().map_or(0, |(last, _)| last.saturating_add(1));
        let end = listed.max(changed).max(first);
        let zero = memory::is_hole(&self.whole.file, end.saturating_mul(size)..total);
        Ok(if zero { end } else { total.div_ceil(size) })
    }

    /// How many blocks from `first` on, and before `end`, are known to be zero in RAM.
    pub(super) fn zero_blocks(&self, first: u64, end: u64) -> u64 {
        let Layer { file, layout, .. } = &self.whole;
        let listed = &layout.blocks.sums;
        let listed = listed.get(listed.partition_point(|(block, _)| *block < first)..);
        let listed = listed.and_then(|blocks| blocks.first()).map_or(end, |(block, _)| *block);
        let end = end.min(listed).min(self.next_changed(first).unwrap_or(end)).max(first);
        let bytes = first.saturating_mul(layout.blocks.bytes)..end.saturating_mul(layout.blocks.bytes);
        // If the file has data there all the same, it was changed: 0 makes the caller read and check each block.
        if end > first && memory::is_hole(file, bytes) { end.saturating_sub(first) } else { 0 }
    }

    /// Reads and checks block number `block` of the whole snapshot.
    pub(super) fn check_whole(&self, block: u64, buffer: &mut Vec<u8>) -> Result<(), MemoryError> {
        let Layer { file, path, layout, .. } = &self.whole;
        let (first, count) = (self.first_page(block), self.pages_in_block());
        let end = first.saturating_add(count).min(memory::pages(layout)?);
        memory::read_block(file, path, layout, block, std::slice::from_ref(&(first..end)), buffer)
    }

    /// Reads and checks the pages of block number `block` that replace the whole snapshot's: offset in the file, and
    /// content. Of several versions of a page it returns the newest.
    pub(super) fn changes(&self, block: u64, buffer: &mut Vec<u8>) -> Result<BTreeMap<u64, Vec<u8>>, MemoryError> {
        let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let (first, count) = (self.first_page(block), self.pages_in_block());
        for (layer, _) in &self.upper {
            let own = layer.own.as_ref().map(|own| own.runs_in(first..first.saturating_add(count))).unwrap_or_default();
            let offset = |page: usize| u64::try_from(page.saturating_mul(PAGE_BYTES)).unwrap_or(u64::MAX);
            // Skip a layer of which newer ones replace all pages in this block.
            if own.iter().cloned().flatten().all(|page| pages.contains_key(&offset(page))) {
                continue;
            }
            memory::read_block(&layer.file, &layer.path, &layer.layout, block, &own, buffer)?;
            for (page, content) in own.into_iter().flatten().zip(buffer.chunks(PAGE_BYTES)) {
                pages.entry(offset(page)).or_insert_with(|| content.to_vec());
            }
        }
        Ok(pages)
    }

    /// The first block from `block` on in which a newer layer has pages.
    fn next_changed(&self, block: u64) -> Option<u64> {
        let from = self.first_page(block);
        let next = self.upper.iter().filter_map(|(layer, _)| layer.own.as_ref()?.first_from(from)).min()?;
        Some(self.block_of(next))
    }

    fn pages_in_block(&self) -> usize {
        usize::try_from(self.layout().blocks.bytes).unwrap_or(usize::MAX) / PAGE_BYTES
    }

    fn first_page(&self, block: u64) -> usize {
        usize::try_from(block).unwrap_or(usize::MAX).saturating_mul(self.pages_in_block())
    }

    fn block_of(&self, page: usize) -> u64 {
        u64::try_from(page / self.pages_in_block().max(1)).unwrap_or(u64::MAX)
    }

    /// Checks that all memory files still have their sizes.
    pub(super) fn check_sizes(&self) -> Result<(), MemoryError> {
        self.layers().try_for_each(|layer| memory::check_size(&layer.file, &layer.path, &layer.layout))
    }

    /// The memory file that RAM is mapped from.
    pub(super) fn mapped_path(&self) -> &Path {
        &self.whole.path
    }

    /// The `state` file of the newest.
    pub(super) fn state(&self) -> &[u8] {
        &self.state
    }

    /// The id of the newest.
    pub(super) fn id(&self) -> SnapshotId {
        id_of(&self.state)
    }

    /// The snapshots of the chain, the newest first.
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

/// The directory of `base`, as stored in the snapshot `dir`. A relative path begins at the real path of `dir`, with
/// symbolic links resolved.
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

/// The set of the pages in `runs`, which must be in order and within `pages`.
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
