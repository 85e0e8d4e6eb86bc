//! Every output flag in every mode: it writes its file, or is refused before the work with exit code 2 and a message
//! that names it. A CI job whose result file is silently not written would pass without a test.

use std::{fs, os::unix::net::UnixStream, thread, time::Duration};

use serde_json::Value;
use vm_tests::{Ended, Lab, finish, guest, ktap, require_kvm, start};

/// A flag that names a file for results.
const FLAGS: [&str; 7] = ["trace", "summary", "report", "junit", "tap", "ktap", "json"];

/// The effect of a flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leaves {
    /// A file, or with `-` all that is on standard output.
    File,
    /// It takes no file: JSON on standard output.
    Stdout,
    /// Nothing: it is refused.
    Refused,
}

use Leaves::{File, Refused, Stdout};

/// A mode, its command line, the exit code, and what becomes of each of [`FLAGS`].
struct Mode {
    name: &'static str,
    command: String,
    code: i32,
    leaves: [Leaves; 7],
}

fn modes() -> Vec<Mode> {
    let mode = |name, command: &str, code, leaves| Mode { name, command: command.to_owned(), code, leaves };
    let run = format!("--guest {} --time virtual --tsc-khz 2600000", guest().display());
    let sweep = "sweep --every exit --ratio 0.5 --cmdline clockevent=lapic-deadline";
    vec![
        mode("demonstration", "", 0, [Refused, Refused, File, File, File, File, Stdout]),
        mode("--guest", &run, 0, [File, File, File, File, File, File, Refused]),
        mode("restore", "restore snapshot", 0, [File, File, File, File, File, File, Refused]),
        mode("sweep", sweep, 1, [Refused, Refused, File, File, File, File, File]),
        mode("--point", &format!("{sweep} --point 3"), 1, [File, Refused, Refused, Refused, Refused, Refused, Refused]),
        mode("merge", "sweep merge shard", 1, [Refused, Refused, File, File, File, File, File]),
        mode("study", "study arithmetic", 0, [Refused, Refused, File, Refused, Refused, Refused, File]),
        mode("rebase", "study rebase --look-back 64", 0, [Refused, Refused, Refused, Refused, Refused, Refused, File]),
        mode("horizon", "study horizon", 0, [Refused, Refused, Refused, Refused, Refused, Refused, File]),
        mode("doctor", "doctor --conformance", 0, [Refused, Refused, Refused, Refused, Refused, Stdout, Stdout]),
        mode("ctl", "ctl --api-sock s status", 0, [Refused; 7]),
        mode("show", "snapshot show snapshot", 0, [Refused, Refused, Refused, Refused, Refused, Refused, Stdout]),
        mode("merge", "snapshot merge snapshot other", 0, [Refused; 7]),
    ]
}

/// The input files of the modes.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.boot("count=20", "--time virtual --tsc-khz 2600000 --save-at 105ms --save-to snapshot");
    let shard = "sweep --every exit --ratio 0.5 --cmdline clockevent=lapic-deadline --shard 1/1 --json shard";
    lab.run(shard).expect(1);
    lab
}

/// Asserts that `text` is in the format that `flag` writes.
#[track_caller]
fn is_result(flag: &str, text: &str, context: &str) {
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_else(|error| panic!("{error}: {context}"));
    match flag {
        "trace" => assert!(text.lines().map(json).filter(|line| line["event"].is_string()).count() > 3, "{context}"),
        "summary" | "json" => {
            assert!(json(text)["schema"].is_string() || json(text)["sections"].is_array(), "{context}")
        }
        "report" => assert!(text.starts_with("<!DOCTYPE html>") && text.ends_with("</html>"), "{context}"),
        "junit" => assert!(text.starts_with("<?xml") && text.trim_end().ends_with("</testsuites>"), "{context}"),
        "tap" => {
            let plan = text.lines().find_map(|line| line.strip_prefix("1..")).expect(context);
            let points = text.lines().filter(|line| line.starts_with("ok ") || line.starts_with("not ok "));
            assert!(
                text.starts_with("TAP version 14\n") && plan.parse() == Ok(points.count()) && plan != "0",
                "{context}"
            );
        }
        "ktap" => assert!(!ktap::results(text).is_empty(), "{context}"),
        _ => panic!("{flag}"),
    }
}

#[track_caller]
fn refused(ended: &Ended, flag: &str, mode: &str) {
    // Clap's usage line has the subcommand.
    let message = ended.stderr.trim_end();
    assert_eq!(ended.code(), 2, "--{flag} in {mode}: {ended:#?}");
    assert!(message.contains(&format!("--{flag}")), "--{flag} in {mode}: {message}");
    let named = mode == "demonstration" && message.contains("name one with --guest") || message.contains(mode);
    assert!(named, "--{flag} in {mode}: {message}");
    assert!(ended.stdout.is_empty(), "--{flag} in {mode}: {ended:#?}");
}

