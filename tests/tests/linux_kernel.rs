//! The clock events that `scripts/linux` adds to Linux (docs/linux/kvmclock_event.c), on a CPU made of variables.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use tempfile::TempDir;
use vm_tests::require;

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The program `tests/data/linux/kernel.c` in a folder, or why it cannot be had.
fn compiled() -> Result<TempDir, String> {
    let folder = tempfile::tempdir().unwrap();
    let source = fs::read_to_string(repository().join("docs/linux/kvmclock_event.c")).unwrap();
    // Linux' headers are not there: kernel.c has what they declare.
    let lines: Vec<_> = source.lines().filter(|line| !line.starts_with("#include")).collect();
    fs::write(folder.path().join("kvmclock_event.c"), lines.join("\n")).unwrap();
    let output = Command::new("cc")
        .arg("-I")
        .arg(folder.path())
        .arg("-o")
        .arg(folder.path().join("kernel"))
        .arg(repository().join("tests/data/linux/kernel.c"))
        .output()
        .map_err(|error| format!("there is no C compiler (cc): {error}"))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(folder)
}

/// What the program prints, given `input`.
fn run(folder: &TempDir, command: &str, option: &str, input: &str) -> Vec<String> {
    let mut child = Command::new(folder.path().join("kernel"))
        .args([command, option])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{command} {option}: {}", output.status);
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// By how much kvmclock advances in `ticks`.
fn advance(ticks: u64, mul: u32, shift: i32) -> u128 {
    let shifted = if shift < 0 { u128::from(ticks) >> -shift } else { u128::from(ticks) << shift };
    (shifted * u128::from(mul)) >> 32
}

// Catches: an exact wait that is early or longer than it must be; one of the others that is longer than it must be, or
// far too early: a wrong shift, or a product that does not fit.
#[test]
fn waits_are_as_long_as_the_page_says() {
    let folder = require!(compiled());
    let mut pages = Vec::new();
    // A linear congruential generator: the same pages each time.
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 24
    };
    for _ in 0..20_000 {
        let mul = u32::try_from(next() & 0xffff_ffff).unwrap() | 1 << 31;
        let shift = i32::try_from(next() % 9).unwrap() - 5;
        let wait = (next() & ((1 << 38) - 1)) >> (next() % 38);
        pages.push((mul, shift, wait));
    }
    for mul in [1 << 31, u32::MAX] {
        pages.extend([-15, 0, 15].map(|shift| (mul, shift, (1 << 38) - 1)));
    }
    let mut input = String::new();
    for (mul, shift, wait) in &pages {
        writeln!(input, "{mul} {shift} {wait}").unwrap();
    }
    for option in ["exact", "split", "mult"] {
        let ticks = run(&folder, "convert", option, &input);
        assert_eq!(ticks.len(), pages.len());
        for (ticks, (mul, shift, wait)) in ticks.iter().zip(&pages) {
            let (ticks, wait): (u64, _) = (ticks.parse().unwrap(), u128::from(*wait));
            let at = format!("{option}: {ticks} ticks for {wait} ns, mul {mul}, shift {shift}");
            assert!(ticks == 0 || advance(ticks - 1, *mul, *shift) < wait, "late: {at}");
            let early = wait.saturating_sub(advance(ticks, *mul, *shift));
            // A tick of the page, one of the first quotient of `split`, and the reciprocal's 31 bits.
            let tick = 1u128 << (*shift).max(0);
            let allowed = if option == "exact" { 0 } else { 2 * tick + 64 + (wait >> 26) };
            assert!(early <= allowed, "early by {early}: {at}");
        }
    }
}

// Catches: a page or a clock that was read before the migration in a deadline written after it.
#[test]
fn only_a_migration_before_the_write_spoils_a_deadline_and_the_recheck_mends_it() {
    let folder = require!(compiled());
    for option in ["exact", "exact,recheck", "recheck", "ns"] {
        let msr = if option == "ns" { "766d6d00" } else { "6e0" };
        let late = run(&folder, "sweep", option, "");
        // Not migrated; the core's clock; begin, TSC, end; the write.
        assert!(late.len() >= 6, "{option}: {late:?}");
        for (point, late) in late.iter().enumerate() {
            // The ticks of 10 ms take 20, after kvmclock went 5 ms ahead.
            let want = if option == "exact" && point == 5 { 15_000_000 } else { 0 };
            assert_eq!(*late, format!("{msr} {want}"), "{option}, point {point}");
        }
    }
}
