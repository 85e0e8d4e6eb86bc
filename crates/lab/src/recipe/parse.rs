//! Reads a recipe, and refuses one that makes no sense.

use serde::Deserialize;
use toml::Spanned;

use super::{
    Hosts, Recipe, RecipeError, Source,
    order::Known,
    step::{ClockBy, DeadlineBy, Destination, Group, Msr, OffsetFrom, Op, SetMsrs, Step, ZeroDeadline},
};

/// Groups in a recipe's save or restore.
const MAX_GROUPS: usize = 64;
/// Steps in a group, and MSRs in a step.
const MAX_STEPS: usize = 32;
/// Characters of the line that says what a recipe is.
const MAX_ABOUT: usize = 240;
/// The longest delay of a step, and the longest downtime: an hour.
const MAX_DELAY_NS: u64 = 3_600_000_000_000;
/// The longest time that a host has been up: ten years.
const MAX_UPTIME_NS: u64 = 315_360_000_000_000_000;

/// How much faster one of a host's clocks can be: a thousandth.
const MAX_RAW_PPB: u64 = 1_000_000;

/// A file, before anything is known about it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRecipe {
    about: String,
    #[serde(default)]
    destination: Destination,
    #[serde(default)]
    source: Vec<Source>,
    #[serde(default)]
    hosts: Option<Spanned<Hosts>>,
    #[serde(default)]
    save: Vec<Spanned<RawGroup>>,
    restore: Vec<Spanned<RawGroup>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawGroup {
    vm: Option<Vec<Spanned<RawStep>>>,
    each_cpu: Option<Vec<Spanned<RawStep>>>,
    all_cpus: Option<Vec<Spanned<RawStep>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Wait,
    GetClock,
    GetMsrs,
    GetLapic,
    GetTscKhz,
    GetTscOffset,
    SetClock,
    SetMsrs,
    SetLapic,
    SetTscKhz,
    SetTscOffset,
    KvmclockCtrl,
    MasterclockUpdate,
    PublishPage,
    UpdateVmclock,
}

/// Whose step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Vm,
    Cpu,
    Either,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawStep {
    #[serde(rename = "do")]
    kind: Kind,
    #[serde(default)]
    after_ns: u64,
    msrs: Option<Vec<Msr>>,
    by: Option<ClockBy>,
    from: Option<OffsetFrom>,
    zero_deadline: Option<ZeroDeadline>,
    deadline_by: Option<DeadlineBy>,
    tsc_ahead_ns: Option<u64>,
    tsc_ahead_ns_per_cpu: Option<u64>,
    base_ahead_ns: Option<u64>,
}

/// A mistake at a byte of the text.
struct Mistake(usize, String);

/// Parses `text`, whose errors name `file`.
pub(super) fn parse(file: &str, name: &str, text: &str) -> Result<Recipe, RecipeError> {
    let at = |Mistake(byte, why): Mistake| {
        let before = text.as_bytes().get(..byte).unwrap_or_default();
        RecipeError::Line {
            file: file.to_owned(),
            line: before.iter().filter(|byte| **byte == b'\n').count().saturating_add(1),
            // One line, whatever the parser says.
            why: why.split_whitespace().collect::<Vec<_>>().join(" "),
        }
    };
    let raw: RawRecipe = toml::from_str(text)
        .map_err(|error| at(Mistake(error.span().map_or(0, |span| span.start), error.message().to_owned())))?;
    recipe(name, raw).map_err(at)
}

fn recipe(name: &str, raw: RawRecipe) -> Result<Recipe, Mistake> {
    let RawRecipe { about, destination, source: sources, hosts, save, restore } = raw;
    if about.contains('\n') || about.chars().count() > MAX_ABOUT {
        return Err(Mistake(0, format!("about is one line of at most {MAX_ABOUT} characters")));
    }
    let hosts = hosts.map_or(Ok(Hosts::default()), checked_hosts)?;
    let mut known = Known::new(destination);
    let save = groups("save", save, &mut known)?;
    known.restores = true;
    let restore = groups("restore", restore, &mut known)?;
    Ok(Recipe { name: name.to_owned(), about, sources, destination, hosts, save, restore })
}

