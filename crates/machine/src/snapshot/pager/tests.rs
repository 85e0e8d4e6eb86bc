use std::{
    fs,
    path::Path,
    sync::mpsc::{Sender, channel},
};

use vm_memory::Bytes;

use super::*;
use crate::{
    mem::pages::PageSet,
    snapshot::{
        MEMORY_FILE,
        chain::tests::{PAGE, PAGES, address, contents, open, ram, save},
    },
};

/// A snapshot of changes in most blocks, in the two regions and over their border, in `parent`/upper; and RAM as it was.
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

/// None, and a word about it, where the host lets nobody withhold memory.
fn start(dir: &Path, most: u64, word: Sender<String>) -> Option<(Pager, Arc<GuestRam>)> {
    let chain = Arc::new(open(dir).unwrap());
    let memory = Arc::new(chain.map().unwrap());
    let first = chain.complete(&memory, most).unwrap().unwrap();
    match Pager::start(&chain, &memory, first, Box::new(move |error| word.send(error.to_string()).unwrap())) {
        Ok(pager) => Some((pager, memory)),
        Err(error) => {
            eprintln!("skipped: no userfaultfd here: {error}");
            None
        }
    }
}

// Catches: a block that is given without a change, twice, in another region's place, or never.
#[test]
fn what_is_touched_is_there_and_what_is_not_comes_by_itself() {
    let parent = tempfile::tempdir().unwrap();
    let expected = saved(parent.path());
    for most in [0, 1, 150_000] {
        touch_and_wait(&parent.path().join("upper"), most, &expected);
    }
}

fn touch_and_wait(dir: &Path, most: u64, expected: &[u8]) {
    let (word, said) = channel();
    let Some((pager, memory)) = start(dir, most, word) else { return };
    // The last first: nobody has given it yet, or it waits a moment.
    let mut page = [0; PAGE];
    for number in (0..PAGES).rev().step_by(7) {
        memory.read_slice(&mut page, address(number)).unwrap();
        assert_eq!(page, expected[number * PAGE..][..PAGE], "page {number}");
    }
    memory.write_slice(&[0xee; PAGE], address(1)).unwrap();
    pager.finish().unwrap();
    memory.read_slice(&mut page, address(1)).unwrap();
    assert_eq!(page, [0xee; PAGE], "a block was given again, over what was written");
    memory.write_slice(&expected[PAGE..][..PAGE], address(1)).unwrap();
    assert!(contents(&memory) == expected);
    pager.check().unwrap();
    drop(pager);
    assert!(said.recv().is_err(), "a last word without need");
    assert!(contents(&memory) == expected);
}

#[test]
fn damage_in_any_layer_is_told_once_and_undamaged_blocks_are_given() {
    for (name, page) in [("whole", 90), ("lower", 100), ("upper", 127)] {
        let parent = tempfile::tempdir().unwrap();
        let expected = saved(parent.path());
        let file = parent.path().join(name).join(MEMORY_FILE);
        let mut bytes = fs::read(&file).unwrap();
        bytes[page * PAGE + 9] ^= 4;
        fs::write(&file, bytes).unwrap();
        let (word, said) = channel();
        let Some((pager, memory)) = start(&parent.path().join("upper"), 65_536, word) else { return };
        let mut first = [0; PAGE];
        memory.read_slice(&mut first, address(2)).unwrap();
        assert_eq!(first, expected[2 * PAGE..][..PAGE]);
        let (alarm, alarmed) = channel();
        pager.on_damage(move || alarm.send(()).unwrap());
        let error = pager.finish().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("is not what was saved"), "{name}: {error}");
        alarmed.recv().unwrap();
        pager.check().unwrap();
        drop(pager);
        // The one who heard it says it.
        assert!(said.recv().is_err(), "{name}");
    }
}

// Catches: damage that is found before anybody who could end the VM in good order is there to hear it.
#[test]
fn damage_that_nobody_can_hear_is_the_last_word() {
    let parent = tempfile::tempdir().unwrap();
    saved(parent.path());
    let file = parent.path().join("whole").join(MEMORY_FILE);
    let mut bytes = fs::read(&file).unwrap();
    bytes[0] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (word, said) = channel();
    let Some((pager, _memory)) = start(&parent.path().join("whole"), 0, word) else { return };
    assert!(said.recv().unwrap().contains("whole/memory is not what was saved"));
    drop(pager);
}
