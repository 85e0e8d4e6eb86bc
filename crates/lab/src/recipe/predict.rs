//! The error that a recipe must have, computed from its delays alone.
//!
//! The two numbers that a VMM saves of a guest's clock, TSC and kvmclock, are read at two instants and written at two
//! others, and both count on meanwhile:
//!
//! - P1: vCPU 0's TSC is read;
//! - P2: kvmclock is read;
//! - P3: that TSC is written;
//! - P4: kvmclock is written.
//!
//! At P4 the page shows the value of P2, and the TSC that of P1 and what it counted since P3. So the page is ahead of
//! the TSC by `(P2 − P1) − (P4 − P3)` (kvm list, 2026-01-16, for QEMU). It changes with the number of vCPUs: their
//! steps between P1 and P2 add to it, those between P3 and P4 subtract. Where kvmclock is set by wall time, it counts
//! the downtime and the TSC does not: the page is ahead by `P3 − P1`. Where the TSC is computed from wall time too,
//! they are equal.
//!
//! This formula knows neither ticks nor KVM: [`super::kvm`] does the same in the guest's units, step by step, and a
//! test compares the two.

use vmtime::Khz;

use super::{
    Recipe,
    step::{ClockBy, Destination, Group, Msr, OffsetFrom, Op, SetMsrs},
};

/// KVM takes TSC writes within a second of each other's for one.
const SYNC_NS: i128 = 1_000_000_000;

/// How far each vCPU's page is ahead of its TSC, in nanoseconds, for a guest TSC of `guest_khz` that is restored on a
/// host of `host_khz`. `None` where nothing sets kvmclock or the TSC: the error is then the guest's whole uptime.
#[must_use]
pub fn predict(recipe: &Recipe, cpus: usize, guest_khz: Khz, host_khz: Khz) -> Option<Vec<i64>> {
    if recipe.destination != Destination::Kvm {
        return stays(recipe, cpus);
    }
    let reads_tsc = |op: &Op| matches!(op, Op::GetMsrs(msrs) if msrs.contains(&Msr::Tsc));
    let writes_tsc = |op: &Op| matches!(op, Op::SetMsrs(SetMsrs { msrs, .. }) if msrs.contains(&Msr::Tsc));
    let count = i128::try_from(cpus).ok()?;
    let (save, there) = (&recipe.save[..], length(&recipe.save, count) + i128::from(recipe.hosts.downtime_ns));
    let restored = |cpu: i128, wanted: &dyn Fn(&Op) -> bool| {
        last(&recipe.restore, count, cpu, wanted).map(|(at, place)| (there + at, place))
    };
    let p2 = last(save, count, 0, &|op| *op == Op::GetClock)?.0;
    let (p4, _) = restored(0, &|op| matches!(op, Op::SetClock(_)))?;
    let updated = restored(cpus_last(count), &|op| *op == Op::MasterclockUpdate).map_or(p4, |(at, _)| at.max(p4));
    let stepped = raw(recipe, updated - p4);
    let by_wall_time = restored(0, &|op| *op == Op::SetClock(ClockBy::Realtime)).is_some();
    let clock = if by_wall_time { p4 } else { p2 };
    let elapsed = restored(0, &|op| *op == Op::SetTscOffset(OffsetFrom::Elapsed)).is_some();
    let shared = restored(0, &|op| *op == Op::SetTscOffset(OffsetFrom::FirstCpu)).is_some();
    // Of the vCPU whose TSC write the others' follow: P1, P3, and what KVM_SET_TSC_KHZ after it adds to the TSC.
    let mut leader = None;
    let mut before: Option<(i128, i128)> = None;
    let mut errors = Vec::new();
    for cpu in 0..count {
        if elapsed {
            errors.push(nearest(clock - p4 + stepped));
            continue;
        }
        let p1 = last(save, count, cpu, &reads_tsc)?.0;
        let (p3, written) = restored(cpu, &writes_tsc)?;
        let apart = before.is_some_and(|(p1_before, p3_before)| (p1 - p1_before - (p3 - p3_before)).abs() >= SYNC_NS);
        if leader.is_none() || (apart && !shared) {
            let scaled_after = recipe.hosts.tsc_scaling
                && restored(cpu, &|op| *op == Op::SetTscKhz).is_some_and(|(_, place)| place > written);
            let (guest, host) = (i128::from(guest_khz.get()), i128::from(host_khz.get()));
            let up = i128::from(recipe.hosts.uptime_ns) + p3 - there;
            let jump = if scaled_after { (up * (guest - host) * 2 + guest).div_euclid(guest * 2) } else { 0 };
            leader = Some((p1, p3, jump));
        }
        before = Some((p1, p3));
        let (p1, p3, jump) = leader?;
        errors.push(nearest((clock - p1) - (p4 - p3) - jump + stepped));
    }
    Some(errors)
}

