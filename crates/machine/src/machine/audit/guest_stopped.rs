//! Whether the guest clears PVCLOCK_GUEST_STOPPED, by what is in its kvmclock pages.
//!
//! A guest that finds the flag clears it: that is how it says that it has seen the gap. So the VMM can tell, of any
//! guest, whether the flag is of any use: at the next resume, and at the end, it is still set or it is not.

use guest_abi::pvclock::{FLAG_GUEST_STOPPED, TIME_INFO_BYTES, TimeInfo};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::mem::ram::GuestRam;

/// The flag in the pages of all vCPUs, since this process began.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestStoppedAudit {
    /// By vCPU number.
    cpus: Vec<Cpu>,
}

/// One vCPU's page.
#[derive(Clone, Copy, Debug, Default)]
struct Cpu {
    set: u64,
    cleared: u64,
    /// Guest physical address of the page in which the flag was last set, until it is found cleared.
    waiting: Option<u64>,
}

/// How often PVCLOCK_GUEST_STOPPED was set and found cleared, in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GuestStopped {
    /// Resumes at which it was set, counted for each vCPU with a kvmclock page.
    pub set: u64,
    /// How often it was found cleared afterwards: at the next resume or at the end. Several resumes before the guest
    /// looks at its page are cleared once.
    pub cleared: u64,
    /// vCPUs on which it was set and never found cleared.
    pub never_cleared: u64,
    /// The most resumes at which it was set on one of those.
    pub in_resumes: u64,
}

impl GuestStoppedAudit {
    /// Call it before a resume sets the flag, with the address of each vCPU's page. Returns, for each vCPU, how often
    /// the flag was set so far, if it was never cleared and still is set.
    pub(crate) fn before_resume(&mut self, memory: &GuestRam, pages: &[Option<u64>]) -> Vec<Option<u64>> {
        self.cpus.resize(pages.len(), Cpu::default());
        let look = |(cpu, page): (&mut Cpu, &Option<u64>)| {
            // A page at another address is one that the guest registered since, which says nothing about the old one.
            if cpu.waiting.is_some() && cpu.waiting != *page {
                cpu.waiting = None;
            }
            *cpu = cpu.looked_at(memory);
            (cpu.waiting.is_some() && cpu.cleared == 0).then_some(cpu.set)
        };
        self.cpus.iter_mut().zip(pages).map(look).collect()
    }

    /// Call it after the flag was set. `by_kvm`: KVM sets it, when the vCPU next runs.
    pub(crate) fn after_resume(&mut self, memory: &GuestRam, pages: &[Option<u64>], by_kvm: bool) {
        for (cpu, page) in self.cpus.iter_mut().zip(pages) {
            if let Some(page) = page.filter(|page| by_kvm || is_set(memory, *page)) {
                cpu.set = cpu.set.saturating_add(1);
                cpu.waiting = Some(page);
            }
        }
    }

    /// What is known now.
    pub(crate) fn sum_up(&self, memory: &GuestRam) -> GuestStopped {
        self.cpus.iter().map(|cpu| cpu.looked_at(memory)).fold(GuestStopped::default(), |sum, cpu| {
            let never = cpu.set != 0 && cpu.cleared == 0 && cpu.waiting.is_some();
            GuestStopped {
                set: sum.set.saturating_add(cpu.set),
                cleared: sum.cleared.saturating_add(cpu.cleared),
                never_cleared: sum.never_cleared.saturating_add(u64::from(never)),
                in_resumes: sum.in_resumes.max(if never { cpu.set } else { 0 }),
            }
        })
    }
}

impl Cpu {
    fn looked_at(self, memory: &GuestRam) -> Self {
        match self.waiting {
            Some(page) if !is_set(memory, page) => {
                Self { cleared: self.cleared.saturating_add(1), waiting: None, ..self }
            }
            _ => self,
        }
    }
}

/// Whether the flag is set in the kvmclock page at `page`.
fn is_set(memory: &GuestRam, page: u64) -> bool {
    let mut bytes = [0; TIME_INFO_BYTES];
    let read = memory.read_slice(&mut bytes, GuestAddress(page));
    read.is_ok() && TimeInfo::from_bytes(&bytes).flags & FLAG_GUEST_STOPPED != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: [Option<u64>; 2] = [Some(0x1000), None];

    /// RAM with a page at 0x1000 and one at 0x2000, the flag in both as given.
    fn memory(set: [bool; 2]) -> GuestRam {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap();
        for (page, set) in [0x1000, 0x2000].into_iter().zip(set) {
            let flags = if set { FLAG_GUEST_STOPPED } else { 0 };
            let bytes = TimeInfo { flags, ..TimeInfo::default() }.to_bytes();
            memory.write_slice(&bytes, GuestAddress(page)).unwrap();
        }
        memory
    }

    // Catches: a flag that stays set and is taken for one that was cleared and set again; resumes that are not counted.
    #[test]
    fn a_guest_that_never_clears_it_is_found_at_each_resume() {
        let (mut audit, set) = (GuestStoppedAudit::default(), memory([true, false]));
        for resumes in 0..3 {
            let kept = audit.before_resume(&set, &PAGES);
            assert_eq!(kept, [(resumes != 0).then_some(resumes), None]);
            audit.after_resume(&set, &PAGES, false);
        }
        assert_eq!(audit.sum_up(&set), GuestStopped { set: 3, cleared: 0, never_cleared: 1, in_resumes: 3 });
        // It may do so yet.
        let cleared = memory([false, false]);
        assert_eq!(audit.sum_up(&cleared), GuestStopped { set: 3, cleared: 1, never_cleared: 0, in_resumes: 0 });
    }

    // Catches: a guest that was found to clear it, and is blamed for the last resume, which it had no time to see.
    #[test]
    fn a_guest_that_has_cleared_it_once_is_none_that_never_does() {
        let (mut audit, clear, set) = (GuestStoppedAudit::default(), memory([false, false]), memory([true, false]));
        audit.before_resume(&clear, &PAGES);
        audit.after_resume(&set, &PAGES, false);
        assert_eq!(audit.before_resume(&clear, &PAGES), [None, None]);
        audit.after_resume(&set, &PAGES, false);
        assert_eq!(audit.before_resume(&set, &PAGES), [None, None]);
        assert_eq!(audit.sum_up(&set), GuestStopped { set: 2, cleared: 1, never_cleared: 0, in_resumes: 0 });
    }

    // Catches: a resume that did not set it (an injected fault) and counts, and one of KVM, which sets it later.
    #[test]
    fn only_a_flag_that_was_set_is_waited_for() {
        let (mut audit, clear) = (GuestStoppedAudit::default(), memory([false, false]));
        audit.before_resume(&clear, &PAGES);
        audit.after_resume(&clear, &PAGES, false);
        assert_eq!(audit.sum_up(&clear), GuestStopped::default());
        audit.after_resume(&clear, &PAGES, true);
        assert_eq!(audit.sum_up(&memory([true, false])).in_resumes, 1);
    }

    // Catches: bytes that lie where a page once was, taken for a flag that the guest ignores or has cleared.
    #[test]
    fn a_page_registered_anew_says_nothing_about_the_old_one() {
        let (mut audit, set) = (GuestStoppedAudit::default(), memory([true, true]));
        audit.before_resume(&set, &PAGES);
        audit.after_resume(&set, &PAGES, false);
        assert_eq!(audit.before_resume(&set, &[Some(0x2000), None]), [None, None]);
        assert_eq!(audit.sum_up(&set), GuestStopped { set: 1, cleared: 0, never_cleared: 0, in_resumes: 0 });
    }
}
