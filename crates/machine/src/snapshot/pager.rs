//! The pager: checks the guest RAM of a restored VM block by block, each before its first use.
//!
//! Reading all of it takes long, a guest needs little of it at first, and damage is rare. So the guest starts at once.
//! An access to a block that is not mapped yet waits ([`Withheld`]) while the pager's thread reads that block, checks
//! it and maps it. When no access waits, the thread does the same with the other blocks. A block that is damaged or
//! cannot be read is never mapped: the VM ends, and the guest has not used the damaged bytes.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::{SigSet, SigmaskHow, Signal},
    },
};

use super::{MemoryLayout, RegionLayout, SnapshotError, chain::Chain};
use crate::{
    host::{Piece, Withheld},
    mem::ram::GuestRam,
};

/// How long the thread maps only the blocks that accesses wait for, after the start. In this time the guest should have
/// the CPU, because users notice how long a restored guest takes to its first output.
const START_MS: u16 = 20;
/// How much the thread then reads at once, and how long it pauses before it reads more, so that it uses only a part of
/// one CPU.
const STRETCH_BYTES: u64 = 1 << 20;
const PAUSE_MS: u16 = 1;
/// How long the VM has to end in good order after [`Pager::on_damage`]'s callback was called. It may never do so,
/// because a vCPU thread may wait for the damaged block.
const REACTION_LIMIT: Duration = Duration::from_millis(500);

/// Prints why the VM cannot go on, and ends the process.
pub type ExitOnDamage = Box<dyn FnOnce(&SnapshotError) + Send>;

/// The handle to the pager's thread. It must be dropped after the VM: the thread then ends, and blocks that are not
/// mapped yet stay without content.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    /// Notified when `progress` changes.
    changed: Condvar,
    /// Written after `urgent` or `stop` was set, so that the thread's poll ends.
    doorbell: EventFd,
    /// Shared, and not only the thread's, so that it outlives the thread: while its descriptor is open, an access to a
    /// block that was not mapped waits. If it were closed, the access would read zeros.
    withheld: Withheld,
}

#[derive(Default)]
struct Progress {
    /// A caller of [`Pager::finish`] waits for all blocks.
    urgent: bool,
    stop: bool,
    complete: bool,
    damage: Option<SnapshotError>,
    /// [`Pager::check`] or [`Pager::finish`] has returned the damage.
    reported: bool,
    on_damage: Option<Box<dyn FnOnce() + Send>>,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress")
            .field("complete", &self.complete)
            .field("damage", &self.damage)
            .finish_non_exhaustive()
    }
}

impl Pager {
    /// Withholds the blocks of `memory` from number `first` on, and maps them one by one. `memory` is mapped from
    /// `chain`. If a block is damaged and neither [`Self::check`] nor [`Self::finish`] returns that in time, `exit` is
    /// called.
    ///
    /// # Errors
    /// The host cannot do it; `memory` is then unusable.
    pub(super) fn start(
        chain: &Arc<Chain>,
        memory: &Arc<GuestRam>,
        first: u64,
        exit: ExitOnDamage,
    ) -> Result<Self, SnapshotError> {
        let end = chain.end_of_data(first)?;
        let doorbell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let doorbell = doorbell.map_err(|errno| SnapshotError::Paging(errno.into()))?;
        let pieces = pieces(chain.layout(), first, end.saturating_sub(first));
        let withheld = Withheld::new(memory, &pieces).map_err(SnapshotError::Paging)?;
        let (progress, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { progress, changed, doorbell, withheld });
        let count = usize::try_from(end.saturating_sub(first)).unwrap_or(0);
        let blocks = Blocks {
            chain: Arc::clone(chain),
            shared: Arc::clone(&shared),
            first,
            mapped: vec![false; count],
            next: 0,
            buffer: Vec::new(),
        };
        // The thread inherits a mask that blocks all signals, which are for other threads. SIGBUS is not blocked: it
        // reports an access of the thread itself.
        let mut others = SigSet::all();
        others.remove(Signal::SIGBUS);
        let before = others.thread_swap_mask(SigmaskHow::SIG_SETMASK);
        let thread = thread::Builder::new().name("pager".to_owned()).spawn(move || blocks.serve(exit));
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
        Ok(Self { shared, thread: Some(thread.map_err(SnapshotError::Paging)?) })
    }

