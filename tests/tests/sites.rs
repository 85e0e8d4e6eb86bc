//! `vmm sites` and `--sites`: trap sites of a guest that lists none.

use std::{collections::BTreeSet, fs};

use guest_abi::sites::{Kind, SECTION, SITE_BYTES, Site};
use object::{LittleEndian, Object, ObjectSection, read::elf::ElfFile64};
use serde_json::Value;
use vm_tests::{Lab, guest, guest_without, require_kvm};

/// The addresses of one kind in what `vmm sites -o -` wrote.
fn found(list: &Value, kind: &str) -> BTreeSet<u64> {
    let sites = list["sites"].as_array().unwrap().iter().filter(|site| site["kind"] == kind);
    let address = |site: &Value| u64::from_str_radix(site["address"].as_str().unwrap().trim_start_matches("0x"), 16);
    sites.map(|site| address(site).unwrap()).collect()
}

/// The addresses of one kind in the table that the guest has, which the assembler wrote.
fn listed(kind: Kind) -> BTreeSet<u64> {
    let bytes = fs::read(guest()).unwrap();
    let elf = ElfFile64::<LittleEndian>::parse(bytes.as_slice()).unwrap();
    let table = elf.section_by_name(SECTION).unwrap().data().unwrap();
    let (entries, _) = table.as_chunks::<SITE_BYTES>();
    entries.iter().map(Site::from_bytes).filter(|site| site.kind == kind as u32).map(|site| site.address).collect()
}

// Catches: a site that is missed, or bytes that are taken for one. The guest's own table is the other account.
#[test]
fn what_is_found_is_what_the_guest_lists() {
    let lab = Lab::new();
    fs::write(lab.path("plain"), guest_without(SECTION)).unwrap();
    let list: Value = serde_json::from_str(&lab.run("sites plain -o -").expect(0).stdout).unwrap();
    assert_eq!(found(&list, "rdtsc"), listed(Kind::Rdtsc));
    assert_eq!(found(&list, "deadline-wrmsr"), listed(Kind::DeadlineWrmsr));
    // It does not list a PAUSE that no other CPU waits for.
    assert!(found(&list, "pause").is_superset(&listed(Kind::Pause)) && !listed(Kind::Pause).is_empty());
    let table = lab.run("sites plain").expect(0).stdout;
    let counts = format!("trap sites: {} RDTSC, ", listed(Kind::Rdtsc).len());
    assert!(table.contains(&counts), "{table}");
}

// Catches: found sites that make the guest run otherwise than listed ones, at the start or after a restore, which has
// them from the snapshot alone.
#[test]
fn a_guest_runs_the_same_with_found_sites() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("plain"), guest_without(SECTION)).unwrap();
    let _ = lab.run("sites plain -o list").expect(0);
    let listed = guest().display().to_string();
    let images = [(listed.as_str(), ""), ("plain", "--sites auto"), ("plain", "--sites list")];
    let runs = images.map(|(image, sites)| {
        let run = |flags: &str| {
            let _ = lab.run(&format!("{flags} --trace trace --tsc-khz 1300000")).expect(0);
            fs::read(lab.path("trace")).unwrap()
        };
        let _ = lab
            .run(&format!(
                "--guest {image} {sites} --time virtual --tsc-khz 2600000 --cmdline count=20 --save-at 95ms --save-to saved"
            ))
            .expect(0);
        let trace = run("restore saved");
        fs::remove_dir_all(lab.path("saved")).unwrap();
        trace
    });
    assert!(runs[0].len() > 1000 && runs[0] == runs[1] && runs[0] == runs[2], "{:?}", runs.map(|run| run.len()));
}

// Catches: a list for another kernel patched into this one; a bad file or a guest without an RDTSC without a reason.
#[test]
fn sites_that_cannot_be_used_are_refused() {
    let lab = Lab::new();
    fs::write(lab.path("plain"), guest_without(SECTION)).unwrap();
    let _ = lab.run("sites plain -o list").expect(0);
    let listed = guest().display().to_string();
    lab.run(&format!("--guest {listed} --sites list")).refused(2, &["--sites list", "made for an image", "vmm sites"]);
    lab.run("--guest plain --sites absent").refused(2, &["--sites absent", "No such file"]);
    lab.run("--guest plain --sites plain").refused(2, &["--sites plain", "not a list of trap sites"]);
    lab.run("sites list").refused(2, &["list"]);
    lab.run("--sites auto").refused(2, &["required arguments"]);
}
