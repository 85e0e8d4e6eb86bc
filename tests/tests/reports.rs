//! Results for people and for CI: pages load and draw their data, JUnit and TAP agree with the sweep.

use std::{fs, path::Path};

use serde_json::Value;
use vm_tests::{Browser, Ended, Lab, Loaded, finish, number, require, require_kvm};

const SWEEP: &str = "sweep --ratio 0.5,2";
/// The window between the version check and the write of the deadline is open: late at ×0.5, woken early at ×2.
const RACY: &str = "clockevent=kvm-tsc-deadline conversion=split recheck=off";

#[track_caller]
fn sweep(lab: &Lab, cmdline: &str, flags: &str) -> Ended {
    finish(lab.vmm(SWEEP).args(["--cmdline", cmdline]).args(flags.split_whitespace()))
}

/// Asserts that the page's scripts ran to their end without a message, and that every chart and map drew all its
/// points, each series in its colour. Returns the number of charts.
#[track_caller]
fn drawn(loaded: &Loaded) -> usize {
    assert!(loaded.console.is_empty(), "{:#?}", loaded.console);
    assert!(loaded.html.contains("data-report=\"drawn\""), "the script did not come to its end: {}", loaded.html);
    let charts: Vec<&str> = loaded.elements("figure", "chart").collect();
    for chart in &charts {
        let points = number(chart, "data-points");
        assert!(points > 0, "{chart}");
        assert_eq!(number(chart, "data-drawn"), points, "{chart}");
        assert_eq!(number(chart, "data-inked"), number(chart, "data-series"), "{chart}");
    }
    for map in loaded.elements("figure", "heat") {
        assert_eq!(number(map, "data-drawn"), number(map, "data-points"), "{map}");
    }
    charts.len()
}

/// Asserts that the page does not scroll sideways on a telephone.
#[track_caller]
fn fits(browser: &Browser, page: &Path) {
    assert_eq!(browser.width_in(page, 390), 390, "{}", page.display());
}

// Catches: a script that fails on real data, points that are not drawn, a page that loads something.
#[test]
fn a_sweeps_report_draws_every_point() {
    require_kvm!();
    let browser = require!(Browser::find());
    let lab = Lab::new();
    sweep(&lab, RACY, "--report page.html --json sweep.json").expect(1);
    let page = lab.path("page.html");
    let loaded = browser.load(&page);
    assert_eq!(drawn(&loaded), 2);
    let points = findings(&lab)["points"].as_array().unwrap().len();
    let maps: Vec<u64> = loaded.elements("figure", "heat").map(|map| number(map, "data-points")).collect();
    assert_eq!(maps, [u64::try_from(points).unwrap()]);
    assert!(loaded.elements("td", "cell v-late").count() > 0 && loaded.elements("td", "cell v-rearmed").count() > 0);
    fits(&browser, &page);
}

// Catches: the demonstration's children not traced, charts of one clockevent missing.
#[test]
fn the_demonstrations_report_has_a_chart_for_every_row() {
    require_kvm!();
    let browser = require!(Browser::find());
    let lab = Lab::new();
    lab.run("--report page.html --junit cases.xml --tap cases.tap").expect(0);
    let page = lab.path("page.html");
    assert_eq!(drawn(&browser.load(&page)), 18);
    fits(&browser, &page);
    assert!(
        fs::read_to_string(lab.path("cases.tap")).unwrap().starts_with("TAP version 14\n1..18\nok 1 - lapic-deadline")
    );
    assert!(
        fs::read_to_string(lab.path("cases.xml"))
            .unwrap()
            .contains("tests=\"18\" skipped=\"0\" errors=\"0\" failures=\"0\"")
    );
}

// Catches: a trace that only the report needs and that is not written, or not read to its end.
#[test]
fn a_runs_report_shows_its_migrations_with_or_without_a_trace_file() {
    require_kvm!();
    let browser = require!(Browser::find());
    let lab = Lab::new();
    let migrating = "--time virtual --tsc-khz 2600000 --migrate-every 150ms --tsc-khz-cycle 1300000,5200000";
    let run = lab.boot("clockevent=lapic-deadline hz=100 count=40", &format!("{migrating} --report page.html"));
    let page = lab.path("page.html");
    // All ticks, and those around each migration.
    let charts = 1 + usize::try_from(run.summary.count("migrations")).unwrap();
    assert_eq!(drawn(&browser.load(&page)), charts);
    fits(&browser, &page);
    let saving = "--time virtual --tsc-khz 2600000 --save-at 105ms --save-to snapshot";
    lab.boot("clockevent=kvm-tsc-deadline hz=100 count=40", saving);
    lab.restore("snapshot", "--tsc-khz 1300000 --report restored.html");
    assert_eq!(drawn(&browser.load(&lab.path("restored.html"))), 2);
}

