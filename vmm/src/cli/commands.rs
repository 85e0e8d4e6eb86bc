//! The subcommands, and the grammar that a command line is parsed with.
//!
//! To build the whole grammar takes 0.3 ms, as long as to create a VM. So the flags of a subcommand are built only if
//! it is called, and the flags of `vmm` itself only if no subcommand is.

use std::ffi::OsStr;

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches};

use super::{
    args::{Cli, Receive, Restore, Snapshot},
    check_args::Check,
    clock_args::Clock,
    ctl_args::Ctl,
    doctor_args::Doctor,
    sites_args::Sites,
    study_args::Study,
    sweep_args::Sweep,
};

/// The width of help texts, in columns, where the terminal is wider.
pub const HELP_WIDTH: usize = 110;

/// A subcommand with its flags.
#[derive(Debug)]
pub enum Command {
    /// `vmm restore`.
    Restore(Box<Restore>),
    /// `vmm receive`.
    Receive(Box<Receive>),
    /// `vmm ctl`.
    Ctl(Ctl),
    /// `vmm snapshot`.
    Snapshot(Snapshot),
    /// `vmm doctor`.
    Doctor(Doctor),
    /// `vmm sweep`.
    Sweep(Box<Sweep>),
    /// `vmm study`.
    Study(Study),
    /// `vmm clock`.
    Clock(Box<Clock>),
    /// `vmm check`.
    Check(Box<Check>),
    /// `vmm sites`.
    Sites(Sites),
}

/// Adds every subcommand; its flags are built when they are needed.
fn with_subcommands(vmm: clap::Command) -> clap::Command {
    let command = |name, about, flags| clap::Command::new(name).about(about).defer(flags);
    vmm.subcommands([
        command("restore", "Go on with a saved VM, at another TSC frequency if wanted", Restore::augment_args),
        command("receive", "Wait for a live migration from another VMM, and run its guest", Receive::augment_args),
        command("ctl", "Talk to a running VM over its control socket", Ctl::augment_args),
        command("snapshot", "Look at a saved VM", Snapshot::augment_args),
        command("doctor", "Find out what this host does, and what vmm will do about it", Doctor::augment_args),
        command(
            "sweep",
            "Migrate a guest at every instruction of a stretch, and say what became of its ticks",
            Sweep::augment_args,
        ),
        command(
            "study",
            "Study every clockevent of the embedded guest: precision and cost of its arithmetic, every policy, every fault",
            Study::augment_args,
        ),
        command(
            "clock",
            "Stop a guest again and again, and measure what that does to its clock and timers",
            Clock::augment_args,
        ),
        command(
            "check",
            "Migrate a guest some times, and judge its timer and clock without any record of its own",
            Check::augment_args,
        ),
        command(
            "sites",
            "Find the instructions of a kernel that read the TSC, write the TSC deadline, or spin",
            Sites::augment_args,
        ),
    ])
}

/// The whole grammar.
pub fn whole() -> clap::Command {
    with_subcommands(Cli::command())
}

/// The part of the grammar for a command line whose first word is `first`. It parses that line as [`whole`] does.
pub fn grammar(first: Option<&OsStr>) -> clap::Command {
    let lean = with_subcommands(clap::Command::new("vmm").max_term_width(HELP_WIDTH));
    match first {
        Some(word) if lean.find_subcommand(word).is_some() => lean,
        _ => whole(),
    }
}

impl Command {
    /// The subcommand that was called, if any.
    pub fn called(matches: &ArgMatches) -> Option<Result<Self, clap::Error>> {
        let (name, flags) = matches.subcommand()?;
        Some(match name {
            "restore" => Restore::from_arg_matches(flags).map(Box::new).map(Self::Restore),
            "receive" => Receive::from_arg_matches(flags).map(Box::new).map(Self::Receive),
            "ctl" => Ctl::from_arg_matches(flags).map(Self::Ctl),
            "snapshot" => Snapshot::from_arg_matches(flags).map(Self::Snapshot),
            "doctor" => Doctor::from_arg_matches(flags).map(Self::Doctor),
            "sweep" => Sweep::from_arg_matches(flags).map(Box::new).map(Self::Sweep),
            "study" => Study::from_arg_matches(flags).map(Self::Study),
            "clock" => Clock::from_arg_matches(flags).map(Box::new).map(Self::Clock),
            "check" => Check::from_arg_matches(flags).map(Box::new).map(Self::Check),
            "sites" => Sites::from_arg_matches(flags).map(Self::Sites),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a subcommand whose own grammar differs from that in the whole one.
    #[test]
    fn the_lean_grammar_is_the_whole_ones() {
        let mut whole = whole();
        whole.build();
        let names: Vec<String> = whole.get_subcommands().map(|command| command.get_name().to_owned()).collect();
        assert!(names.len() > 10, "{names:?}");
        for name in names.iter().filter(|name| *name != "help") {
            let help = |grammar: clap::Command| {
                let error = grammar.try_get_matches_from(["vmm", name, "--help"]).unwrap_err();
                assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp);
                error.to_string()
            };
            let mut other = self::whole();
            other.build();
            assert_eq!(help(grammar(Some(OsStr::new(name)))), help(other), "{name}");
        }
    }

    // Catches: a list of subcommands that describes one otherwise than its own help does.
    #[test]
    fn the_list_describes_each_as_its_help_does() {
        let abouts = |grammar: &clap::Command| -> Vec<String> {
            grammar.get_subcommands().take(10).map(|c| c.get_about().unwrap().to_string()).collect()
        };
        let mut built = whole();
        let listed = abouts(&built);
        built.build();
        assert_eq!(abouts(&built), listed);
    }

    // Catches: a grammar with a contradiction, in a part that is built only when it is needed.
    #[test]
    fn every_grammar_is_sound() {
        whole().debug_assert();
    }

    // Catches: a subcommand that is in the grammar but that `Command::called` lacks.
    #[test]
    fn every_subcommand_is_carried_out() {
        for (name, more) in [
            ("restore", vec!["dir"]),
            ("receive", vec!["unix:x"]),
            ("ctl", vec!["--api-sock", "x", "status"]),
            ("snapshot", vec!["show", "dir"]),
            ("doctor", vec![]),
            ("sweep", vec![]),
            ("study", vec![]),
            ("clock", vec![]),
            ("check", vec![]),
            ("sites", vec!["vmlinux"]),
        ] {
            let words = ["vmm", name].into_iter().chain(more);
            let matches = grammar(Some(OsStr::new(name))).try_get_matches_from(words).unwrap();
            assert!(matches!(Command::called(&matches), Some(Ok(_))), "{name}");
        }
        assert_eq!(whole().get_subcommands().count(), 10);
    }
}
