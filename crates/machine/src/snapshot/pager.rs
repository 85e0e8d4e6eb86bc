//! Guest RAM of a restored VM that is checked block by block, each before its first use.
//!
//! Reading all of it takes long, a guest needs little of it at first, and damage is rare. So the guest starts at once; what it
//! touches and does not have yet, it waits for ([`Withheld`]), while a thread reads that block, checks it and maps it. When
//! nobody waits, the thread goes through the others. A block that is damaged or cannot be read is given to nobody: the VM
//! ends, and nothing was computed from it.

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

/// How long the thread leaves the other blocks alone at first. The first exits of a restored guest are what people wait for.
const GRACE_MS: u16 = 20;
/// How much it then reads at once, and how long it rests before it goes on, so that it takes part of one CPU only.
const STRETCH_BYTES: u64 = 1 << 20;
const REST_MS: u16 = 1;
/// How long somebody who is told of damage may take to hear it. A vCPU that waits for the damaged block may never.
const PATIENCE: Duration = Duration::from_millis(500);

/// Says why the VM cannot go on, and ends the process.
pub type LastWord = Box<dyn FnOnce(&SnapshotError) + Send>;

/// The thread, from the side of those who run the VM. When it is dropped, RAM that was not given yet is lost: the VM must be
/// gone.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    /// Changes with `progress`.
    changed: Condvar,
    /// Written when somebody wants something of the thread.
    doorbell: EventFd,
    /// Here, and not with the thread: while it is open, nobody gets a block that was not given.
    withheld: Withheld,
}

#[derive(Default)]
struct Progress {
    /// Somebody waits for all of it.
    urgent: bool,
    stop: bool,
    complete: bool,
    damage: Option<SnapshotError>,
    /// Somebody knows of the damage.
    heard: bool,
    alarm: Option<Box<dyn FnOnce() + Send>>,
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
    /// Withholds what `chain` has from block number `first` on, of `memory`, which is mapped from it, and gives it block by block.
    /// If there is damage that nobody hears of in time, `last_word` is called.
    ///
    /// # Errors
    /// The host cannot do it; `memory` is then of no use.
    pub(super) fn start(
        chain: &Arc<Chain>,
        memory: &Arc<GuestRam>,
        first: u64,
        last_word: LastWord,
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
            given: vec![false; count],
            next: 0,
            buffer: Vec::new(),
        };
        // Signals are for others, but for one that tells of an access of its own.
        let mut others = SigSet::all();
        others.remove(Signal::SIGBUS);
        let before = others.thread_swap_mask(SigmaskHow::SIG_SETMASK);
        let thread = thread::Builder::new().name("pager".to_owned()).spawn(move || blocks.serve(last_word));
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
        Ok(Self { shared, thread: Some(thread.map_err(SnapshotError::Paging)?) })
    }

    /// Calls `alarm` when there is damage, or now if there is. Whoever hears it is to call [`Self::check`].
    pub fn on_damage(&self, alarm: impl FnOnce() + Send + 'static) {
        let mut progress = self.shared.lock();
        if progress.damage.is_some() {
            drop(progress);
            alarm();
        } else {
            progress.alarm = Some(Box::new(alarm));
        }
    }

    /// Whether damage was found.
    ///
    /// # Errors
    /// The damage, once; the VM must end with it.
    pub fn check(&self) -> Result<(), SnapshotError> {
        self.shared.hear(self.shared.lock())
    }

    /// Waits until all of RAM is there.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn finish(&self) -> Result<(), SnapshotError> {
        let mut progress = self.shared.lock();
        progress.urgent = true;
        self.shared.ring();
        while !progress.complete && progress.damage.is_none() && !progress.heard {
            progress = self.shared.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
        self.shared.hear(progress)
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

    fn hear(&self, mut progress: MutexGuard<'_, Progress>) -> Result<(), SnapshotError> {
        let Some(damage) = progress.damage.take() else { return Ok(()) };
        progress.heard = true;
        self.changed.notify_all();
        Err(damage)
    }
}

/// The thread's own.
struct Blocks {
    chain: Arc<Chain>,
    shared: Arc<Shared>,
    /// The number of the first block that was withheld.
    first: u64,
    /// Which of those were given.
    given: Vec<bool>,
    /// All before this one were.
    next: usize,
    buffer: Vec<u8>,
}