    /// Calls `callback` when damage is found, or at once if it was found already. The VM's owner must then call
    /// [`Self::check`] and end the VM.
    pub fn on_damage(&self, callback: impl FnOnce() + Send + 'static) {
        let mut progress = self.shared.lock();
        if progress.damage.is_some() {
            drop(progress);
            callback();
        } else {
            progress.on_damage = Some(Box::new(callback));
        }
    }

    /// Whether damage was found.
    ///
    /// # Errors
    /// The damage, once; the VM must end with it.
    pub fn check(&self) -> Result<(), SnapshotError> {
        self.shared.take_damage(self.shared.lock())
    }

    /// Waits until all blocks are mapped.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn finish(&self) -> Result<(), SnapshotError> {
        let mut progress = self.shared.lock();
        progress.urgent = true;
        self.shared.ring();
        while !progress.complete && progress.damage.is_none() && !progress.reported {
            progress = self.shared.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
        self.shared.take_damage(progress)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // It cannot fail: the counter is far from its limit.
        let _ = self.doorbell.write(1);
    }

    fn take_damage(&self, mut progress: MutexGuard<'_, Progress>) -> Result<(), SnapshotError> {
        let Some(damage) = progress.damage.take() else { return Ok(()) };
        progress.reported = true;
        self.changed.notify_all();
        Err(damage)
    }
}

/// The state of the thread.
struct Blocks {
    chain: Arc<Chain>,
    shared: Arc<Shared>,
    /// The number of the first block that was withheld.
    first: u64,
    /// Which of the withheld blocks are mapped.
    mapped: Vec<bool>,
    /// All blocks before this one are mapped.
    next: usize,
    buffer: Vec<u8>,
}

