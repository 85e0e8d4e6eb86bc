//! Snapshots of changes: each holds the pages that differ from its base, another snapshot.
//!
//! A snapshot's id is the SHA-256 of its `state` file, which has the checksum of its memory and, in a chain, the id of its
//! base. So an id stands for everything that a restore reads: a base that was exchanged, changed or saved again does not
//! pass, and no chain can lead back to where it began.

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

/// The most snapshots that a chain may have. Each costs a restore the reading of one more `state`.
pub const MAX_LAYERS: usize = 64;

/// The section that only a snapshot of changes has, and its version.
pub(super) const BASE: &str = "base";
pub(super) const BASE_VERSION: u32 = 1;
/// The section that every snapshot has, and its version.
pub(super) const MEMORY: &str = "memory";
/// 2: a checksum for each block.
pub(super) const MEMORY_VERSION: u32 = 2;

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

    /// Maps guest RAM as the whole snapshot's file alone: [`Self::complete`] brings it up to date.
    pub(super) fn map(&self) -> Result<GuestRam, MemoryError> {
        let Layer { file, path, layout, .. } = &self.whole;
        memory::map(file, path, layout)
    }

    /// Checks `ram`, which was just mapped, and puts the newest of each changed page in place: from its beginning until `most`
    /// bytes were read, and then to the end of a block. The number of the first block that is still to be done; none if
    /// there is none.
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

    /// Reads all memory files and checks them.
    pub(super) fn verify(&self) -> Result<(), MemoryError> {
        self.layers().try_for_each(|layer| memory::verify(&layer.file, &layer.path, &layer.layout))
    }

    /// Whether each block of all memory files can be checked for itself.
    pub(super) fn has_blocks(&self) -> bool {
        self.layers().all(|layer| layer.layout.has_blocks())
    }

    /// Where guest RAM is in memory files.
    pub(super) fn layout(&self) -> &MemoryLayout {
        &self.whole.layout
    }

    /// The end of the blocks from `first` on in which RAM is not known to be zero.
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

    /// How many blocks from `first` on, up to `end`, are known to be zero in RAM.
    pub(super) fn zero_blocks(&self, first: u64, end: u64) -> u64 {
        let Layer { file, layout, .. } = &self.whole;
        let listed = &layout.blocks.sums;
        let listed = listed.get(listed.partition_point(|(block, _)| *block < first)..);
        let listed = listed.and_then(|blocks| blocks.first()).map_or(end, |(block, _)| *block);
        let end = end.min(listed).min(self.next_changed(first).unwrap_or(end)).max(first);
        let bytes = first.saturating_mul(layout.blocks.bytes)..end.saturating_mul(layout.blocks.bytes);
        // Where somebody wrote into it, each block is looked at.
        if end > first && memory::is_hole(file, bytes) { end.saturating_sub(first) } else { 0 }
    }

    /// Reads and checks block number `block` of the whole snapshot.
    pub(super) fn check_whole(&self, block: u64, buffer: &mut Vec<u8>) -> Result<(), MemoryError> {
        let Layer { file, path, layout, .. } = &self.whole;
        let (first, count) = (self.first_page(block), self.pages_in_block());
        let end = first.saturating_add(count).min(memory::pages(layout)?);
        memory::read_block(file, path, layout, block, std::slice::from_ref(&(first..end)), buffer)
    }

    /// Reads and checks what RAM has in block number `block` in place of the whole snapshot's: offset in the file, and content,
    /// of each page.
    pub(super) fn changes(&self, block: u64, buffer: &mut Vec<u8>) -> Result<BTreeMap<u64, Vec<u8>>, MemoryError> {
        let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let (first, count) = (self.first_page(block), self.pages_in_block());
        for (layer, _) in &self.upper {
            let own = layer.own.as_ref().map(|own| own.runs_in(first..first.saturating_add(count))).unwrap_or_default();
            let offset = |page: usize| u64::try_from(page.saturating_mul(PAGE_BYTES)).unwrap_or(u64::MAX);
            // What newer ones have all of is of no use.
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

    /// The first block from `block` on that has other pages than the whole snapshot's.
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

    /// Whether all memory files still have their sizes.
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