fn findings(lab: &Lab) -> Value {
    serde_json::from_slice(&fs::read(lab.path("sweep.json")).unwrap()).unwrap()
}

/// Frequencies and functions with a point that harmed the guest, and all of them, counted from the JSON.
fn cases(findings: &Value) -> (usize, usize) {
    let mut all = std::collections::BTreeMap::new();
    let function = |address: &Value| {
        let code = findings["code"].as_array().unwrap().iter().find(|code| code["address"] == *address).unwrap();
        code["symbol"].as_str().unwrap().split("+0x").next().unwrap().to_owned()
    };
    for point in findings["points"].as_array().unwrap() {
        for (ratio, outcome) in point["outcomes"].as_array().unwrap().iter().enumerate() {
            let bad = !matches!(outcome["verdict"].as_str().unwrap(), "on-time" | "rearmed");
            *all.entry((ratio, function(&point["address"]))).or_insert(false) |= bad;
        }
    }
    (all.values().filter(|bad| **bad).count(), all.len())
}

// Catches: results for CI that disagree with the sweep, shards that merge to other results.
#[test]
fn junit_and_tap_count_what_the_sweep_found() {
    require_kvm!();
    let lab = Lab::new();
    let all = "--json sweep.json --junit cases.xml --tap cases.tap --report page.html";
    sweep(&lab, RACY, all).expect(1);
    let (bad, of) = cases(&findings(&lab));
    assert!(0 < bad && bad < of);
    let read = |name: &str| fs::read_to_string(lab.path(name)).unwrap();
    let (tap, junit) = (read("cases.tap"), read("cases.xml"));
    let lines = |start: &str| tap.lines().filter(|line| line.starts_with(start)).count();
    assert_eq!((lines(&format!("1..{of}")), lines("not ok "), lines("ok ")), (1, bad, of - bad), "{tap}");
    assert!(junit.contains(&format!("tests=\"{of}\" skipped=\"0\" errors=\"0\" failures=\"{bad}\"")), "{junit}");

    for shard in [1, 2] {
        let _ = sweep(&lab, RACY, &format!("--shard {shard}/2 --json shard{shard}.json"));
    }
    let merged = "sweep merge shard1.json shard2.json --junit merged.xml --tap merged.tap --report merged.html";
    lab.run(merged).expect(1);
    assert_eq!((read("merged.tap"), read("merged.xml")), (tap, junit));
    assert!(read("merged.html").contains("sweep merge shard1.json"));
}

// Catches: a wrong path that is reported only after the work, a file that is left half-written or empty.
#[test]
fn result_files_that_cannot_be_are_refused_before_the_work() {
    require_kvm!();
    let lab = Lab::new();
    for flag in ["json", "report", "junit", "tap"] {
        sweep(&lab, RACY, &format!("--{flag} none/file")).refused(2, &[&format!("--{flag} none/file"), "No such file"]);
    }
    sweep(&lab, RACY, "--json a --report a").refused(2, &["--json and --report both name a"]);
    sweep(&lab, RACY, "--point 3 --report a").refused(2, &["--report", "--trace"]);
    for flags in ["--report none/file", "--tap none/file", "--junit none/file"] {
        lab.run(flags).refused(2, &[flags, "No such file"]);
    }
    let mut guest = lab.guest("count=3", "--time virtual --summary none/file");
    finish(&mut guest).refused(2, &["--summary none/file"]);
    fs::write(lab.path("old"), "old").unwrap();
    sweep(&lab, "clockevent=none", "--report old").refused(1, &[]);
    assert_eq!(fs::read_to_string(lab.path("old")).unwrap(), "old");
    let left: Vec<_> = fs::read_dir(lab.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["old"]);
}