impl Blocks {
    /// Maps all blocks. If one is damaged, calls the callback, gives the VM [`REACTION_LIMIT`] to take the damage and
    /// end, and else calls `exit`.
    fn serve(mut self, exit: ExitOnDamage) {
        let served = self.map_all();
        let mut progress = self.shared.lock();
        let Err(error) = served else {
            progress.complete = true;
            self.shared.changed.notify_all();
            return;
        };
        progress.damage = Some(error);
        let callback = progress.on_damage.take();
        // Without a callback no part of the VM is there yet that could take the damage.
        let limit = if callback.is_some() { REACTION_LIMIT } else { Duration::ZERO };
        self.shared.changed.notify_all();
        // The callback runs without the lock, because it may call `check`, which takes the lock.
        drop(progress);
        if let Some(callback) = callback {
            callback();
        }
        let waiting = |progress: &mut Progress| !progress.reported && !progress.stop;
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), limit, waiting);
        let (mut progress, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !progress.stop
            && let Some(error) = progress.damage.take()
        {
            exit(&error);
        }
    }

    /// Maps all blocks, or those until `stop` is set. Blocks that an access waits for come first: there is a check for
    /// them before each other block.
    fn map_all(&mut self) -> Result<(), SnapshotError> {
        let mut pause_ms = START_MS;
        loop {
            self.map_awaited()?;
            let (urgent, stop) = {
                let progress = self.shared.lock();
                (progress.urgent, progress.stop)
            };
            if stop {
                return Ok(());
            }
            if pause_ms > 0 && !urgent {
                if !self.wait(pause_ms)? {
                    pause_ms = 0;
                }
                continue;
            }
            let mut read = 0_u64;
            while read < STRETCH_BYTES {
                let Some(bytes) = self.map_next()? else { return Ok(()) };
                read = read.saturating_add(bytes);
                self.map_awaited()?;
            }
            pause_ms = PAUSE_MS;
        }
    }

    /// Waits until an access waits for a block or the doorbell is written, at most `ms`; false after that time.
    fn wait(&self, ms: u16) -> Result<bool, SnapshotError> {
        let (withheld, doorbell) = (self.shared.withheld.as_fd(), &self.shared.doorbell);
        let mut fds = [PollFd::new(withheld, PollFlags::POLLIN), PollFd::new(doorbell.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(ms)).map_err(|errno| SnapshotError::Paging(errno.into()))?;
        let _ = doorbell.read();
        Ok(ready > 0)
    }

    /// Maps the blocks that accesses wait for.
    fn map_awaited(&mut self) -> Result<(), SnapshotError> {
        while let Some((region, inside)) = self.shared.withheld.next_fault().map_err(SnapshotError::Paging)? {
            self.map_block_with(region, inside)?;
        }
        Ok(())
    }

    /// Maps the block that has byte `inside` of `region`.
    fn map_block_with(&mut self, region: usize, inside: usize) -> Result<(), SnapshotError> {
        let layout = self.chain.layout();
        let base = layout.regions.get(region).map_or(0, |region| region.file_offset);
        let at = base.saturating_add(u64::try_from(inside).unwrap_or(u64::MAX));
        let block = at.checked_div(layout.blocks.bytes).unwrap_or(0);
        let index = block.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(false) = index.and_then(|index| self.mapped.get(index).copied()) {
            return self.map_block(block);
        }
        // Mapped already: several threads can fault on one block. This fault was queued before the block was mapped,
        // and its thread still sleeps.
        for piece in pieces(layout, block, 1) {
            self.shared.withheld.wake(&piece).map_err(SnapshotError::Paging)?;
        }
        Ok(())
    }

    /// Maps the first block that is not mapped yet, and with it those that follow if all are zero. Returns how many
    /// bytes were read for it; none if all blocks are mapped.
    fn map_next(&mut self) -> Result<Option<u64>, SnapshotError> {
        let missing = self.mapped.iter().skip(self.next).position(|mapped| !mapped);
        let Some(index) = missing.and_then(|ahead| self.next.checked_add(ahead)) else { return Ok(None) };
        self.next = index;
        let run = self.mapped.iter().skip(index).take_while(|mapped| !**mapped).count();
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let block = self.first.saturating_add(wide(index));
        match self.chain.zero_blocks(block, block.saturating_add(wide(run))) {
            0 => self.map_block(block).map(|()| Some(self.chain.layout().blocks.bytes)),
            zero => self.map_blocks(block, zero, &BTreeMap::new()).map(|()| Some(0)),
        }
    }

    /// Reads and checks a block in all layers of the chain, and maps it.
    fn map_block(&mut self, block: u64) -> Result<(), SnapshotError> {
        self.chain.check_whole(block, &mut self.buffer)?;
        let changes = self.chain.changes(block, &mut self.buffer)?;
        self.map_blocks(block, 1, &changes)
    }

    /// Maps `count` blocks of the whole snapshot, with the pages of `changes` (offset in the file, content) in place of
    /// its own.
    fn map_blocks(&mut self, block: u64, count: u64, changes: &BTreeMap<u64, Vec<u8>>) -> Result<(), SnapshotError> {
        let layout = self.chain.layout();
        for piece in pieces(layout, block, count) {
            let base = layout.regions.get(piece.region).map_or(0, |region| region.file_offset);
            let inside = |at: &u64| usize::try_from(at.checked_sub(base)?).ok().filter(|at| piece.inside.contains(at));
            let own =
                changes.iter().filter_map(|(at, page)| Some((inside(at)?.checked_sub(piece.inside.start)?, page)));
            let own: Vec<(usize, &[u8])> = own.map(|(at, page)| (at, page.as_slice())).collect();
            self.shared.withheld.map_and_wake(&piece, &own).map_err(SnapshotError::Paging)?;
        }
        let start = block.checked_sub(self.first).and_then(|start| usize::try_from(start).ok()).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.mapped.iter_mut().skip(start).take(count).for_each(|mapped| *mapped = true);
        Ok(())
    }
}

impl Drop for Blocks {
    /// Reports a panic of the thread as damage: without the thread, accesses to withheld blocks would never return.
    fn drop(&mut self) {
        if thread::panicking() {
            let mut progress = self.shared.lock();
            progress.damage = Some(SnapshotError::Paging(io::Error::other("the thread that does it panicked")));
            let callback = progress.on_damage.take();
            self.shared.changed.notify_all();
            drop(progress);
            if let Some(callback) = callback {
                callback();
            }
        }
    }
}

/// Where `count` blocks from number `first` on are in guest RAM, in file order.
fn pieces(layout: &MemoryLayout, first: u64, count: u64) -> Vec<Piece> {
    let bytes = |block: u64| block.saturating_mul(layout.blocks.bytes);
    let (start, end) = (bytes(first), bytes(first.saturating_add(count)));
    let piece = |(number, region): (usize, &RegionLayout)| {
        let inside = |at: u64| usize::try_from(at.saturating_sub(region.file_offset).min(region.bytes)).ok();
        let inside = inside(start)?..inside(end)?;
        (!inside.is_empty()).then_some(Piece { region: number, inside })
    };
    layout.regions.iter().enumerate().filter_map(piece).collect()
}
