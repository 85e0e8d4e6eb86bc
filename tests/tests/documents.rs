//! What the documents show is what the program prints: every console block is run, in a directory of its page's own.
//!
//! `vmm_tests::document` says which blocks those are, how they are marked, and what is compared.

use std::{
    env, fs,
    fs::File,
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vm_tests::{
    document::{Block, blocks, not_printed, repeats},
    guest, no_tsc_scaling, require_kvm, skip_part, vmm,
};

/// The time limit for a command. None needs a tenth of it, even on a busy machine.
const HANG_GUARD: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What commands use that a host may not have.
const TOOLS: [&str; 8] = ["curl", "jq", "xxd", "objcopy", "as", "ld", "du", "dd"];

/// A page under test: the working directory of its commands, and the commands that run in the background.
struct Page {
    name: &'static str,
    dir: tempfile::TempDir,
    beside: Vec<Child>,
    run: usize,
    not_run: Vec<String>,
    /// An example was left out for want of these tools: later ones may show what it did.
    lacks: Option<String>,
}

/// A running command whose output goes to files.
struct Started {
    child: Child,
    streams: [PathBuf; 2],
}

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn has(tool: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

impl Page {
    fn new(name: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for made in ["bin", "tmp", "target"] {
            fs::create_dir(dir.path().join(made)).unwrap();
        }
        symlink(vmm(), dir.path().join("bin/vmm")).unwrap();
        symlink(guest(), dir.path().join("target/guest.bin")).unwrap();
        Self { name, dir, beside: Vec::new(), run: 0, not_run: Vec::new(), lacks: None }
    }

    /// In this directory, and in no other: the examples' /tmp is within it.
    fn start(&self, command: &str, number: &str) -> Started {
        let command = command.replace("/tmp/", &format!("{}/tmp/", self.dir.path().display()));
        // The demonstration, without building it.
        let command = command.replace("cargo run --", "vmm").replace("cargo run", "vmm");
        let streams = ["out", "err"].map(|name| self.dir.path().join(format!("tmp/.{name}.{number}")));
        let [out, err] = streams.each_ref().map(|path| File::create(path).unwrap());
        let path = env::var("PATH").unwrap_or_default();
        let child = Command::new("bash")
            .args(["-c", &command])
            .current_dir(self.dir.path())
            .env("PATH", format!("{}/bin:{path}", self.dir.path().display()))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .unwrap();
        Started { child, streams }
    }

    /// The output of a command so far, with the temporary directory's path replaced by that in the documents.
    fn printed(&self, started: &Started) -> [String; 2] {
        let here = format!("{}/", self.dir.path().display());
        started.streams.each_ref().map(|path| {
            let text = String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
            text.replace(&format!("{here}tmp/"), "/tmp/").replace(&here, "")
        })
    }

    fn try_block(&mut self, block: &Block) {
        let place = format!("{}:{}", self.name, block.line);
        if let Some((name, content)) = &block.file {
            fs::write(self.dir.path().join(name), content).unwrap();
            return;
        }
        if block.without_scaling
            && let Err(why) = no_tsc_scaling()
        {
            skip_part!("{place}: {why}");
            self.not_run.push(format!("{place}: {why}"));
            return;
        }
        let words = |command: &str, tool: &str| command.split(|c: char| !c.is_alphanumeric()).any(|word| word == tool);
        let lacks = TOOLS.into_iter().filter(|tool| block.commands.iter().any(|(command, _)| words(command, tool)));
        let lacks: Vec<&str> = lacks.filter(|tool| !has(tool)).collect();
        if block.not_run.is_none() && !lacks.is_empty() {
            self.lacks = Some(format!("no {}", lacks.join(", ")));
        }
        if let Some(why) = block.not_run.clone().or_else(|| self.lacks.clone().filter(|_| !lacks.is_empty())) {
            self.not_run.push(format!("{place}: {why}"));
            return;
        }
        for (index, command) in block.before.iter().enumerate() {
            let mut started = self.start(command, &format!("{}b{index}", block.line));
            let code = self.wait(&mut started, command);
            assert_eq!(code, 0, "{place}: before it, {command:?} ended with {code}: {:#?}", self.printed(&started));
        }
        let mut last_code = 0;
        for (index, (command, shown)) in block.commands.iter().enumerate() {
            let number = format!("{}c{index}", block.line);
            if let Some(alone) = command.strip_suffix(" &") {
                let started = self.start(&format!("exec {alone}"), &number);
                self.hears(alone);
                self.beside.push(started.child);
                continue;
            }
            if block.goes_on && index + 1 == block.commands.len() {
                self.end_when_shown(&place, command, shown, &number);
                continue;
            }
            // Each command has a shell of its own, and `$?` is of the one before.
            let in_shell = format!("(exit {last_code}); {command}");
            let begun = Instant::now();
            let (printed, missing) = loop {
                let mut started = self.start(&in_shell, &number);
                last_code = self.wait(&mut started, command);
                let printed = self.printed(&started);
                let fine = last_code == 0 || block.exit.contains(&last_code);
                assert!(fine, "{place}: {command:?} ended with {last_code}: {printed:#?}");
                let missing = not_printed(shown, [&printed[0], &printed[1]], repeats(command));
                let missing = missing.filter(|_| self.lacks.is_none());
                // A guest that has just been started may not have come so far yet.
                if missing.is_none() || !command.ends_with("status") || begun.elapsed() > HANG_GUARD {
                    break (printed, missing);
                }
                thread::sleep(LOOK_AGAIN);
            };
            assert!(missing.is_none(), "{place}: {command:?} does not print\n{}\nbut {printed:#?}", missing.unwrap());
        }
        self.run += 1;
    }

    /// Waits until a VMM listens at the control socket that `command` names, if it names one.
    fn hears(&self, command: &str) {
        // One that waits for a VM has no control socket before that has come.
        if command.contains(" receive ") {
            return;
        }
        let mut words = command.split_whitespace().skip_while(|word| *word != "--api-sock").skip(1);
        let Some(path) = words.next().and_then(|path| path.strip_prefix("/tmp/")) else { return };
        let begun = Instant::now();
        while UnixStream::connect(self.dir.path().join("tmp").join(path)).is_err() {
            assert!(begun.elapsed() < HANG_GUARD, "{command}: no VMM listens");
            thread::sleep(LOOK_AGAIN);
        }
    }

    fn wait(&self, started: &mut Started, command: &str) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = started.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("{command:?}: {status}"));
            }
            if begun.elapsed() > HANG_GUARD {
                let _ = started.child.kill();
                panic!("{}: {command:?} does not end: {:#?}", self.name, self.printed(started));
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Runs a command that does not end by itself until it has printed what is shown.
    fn end_when_shown(&mut self, place: &str, command: &str, shown: &[String], number: &str) {
        let mut started = self.start(&format!("exec {command}"), number);
        self.hears(command);
        let begun = Instant::now();
        loop {
            let printed = self.printed(&started);
            // If nothing is shown, any output will do: it means that the command runs.
            let said = printed.iter().any(|text| !text.is_empty());
            if said && not_printed(shown, [&printed[0], &printed[1]], repeats(command)).is_none() {
                break;
            }
            let ended = started.child.try_wait().unwrap();
            assert!(ended.is_none() && begun.elapsed() < HANG_GUARD, "{place}: {command:?}: {ended:?}: {printed:#?}");
            thread::sleep(LOOK_AGAIN);
        }
        if command.contains("--api-sock") {
            // It runs on: later blocks use it.
            self.beside.push(started.child);
            return;
        }
        kill(Pid::from_raw(i32::try_from(started.child.id()).unwrap()), Signal::SIGTERM).unwrap();
        let code = self.wait(&mut started, command);
        assert_eq!(code, 0, "{place}: {command:?}: {:#?}", self.printed(&started));
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        for child in &mut self.beside {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn try_page(name: &'static str) {
    let text = fs::read_to_string(repository().join(name)).unwrap();
    let mut page = Page::new(name);
    for block in blocks(&text) {
        page.try_block(&block);
    }
    println!(
        "{name}: {} blocks run, {} not{}",
        page.run,
        page.not_run.len(),
        if page.not_run.is_empty() { "" } else { ":" }
    );
    page.not_run.iter().for_each(|why| println!("  {why}"));
    if let Some(lacks) = &page.lacks {
        skip_part!("{name}: {lacks}; its other examples are run, and what they print is not compared from there on");
    }
    assert!(page.run + page.not_run.len() > 0, "{name} has no examples");
}

/// A test for each page with examples.
macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        $(
            // Catches: an example that is out of date.
            #[test]
            fn $test() {
                require_kvm!();
                try_page($page);
            }
        )*

        const PAGES: &[&str] = &[$($page),*];
    };
}

pages! {
    readme: "README.md",
    api: "docs/api.md",
    check: "docs/check.md",
    clock: "docs/clock.md",
    vmclock: "docs/vmclock.md",
    conformance: "docs/conformance.md",
    cpuid: "docs/cpuid.md",
    doctor: "docs/doctor.md",
    foreign_guests: "docs/foreign-guests.md",
    live: "docs/live.md",
    guest_kernel: "docs/guest.md",
    hosts: "docs/hosts.md",
    kvm_unit_tests: "docs/kvm-unit-tests.md",
    lapic_kvm: "docs/lapic-kvm.md",
    linux_guest: "docs/linux/README.md",
    migration: "docs/migration.md",
    ns_deadline: "docs/ns-deadline.md",
    performance: "docs/performance.md",
    recipes: "docs/recipes.md",
    results: "docs/results.md",
    snapshot_format: "docs/snapshot-format.md",
    stock_kvm: "docs/stock-kvm.md",
    study: "docs/study/README.md",
    study_horizon: "docs/study/horizon.md",
    study_linux: "docs/study/linux.md",
    study_rebase: "docs/study/rebase.md",
    sweep: "docs/sweep.md",
    virtual_time: "docs/virtual-time.md",
}

// Catches: a page whose examples are not run.
#[test]
fn every_page_with_examples_is_tried() {
    let mut pages = vec!["README.md".to_owned()];
    for dir in ["docs", "docs/linux", "docs/study"] {
        let entries = fs::read_dir(repository().join(dir)).unwrap();
        pages.extend(entries.map(|entry| format!("{dir}/{}", entry.unwrap().file_name().to_str().unwrap())));
    }
    for page in pages.iter().filter(|page| page.ends_with(".md")) {
        let text = fs::read_to_string(repository().join(page)).unwrap();
        let examples = blocks(&text).iter().any(|block| block.file.is_none());
        assert_eq!(PAGES.contains(&page.as_str()), examples, "{page}");
    }
}