fn checked_hosts(raw: Spanned<Hosts>) -> Result<Hosts, Mistake> {
    let (at, hosts) = (raw.span().start, raw.into_inner());
    let limits = [
        ("downtime-ns", hosts.downtime_ns, MAX_DELAY_NS),
        ("uptime-ns", hosts.uptime_ns, MAX_UPTIME_NS),
        ("page-age-ns", hosts.page_age_ns, MAX_UPTIME_NS),
        ("guest-uptime-ns", hosts.guest_uptime_ns, MAX_UPTIME_NS),
        ("raw-ppb", hosts.raw_ppb, MAX_RAW_PPB),
    ];
    if let Some((what, is, most)) = limits.into_iter().find(|(_, is, most)| is > most) {
        return Err(Mistake(at, format!("{what} is {is}, and at most {most}")));
    }
    Ok(hosts)
}

fn groups(what: &str, raw: Vec<Spanned<RawGroup>>, known: &mut Known) -> Result<Vec<Group>, Mistake> {
    if raw.len() > MAX_GROUPS {
        return Err(Mistake(0, format!("{what} has {} groups, and at most {MAX_GROUPS}", raw.len())));
    }
    raw.into_iter().map(|group| checked_group(group, known)).collect()
}

fn checked_group(raw: Spanned<RawGroup>, known: &mut Known) -> Result<Group, Mistake> {
    let at = raw.span().start;
    let (scope, steps, group): (_, _, fn(Vec<Step>) -> Group) = match raw.into_inner() {
        RawGroup { vm: Some(steps), each_cpu: None, all_cpus: None } => (Scope::Vm, steps, Group::Vm),
        RawGroup { vm: None, each_cpu: Some(steps), all_cpus: None } => (Scope::Cpu, steps, Group::EachCpu),
        RawGroup { vm: None, each_cpu: None, all_cpus: Some(steps) } => (Scope::Cpu, steps, Group::AllCpus),
        _ => return Err(Mistake(at, "a group has one of vm, each-cpu and all-cpus".to_owned())),
    };
    if steps.is_empty() || steps.len() > MAX_STEPS {
        return Err(Mistake(at, format!("a group has 1 to {MAX_STEPS} steps, and this one {}", steps.len())));
    }
    steps.into_iter().map(|step| checked_step(step, scope, known)).collect::<Result<_, _>>().map(group)
}