impl Blocks {
    fn serve(mut self, last_word: LastWord) {
        let served = self.give_all();
        let mut progress = self.shared.lock();
        let Err(error) = served else {
            progress.complete = true;
            self.shared.changed.notify_all();
            return;
        };
        progress.damage = Some(error);
        let alarm = progress.alarm.take();
        let patience = if alarm.is_some() { PATIENCE } else { Duration::ZERO };
        self.shared.changed.notify_all();
        drop(progress);
        if let Some(alarm) = alarm {
            alarm();
        }
        let waiting = |progress: &mut Progress| !progress.heard && !progress.stop;
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), patience, waiting);
        let (mut progress, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !progress.stop
            && let Some(error) = progress.damage.take()
        {
            last_word(&error);
        }
    }

    /// Gives blocks that somebody waits for, and the others in between, until none is left or somebody stops it.
    fn give_all(&mut self) -> Result<(), SnapshotError> {
        let mut rest_ms = GRACE_MS;
        loop {
            self.give_all_wanted()?;
            let (urgent, stop) = {
                let progress = self.shared.lock();
                (progress.urgent, progress.stop)
            };
            if stop {
                return Ok(());
            }
            if rest_ms > 0 && !urgent {
                if !self.wait(rest_ms)? {
                    rest_ms = 0;
                }
                continue;
            }
            let mut read = 0_u64;
            while read < STRETCH_BYTES {
                let Some(bytes) = self.give_next()? else { return Ok(()) };
                read = read.saturating_add(bytes);
                self.give_all_wanted()?;
            }
            rest_ms = REST_MS;
        }
    }

    /// Waits until somebody wants something; false if nobody did for so long.
    fn wait(&self, ms: u16) -> Result<bool, SnapshotError> {
        let (withheld, doorbell) = (self.shared.withheld.as_fd(), &self.shared.doorbell);
        let mut fds = [PollFd::new(withheld, PollFlags::POLLIN), PollFd::new(doorbell.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(ms)).map_err(|errno| SnapshotError::Paging(errno.into()))?;
        let _ = doorbell.read();
        Ok(ready > 0)
    }

    fn give_all_wanted(&mut self) -> Result<(), SnapshotError> {
        while let Some((region, inside)) = self.shared.withheld.wanted().map_err(SnapshotError::Paging)? {
            self.give_wanted(region, inside)?;
        }
        Ok(())
    }

    fn give_wanted(&mut self, region: usize, inside: usize) -> Result<(), SnapshotError> {
        let layout = self.chain.layout();
        let base = layout.regions.get(region).map_or(0, |region| region.file_offset);
        let at = base.saturating_add(u64::try_from(inside).unwrap_or(u64::MAX));
        let block = at.checked_div(layout.blocks.bytes).unwrap_or(0);
        let index = block.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(false) = index.and_then(|index| self.given.get(index).copied()) {
            return self.give(block);
        }
        // Somebody else wanted it, too, and was faster.
        for piece in pieces(layout, block, 1) {
            self.shared.withheld.wake(&piece).map_err(SnapshotError::Paging)?;
        }
        Ok(())
    }

    /// Gives the first block that was not given yet, or as many as are zero; how many bytes were read for it. None if there is
    /// no such block.
    fn give_next(&mut self) -> Result<Option<u64>, SnapshotError> {
        let missing = self.given.iter().skip(self.next).position(|given| !given);
        let Some(index) = missing.and_then(|ahead| self.next.checked_add(ahead)) else { return Ok(None) };
        self.next = index;
        let run = self.given.iter().skip(index).take_while(|given| !**given).count();
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let block = self.first.saturating_add(wide(index));
        match self.chain.zero_blocks(block, block.saturating_add(wide(run))) {
            0 => self.give(block).map(|()| Some(self.chain.layout().blocks.bytes)),
            zero => self.give_pieces(block, zero, &BTreeMap::new()).map(|()| Some(0)),
        }
    }

    fn give(&mut self, block: u64) -> Result<(), SnapshotError> {
        self.chain.check_whole(block, &mut self.buffer)?;
        let changes = self.chain.changes(block, &mut self.buffer)?;
        self.give_pieces(block, 1, &changes)
    }

    /// Gives `count` blocks, with `changes` (offset in the file, content) in place of the whole snapshot's.
    fn give_pieces(&mut self, block: u64, count: u64, changes: &BTreeMap<u64, Vec<u8>>) -> Result<(), SnapshotError> {
        let layout = self.chain.layout();
        for piece in pieces(layout, block, count) {
            let base = layout.regions.get(piece.region).map_or(0, |region| region.file_offset);
            let inside = |at: &u64| usize::try_from(at.checked_sub(base)?).ok().filter(|at| piece.inside.contains(at));
            let own =
                changes.iter().filter_map(|(at, page)| Some((inside(at)?.checked_sub(piece.inside.start)?, page)));
            let own: Vec<(usize, &[u8])> = own.map(|(at, page)| (at, page.as_slice())).collect();
            self.shared.withheld.give(&piece, &own).map_err(SnapshotError::Paging)?;
        }
        let start = block.checked_sub(self.first).and_then(|start| usize::try_from(start).ok()).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.given.iter_mut().skip(start).take(count).for_each(|given| *given = true);
        Ok(())
    }
}

impl Drop for Blocks {
    /// After a panic nobody gets any memory any more: those who wait must hear of it.
    fn drop(&mut self) {
        if thread::panicking() {
            let mut progress = self.shared.lock();
            progress.damage = Some(SnapshotError::Paging(io::Error::other("the thread that does it panicked")));
            let alarm = progress.alarm.take();
            self.shared.changed.notify_all();
            drop(progress);
            if let Some(alarm) = alarm {
                alarm();
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