// `vmm --guest … --junit k.xml --tap k.tap` ended with 0 and wrote neither; `--trace -` made a file of that name.
#[test]
fn every_output_in_every_mode_is_there_or_refused() {
    require_kvm!();
    let lab = lab();
    for Mode { name, command, code, leaves } in modes() {
        let of = |what: Leaves| {
            FLAGS.into_iter().zip(leaves).filter(move |(_, leaves)| *leaves == what).map(|(flag, _)| flag)
        };
        // Those that are files all at once.
        let files: Vec<&str> = of(File).collect();
        if !files.is_empty() {
            let flags: String = files.iter().map(|flag| format!(" --{flag} out.{flag}")).collect();
            let ended = lab.run(&format!("{command}{flags}")).expect(code);
            for flag in &files {
                let path = lab.path(format!("out.{flag}"));
                let text =
                    fs::read_to_string(&path).unwrap_or_else(|error| panic!("--{flag} in {name}: {error}: {ended:#?}"));
                is_result(flag, &text, &format!("--{flag} in {name}"));
                fs::remove_file(path).unwrap();
            }
        }
        // The demonstration takes seconds, and writes nothing but these itself.
        let dashes = if name == "demonstration" { &files[..1] } else { &files[..] };
        for flag in dashes {
            let ended = lab.run(&format!("{command} --{flag} -")).expect(code);
            is_result(flag, &ended.stdout, &format!("--{flag} - in {name}: {ended:#?}"));
        }
        for flag in of(Stdout) {
            let ended = lab.run(&format!("{command} --{flag}")).expect(code);
            is_result(flag, &ended.stdout, &format!("--{flag} in {name}"));
        }
        for flag in of(Refused) {
            refused(&lab.run(&format!("{command} --{flag} out")), flag, name);
        }
        let left = ["-", "out"].map(|name| lab.path(name)).into_iter().filter(|path| path.exists());
        assert_eq!(left.count(), 0, "{name}");
    }
}

// Catches: two results in one stream, which a reader cannot separate.
#[test]
fn standard_output_takes_one_result() {
    require_kvm!();
    let lab = lab();
    for Mode { name, command, leaves, .. } in modes() {
        let files: Vec<&str> =
            FLAGS.into_iter().zip(leaves).filter(|(_, leaves)| *leaves == File).map(|(flag, _)| flag).collect();
        for pair in files.windows(2) {
            for second in ["-", "/dev/stdout"] {
                let ended = lab.run(&format!("{command} --{} - --{} {second}", pair[0], pair[1]));
                ended.refused(2, &[&format!("--{}", pair[0]), &format!("--{}", pair[1]), "both name"]);
            }
        }
        assert!(!name.is_empty());
    }
    lab.run("--json --tap -").refused(2, &["--json"]);
    lab.run("restore snapshot --trace - --report r.html").refused(2, &["--report", "--trace -"]);
}

// Catches: the guest's console in the midst of a result.
#[test]
fn the_guests_console_makes_way_for_a_result() {
    require_kvm!();
    let lab = Lab::new();
    let run = |flags: &str| finish(&mut lab.guest("count=3", &format!("--time virtual {flags}"))).expect(0);
    let usual = run("--summary s.json");
    assert!(usual.stdout.contains("guest: 3 ticks") && !usual.stderr.contains("guest: 3 ticks"), "{usual:#?}");
    let moved = run("--summary -");
    is_result("summary", &moved.stdout, "--summary -");
    assert!(moved.stderr.contains("guest: 3 ticks"), "{moved:#?}");
    // A file of that name is meant by its path.
    let named = run("--summary ./-");
    assert!(named.stdout.contains("guest: 3 ticks"), "{named:#?}");
    is_result("summary", &fs::read_to_string(lab.path("-")).unwrap(), "--summary ./-");
}

// One of two ratios was dropped in silence.
#[test]
fn a_point_is_tried_at_one_ratio() {
    let lab = Lab::new();
    lab.run("sweep --point 3 --ratio 0.5,2").refused(2, &["--point", "--ratio", "2"]);
    lab.run("sweep --depth 2 --point 3,1 --ratio 0.5,1,2").refused(2, &["--point", "--ratio", "3"]);
}

// Catches: results that are not written when a signal or `quit` ends the run.
#[test]
fn a_run_that_is_ended_from_outside_leaves_its_results() {
    require_kvm!();
    let lab = Lab::new();
    let all = "--api-sock s --trace out.trace --summary out.summary --report out.report --junit out.junit --tap out.tap --ktap out.ktap";
    let process = start(&mut lab.guest("scenario=idle hz=200", all));
    while UnixStream::connect(lab.path("s")).is_err() {
        thread::sleep(Duration::from_millis(5));
    }
    lab.run("ctl --api-sock s quit").expect(0);
    let ended = process.finish().expect(0);
    for flag in &FLAGS[..6] {
        is_result(flag, &fs::read_to_string(lab.path(format!("out.{flag}"))).unwrap(), &format!("{ended:#?}"));
    }
}