fn checked_step(raw: Spanned<RawStep>, scope: Scope, known: &mut Known) -> Result<Step, Mistake> {
    let (at, raw) = (raw.span().start, raw.into_inner());
    let bad = |why: String| Mistake(at, why);
    let RawStep {
        kind,
        after_ns,
        msrs,
        by,
        from,
        zero_deadline,
        deadline_by,
        tsc_ahead_ns,
        tsc_ahead_ns_per_cpu,
        base_ahead_ns,
    } = raw;
    let name = kind.name();
    let times = [
        ("after-ns", after_ns),
        ("tsc-ahead-ns", tsc_ahead_ns.unwrap_or(0)),
        ("tsc-ahead-ns-per-cpu", tsc_ahead_ns_per_cpu.unwrap_or(0)),
        ("base-ahead-ns", base_ahead_ns.unwrap_or(0)),
    ];
    if let Some((what, ns)) = times.into_iter().find(|(_, ns)| *ns > MAX_DELAY_NS) {
        return Err(bad(format!("{what} is {ns}, and at most {MAX_DELAY_NS}")));
    }
    if after_ns != 0 && known.destination == Destination::Vmm {
        return Err(bad("a restore into this VMM takes no time: no after-ns".to_owned()));
    }
    match (kind.scope(), scope) {
        (Scope::Vm, Scope::Cpu) => return Err(bad(format!("{name} is a step of the VM: put it into a vm group"))),
        (Scope::Cpu, Scope::Vm) => {
            return Err(bad(format!("{name} is a step of a vCPU: put it into an each-cpu or all-cpus group")));
        }
        _ => {}
    }
    let given = [
        ("msrs", msrs.is_some(), &[Kind::GetMsrs, Kind::SetMsrs][..]),
        ("by", by.is_some(), &[Kind::SetClock]),
        ("from", from.is_some(), &[Kind::SetTscOffset]),
        ("zero-deadline", zero_deadline.is_some(), &[Kind::SetMsrs]),
        ("deadline-by", deadline_by.is_some(), &[Kind::SetMsrs]),
        ("tsc-ahead-ns", tsc_ahead_ns.is_some(), &[Kind::SetMsrs]),
        ("tsc-ahead-ns-per-cpu", tsc_ahead_ns_per_cpu.is_some(), &[Kind::SetMsrs]),
        ("base-ahead-ns", base_ahead_ns.is_some(), &[Kind::PublishPage]),
    ];
    if let Some((field, ..)) = given.into_iter().find(|(_, given, of)| *given && !of.contains(&kind)) {
        return Err(bad(format!("{name} takes no {field}")));
    }
    let needs = |field: &str| Mistake(at, format!("{name} needs {field}"));
    let msrs = || match &msrs {
        Some(msrs) if (1..=MAX_STEPS).contains(&msrs.len()) => Ok(msrs.clone()),
        Some(msrs) => Err(Mistake(at, format!("{name} has 1 to {MAX_STEPS} msrs, and here {}", msrs.len()))),
        None => Err(needs("msrs")),
    };
    let op = match kind {
        Kind::Wait => Op::Wait,
        Kind::GetClock => Op::GetClock,
        Kind::GetMsrs => Op::GetMsrs(msrs()?),
        Kind::GetLapic => Op::GetLapic,
        Kind::GetTscKhz => Op::GetTscKhz,
        Kind::GetTscOffset => Op::GetTscOffset,
        Kind::SetClock => Op::SetClock(by.ok_or_else(|| needs("by"))?),
        Kind::SetMsrs => Op::SetMsrs(SetMsrs {
            msrs: msrs()?,
            zero_deadline: zero_deadline.unwrap_or_default(),
            deadline_by: deadline_by.unwrap_or_default(),
            tsc_ahead_ns: tsc_ahead_ns.unwrap_or(0),
            tsc_ahead_ns_per_cpu: tsc_ahead_ns_per_cpu.unwrap_or(0),
        }),
        Kind::SetLapic => Op::SetLapic,
        Kind::SetTscKhz => Op::SetTscKhz,
        Kind::SetTscOffset => Op::SetTscOffset(from.ok_or_else(|| needs("from"))?),
        Kind::KvmclockCtrl => Op::KvmclockCtrl,
        Kind::MasterclockUpdate => Op::MasterclockUpdate,
        Kind::PublishPage => Op::PublishPage { base_ahead_ns: base_ahead_ns.unwrap_or(0) },
        Kind::UpdateVmclock => Op::UpdateVmclock,
    };
    known.check(&op).map_err(bad)?;
    Ok(Step { after_ns, op })
}

impl Kind {
    fn scope(self) -> Scope {
        match self {
            Self::Wait => Scope::Either,
            Self::GetClock | Self::SetClock | Self::UpdateVmclock => Scope::Vm,
            Self::GetMsrs
            | Self::GetLapic
            | Self::GetTscKhz
            | Self::GetTscOffset
            | Self::SetMsrs
            | Self::SetLapic
            | Self::SetTscKhz
            | Self::SetTscOffset
            | Self::KvmclockCtrl
            | Self::MasterclockUpdate
            | Self::PublishPage => Scope::Cpu,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::GetClock => "get-clock",
            Self::GetMsrs => "get-msrs",
            Self::GetLapic => "get-lapic",
            Self::GetTscKhz => "get-tsc-khz",
            Self::GetTscOffset => "get-tsc-offset",
            Self::SetClock => "set-clock",
            Self::SetMsrs => "set-msrs",
            Self::SetLapic => "set-lapic",
            Self::SetTscKhz => "set-tsc-khz",
            Self::SetTscOffset => "set-tsc-offset",
            Self::KvmclockCtrl => "kvmclock-ctrl",
            Self::MasterclockUpdate => "masterclock-update",
            Self::PublishPage => "publish-page",
            Self::UpdateVmclock => "update-vmclock",
        }
    }
}
