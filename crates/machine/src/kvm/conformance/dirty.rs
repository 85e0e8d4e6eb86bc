//! The log of pages that the guest wrote.

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms},
    rig::{FREE_PAGES, PORT, RAM_BYTES, Rig, guest_code},
};
use crate::kvm::Error;

/// The kernel's functions for all of them.
const LOG: &str = "kvm_get_dirty_log_protect, mark_page_dirty_in_slot (virt/kvm/kvm_main.c)";

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "dirty-log",
        rule: "the pages that were written since the last call (api.rst, KVM_GET_DIRTY_LOG)",
        kernel: LOG,
        run: |cx| log(cx, 0),
    },
    Check {
        id: "dirty-log-cleared",
        rule: "a page stands in one log only, unless it is written again (api.rst, KVM_GET_DIRTY_LOG)",
        kernel: LOG,
        run: |cx| log(cx, 1),
    },
    Check {
        id: "dirty-log-again",
        rule: "a page that is written again stands in the next log (api.rst, KVM_GET_DIRTY_LOG)",
        kernel: LOG,
        run: |cx| log(cx, 2),
    },
    Check {
        id: "dirty-log-vmm",
        rule: "none: whether what the VMM writes to guest RAM is logged",
        kernel: "not logged: the log is of writes through KVM's page tables and kvm_write_guest (virt/kvm/kvm_main.c)",
        run: vmm,
    },
];

/// Writes the third and the fifth free page and exits; writes the fifth and exits.
fn code() -> &'static [u8] {
    guest_code!(
        "inc dword ptr [0x12000]",
        "inc dword ptr [0x14000]",
        "out 0x80, al",
        "inc dword ptr [0x14000]",
        "out 0x81, al",
        "hlt",
    )
}

const BOTH: [u64; 2] = [0x12, 0x14];
const FIFTH: [u64; 1] = [0x14];

/// The numbers of the pages in the log, of those that hold neither code nor tables: a CPU may write to its tables, and
/// with nested paging KVM cannot tell its reads of them from writes.
fn take(rig: &Rig) -> Result<Vec<u64>, Error> {
    let words = rig.vm.take_dirty_pages(0, RAM_BYTES)?;
    let bits = (0u64..).zip(words).flat_map(|(word, bits)| (0..64).map(move |bit| (word * 64 + bit, bits >> bit & 1)));
    Ok(bits.filter(|(page, set)| *set != 0 && *page >= FREE_PAGES >> 12).map(|(page, _)| page).collect())
}

fn pages(pages: &[u64]) -> String {
    match pages {
        [] => "no page".to_owned(),
        [page] => format!("page {page:#x}"),
        _ => format!("pages {}", pages.iter().map(|page| format!("{page:#x}")).collect::<Vec<_>>().join(", ")),
    }
}

/// The log's answer number `call`: after the guest wrote two pages, again at once, after it wrote one of them again.
fn log(cx: &Context, call: usize) -> Result<Found, Error> {
    let expected: &[u64] = [&BOTH[..], &[], &FIFTH].get(call).copied().unwrap_or_default();
    let asked = match call {
        0 => format!("the log after the guest wrote {}", pages(&BOTH)),
        1 => "the log again, at once".to_owned(),
        _ => format!("the log after the guest wrote {} again", pages(&FIFTH)),
    };
    let mut rig = Rig::new(cx, code())?;
    rig.vm.log_dirty_pages()?;
    let exit = rig.run()?;
    let mut found = take(&rig)?;
    if call > 0 {
        found = take(&rig)?;
    }
    let mut last = exit;
    if call > 1 {
        last = rig.run()?;
        found = take(&rig)?;
    }
    let there = rig.is_out(last, if call > 1 { PORT + 1 } else { PORT });
    let said = rig.describe(last);
    Ok(Found::new(asked, said, pages(&found), if there { conforms(found == expected) } else { Verdict::Failed }))
}

fn vmm(cx: &Context) -> Result<Found, Error> {
    let asked = format!("the log after the VMM wrote {}", pages(&[FREE_PAGES >> 12]));
    let rig = Rig::new(cx, code())?;
    rig.vm.log_dirty_pages()?;
    rig.write(FREE_PAGES, &[1])?;
    Ok(Found::new(asked, "ok", pages(&take(&rig)?), Verdict::Noted))
}