/// Of a VM that stays where it is: by how much KVM's updates move its clock, and how far each TSC was moved. `None` of
/// a restore into this VMM, whose page and TSC are its own.
fn stays(recipe: &Recipe, cpus: usize) -> Option<Vec<i64>> {
    if recipe.destination == Destination::Vmm {
        return None;
    }
    let count = i128::try_from(cpus).ok()?;
    let updated = last(&recipe.restore, count, cpus_last(count), &|op| *op == Op::MasterclockUpdate);
    let begin = i128::from(recipe.hosts.downtime_ns) + i128::from(recipe.hosts.page_age_ns);
    let stepped = updated.map_or(0, |(at, _)| raw(recipe, begin + at));
    let ahead = |cpu: i128| {
        let steps = recipe.restore.iter().flat_map(|group| group.steps());
        let each = steps.filter_map(|step| match &step.op {
            Op::SetMsrs(msrs) => Some(i128::from(msrs.tsc_ahead_ns_per_cpu)),
            _ => None,
        });
        each.sum::<i128>() * cpu
    };
    Some((0..count).map(|cpu| nearest(stepped + ahead(cpu))).collect())
}

/// What CLOCK_MONOTONIC_RAW gains in `ns`, to the nearest nanosecond.
fn raw(recipe: &Recipe, ns: i128) -> i128 {
    (ns * i128::from(recipe.hosts.raw_ppb) * 2 + 1_000_000_000).div_euclid(2_000_000_000)
}

/// The number of the last vCPU.
fn cpus_last(count: i128) -> i128 {
    (count - 1).max(0)
}

fn nearest(ns: i128) -> i64 {
    i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX })
}

/// How long `groups` take for `cpus` vCPUs.
fn length(groups: &[Group], cpus: i128) -> i128 {
    groups.iter().map(|group| sum(group) * if matches!(group, Group::EachCpu(_)) { cpus } else { 1 }).sum()
}

/// How long a group takes for one vCPU.
fn sum(group: &Group) -> i128 {
    group.steps().iter().map(|step| i128::from(step.after_ns)).sum()
}

/// When vCPU `cpu` of `cpus` takes the last step that is `wanted`, from the beginning of `groups`; and that step's
/// place in the recipe.
fn last(groups: &[Group], cpus: i128, cpu: i128, wanted: &dyn Fn(&Op) -> bool) -> Option<(i128, (usize, usize))> {
    groups.iter().enumerate().rev().find_map(|(number, group)| {
        let index = group.steps().iter().rposition(|step| wanted(&step.op))?;
        let within: i128 = group.steps().iter().take(index + 1).map(|step| i128::from(step.after_ns)).sum();
        let turn = if matches!(group, Group::EachCpu(_)) { cpu * sum(group) } else { 0 };
        let before = groups.get(..number).map_or(0, |before| length(before, cpus));
        Some((before + turn + within, (number, index)))
    })
}
