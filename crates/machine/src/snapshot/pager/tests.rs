use std::{
    fs,
    path::Path,
    sync::mpsc::{Sender, channel},
};

use vm_memory::Bytes;

use vm_tests::require;

use super::*;
use crate::{
    mem::pages::PageSet,
    snapshot::{
        MEMORY_FILE,
        chain::tests::{PAGE, PAGES, address, contents, open, ram, save},
    },
};

/// Saves a chain of three snapshots, the newest in `parent`/upper, with changes in most blocks, in both regions and
/// across their border. Returns RAM as it was.
fn saved(parent: &Path) -> Vec<u8> {
    let ram = ram();
    for page in 0..PAGES {
        ram.write_slice(&[u8::try_from(page).unwrap() | 1; PAGE], address(page)).unwrap();
    }
    let mut latest = save(&ram, &parent.join("whole"), None);
    for (name, base, pages) in [("lower", "whole", [5, 36, 37, 100]), ("upper", "lower", [5, 40, 101, 127])] {
        let mut changed = PageSet::none(PAGES);
        for page in pages {
            ram.write_slice(name.as_bytes(), address(page)).unwrap();
            changed.insert(page..page + 1);
        }
        // A page that became zero is among the changes.
        ram.write_slice(&[0; PAGE], address(pages[3])).unwrap();
        latest = save(&ram, &parent.join(name), Some((&parent.join(base), latest, &changed)));
    }
    contents(&ram)
}

/// Starts a pager. The error is the reason to skip the test: the host has no usable userfaultfd.
fn start(dir: &Path, most: u64, exited: Sender<String>) -> Result<(Pager, Arc<GuestRam>), String> {
    let chain = Arc::new(open(dir).unwrap());
    let memory = Arc::new(chain.map().unwrap());
    let first = chain.complete(&memory, most).unwrap().unwrap();
    let pager = Pager::start(&chain, &memory, first, Box::new(move |error| exited.send(error.to_string()).unwrap()));
    pager.map(|pager| (pager, memory)).map_err(|error| format!("no userfaultfd here: {error}"))
}

// Catches: a block that is mapped without a change, twice, in another region's place, or never.
#[test]
fn every_block_is_mapped_once_accessed_or_not() {
    let parent = tempfile::tempdir().unwrap();
    let expected = saved(parent.path());
    for most in [0, 1, 150_000] {
        access_and_wait(&parent.path().join("upper"), most, &expected);
    }
}

fn access_and_wait(dir: &Path, most: u64, expected: &[u8]) {
    let (exited, exit) = channel();
    let (pager, memory) = require!(start(dir, most, exited));
    // From the last on, because the pager maps from the first on: most of these accesses wait.
    let mut page = [0; PAGE];
    for number in (0..PAGES).rev().step_by(7) {
        memory.read_slice(&mut page, address(number)).unwrap();
        assert_eq!(page, expected[number * PAGE..][..PAGE], "page {number}");
    }
    memory.write_slice(&[0xee; PAGE], address(1)).unwrap();
    pager.finish().unwrap();
    memory.read_slice(&mut page, address(1)).unwrap();
    assert_eq!(page, [0xee; PAGE], "a block was mapped again, over what was written");
    memory.write_slice(&expected[PAGE..][..PAGE], address(1)).unwrap();
    assert!(contents(&memory) == expected);
    pager.check().unwrap();
    drop(pager);
    assert!(exit.recv().is_err(), "an exit without damage");
    assert!(contents(&memory) == expected);
}

#[test]
fn damage_in_any_layer_is_reported_once_and_undamaged_blocks_are_mapped() {
    for (name, page) in [("whole", 90), ("lower", 100), ("upper", 127)] {
        let parent = tempfile::tempdir().unwrap();
        let expected = saved(parent.path());
        let file = parent.path().join(name).join(MEMORY_FILE);
        let mut bytes = fs::read(&file).unwrap();
        bytes[page * PAGE + 9] ^= 4;
        fs::write(&file, bytes).unwrap();
        let (exited, exit) = channel();
        let (pager, memory) = require!(start(&parent.path().join("upper"), 65_536, exited));
        let mut first = [0; PAGE];
        memory.read_slice(&mut first, address(2)).unwrap();
        assert_eq!(first, expected[2 * PAGE..][..PAGE]);
        let (damaged, damage) = channel();
        pager.on_damage(move || damaged.send(()).unwrap());
        let error = pager.finish().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("is not what was saved"), "{name}: {error}");
        damage.recv().unwrap();
        pager.check().unwrap();
        drop(pager);
        // `finish` has returned the damage, so the pager does not end the process.
        assert!(exit.recv().is_err(), "{name}");
    }
}

// Catches: damage that is found before a callback is set, which could end the VM in good order.
#[test]
fn damage_before_there_is_a_callback_ends_the_process() {
    let parent = tempfile::tempdir().unwrap();
    saved(parent.path());
    let file = parent.path().join("whole").join(MEMORY_FILE);
    let mut bytes = fs::read(&file).unwrap();
    bytes[0] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (exited, exit) = channel();
    let (pager, _memory) = require!(start(&parent.path().join("whole"), 0, exited));
    assert!(exit.recv().unwrap().contains("whole/memory is not what was saved"));
    drop(pager);
}
