//! Registry of the clockevents, and the choice of the best one that this machine can use.

use core::fmt;

use super::{FEAT_KTIME, FEAT_ONESHOT};
use crate::platform::Platform;

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IA32_TSC_DEADLINE with the frequency at boot.
    LapicDeadline,
    /// IA32_TSC_DEADLINE with the kvmclock page.
    KvmTscDeadline,
    /// A host MSR in kvmclock nanoseconds.
    KvmNsDeadline,
    /// The countdown timer.
    LapicOneshot,
}

/// One entry of the registry.
#[derive(Debug)]
pub struct Descriptor {
    /// Its name on the command line.
    pub name: &'static str,
    /// The highest usable one is chosen.
    pub rating: u32,
    /// [`FEAT_ONESHOT`], [`FEAT_KTIME`].
    pub features: u32,
    /// What to build.
    pub kind: Kind,
}

/// All clockevents, best first.
///
/// 150 is from the thread, "preferrable over percpu HPET". The host interface is above it, because nothing in it can be
/// stale. Linux rates its native device 150 too where the timer runs in deep C-states, and registers only one of the
/// two. Here both are registered, so the one that fails after a migration is rated lower. The countdown has no absolute
/// deadline and is the last.
pub const REGISTRY: [Descriptor; 4] = [
    Descriptor { name: "kvm-ns-deadline", rating: 200, features: FEAT_ONESHOT | FEAT_KTIME, kind: Kind::KvmNsDeadline },
    Descriptor {
        name: "kvm-tsc-deadline",
        rating: 150,
        features: FEAT_ONESHOT | FEAT_KTIME,
        kind: Kind::KvmTscDeadline,
    },
    Descriptor { name: "lapic-deadline", rating: 120, features: FEAT_ONESHOT, kind: Kind::LapicDeadline },
    Descriptor { name: "lapic-oneshot", rating: 100, features: FEAT_ONESHOT, kind: Kind::LapicOneshot },
];

/// Why a clockevent cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable<'a> {
    /// There is none of that name.
    Unknown(&'a str),
    /// The machine lacks something.
    Lacks {
        /// The clockevent.
        name: &'static str,
        /// What it needs.
        need: &'static str,
    },
}

impl fmt::Display for Unusable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "clockevent={} is unknown; there are", name.escape_default())?;
                REGISTRY.iter().try_for_each(|d| write!(f, " {}", d.name))
            }
            Self::Lacks { name, need } => write!(f, "clockevent={name} cannot be used: {need}"),
        }
    }
}

impl core::error::Error for Unusable<'_> {}

impl Descriptor {
    /// The first feature that this device needs and the machine lacks.
    fn lacks(&self, platform: &Platform) -> Option<&'static str> {
        let no_deadline = (!platform.tsc_deadline).then_some("CPUID offers no TSC-deadline timer");
        let no_kvmclock = platform.kvmclock.is_none().then_some("kvmclock is not the clocksource");
        match self.kind {
            Kind::KvmNsDeadline => {
                no_kvmclock.or(platform.ns_msr.is_none().then_some("CPUID offers no nanosecond deadline MSR"))
            }
            Kind::KvmTscDeadline => no_deadline.or(no_kvmclock),
            Kind::LapicDeadline => no_deadline,
            Kind::LapicOneshot => None,
        }
    }
}

/// The clockevent called `name`, or the best usable one.
///
/// # Errors
/// [`Unusable`] if `name` is unknown or the machine lacks what it needs.
pub fn select<'a>(name: Option<&'a str>, platform: &Platform) -> Result<&'static Descriptor, Unusable<'a>> {
    let Some(name) = name else {
        let usable = REGISTRY.iter().filter(|d| d.lacks(platform).is_none());
        return usable.max_by_key(|d| d.rating).ok_or(Unusable::Lacks { name: "any", need: "none is usable" });
    };
    let device = REGISTRY.iter().find(|d| d.name == name).ok_or(Unusable::Unknown(name))?;
    device.lacks(platform).map_or(Ok(device), |need| Err(Unusable::Lacks { name: device.name, need }))
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;
    use crate::platform::KvmClock;

    fn full() -> Platform {
        Platform { tsc_deadline: true, ns_msr: Some(1), kvmclock: Some(KvmClock::NEW), ..Platform::default() }
    }

    fn best(platform: &Platform) -> &'static str {
        select(None, platform).unwrap().name
    }

    #[test]
    fn the_best_usable_one_is_chosen() {
        let mut p = full();
        assert_eq!(best(&p), "kvm-ns-deadline");
        p.ns_msr = None;
        assert_eq!(best(&p), "kvm-tsc-deadline");
        p.kvmclock = None;
        assert_eq!(best(&p), "lapic-deadline");
        p.tsc_deadline = false;
        assert_eq!(best(&p), "lapic-oneshot");
    }

    #[test]
    fn a_named_one_is_used_or_refused_with_the_reason() {
        let none = Platform::default();
        for d in &REGISTRY {
            assert_eq!(select(Some(d.name), &full()).unwrap().kind, d.kind);
            assert_eq!(select(Some(d.name), &none).is_ok(), d.kind == Kind::LapicOneshot);
        }
        let refused = select(Some("kvm-tsc-deadline"), &none).unwrap_err().to_string();
        assert_eq!(refused, "clockevent=kvm-tsc-deadline cannot be used: CPUID offers no TSC-deadline timer");
        let unknown = select(Some("hpet"), &full()).unwrap_err().to_string();
        assert!(unknown.starts_with("clockevent=hpet is unknown; there are kvm-ns-deadline"), "{unknown}");
    }
}
