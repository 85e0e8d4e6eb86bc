use std::fs;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::{
    mem::ram::write_log,
    snapshot::{MEMORY_FILE, STATE_FILE, StateWriter, saving::Progress},
};

/// Two regions, neither a multiple of 64 pages, so that the second begins inside a word of a page set.
const REGIONS: [(u64, usize); 2] = [(0, 37), (1 << 32, 91)];
pub(in crate::snapshot) const PAGES: usize = 128;
pub(in crate::snapshot) const PAGE: usize = 4096;

pub(in crate::snapshot) fn ram() -> GuestRam {
    GuestRam::from_ranges(&REGIONS.map(|(base, pages)| (GuestAddress(base), pages * PAGE))).unwrap()
}

/// The guest address of page number `page` of a memory file.
pub(in crate::snapshot) fn address(page: usize) -> GuestAddress {
    let [(_, low), (high, _)] = REGIONS;
    let (base, inside) = if page < low { (0, page) } else { (high, page - low) };
    GuestAddress(base + u64::try_from(inside * PAGE).unwrap())
}

/// All of RAM, page by page.
pub(in crate::snapshot) fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut all = Vec::new();
    for region in ram.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        ram.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.extend(bytes);
    }
    all
}

/// Saves RAM as the snapshot `dir`: only the `changed` pages, on top of `base`, or all of it.
pub(in crate::snapshot) fn save(ram: &GuestRam, dir: &Path, base: Option<(&Path, SnapshotId, &PageSet)>) -> SnapshotId {
    fs::create_dir(dir).unwrap();
    let path = dir.join(MEMORY_FILE);
    let file = File::create_new(&path).unwrap();
    let mut writer = StateWriter::new();
    match base {
        None => {
            let layout = memory::write(&file, &path, ram, &memory::in_use(ram).unwrap(), &Progress::default()).unwrap();
            writer.section(MEMORY, MEMORY_VERSION, &layout).unwrap();
        }
        Some((base, latest, changed)) => {
            let mut base = new_base(latest, base, dir).unwrap();
            base.pages = changed.runs().map(|run| (run.start, run.len())).collect();
            let layout = memory::write(&file, &path, ram, changed, &Progress::default()).unwrap();
            writer.section(MEMORY, MEMORY_VERSION, &layout).unwrap();
            writer.section(BASE, BASE_VERSION, &base).unwrap();
        }
    }
    let bytes = writer.finish();
    fs::write(dir.join(STATE_FILE), &bytes).unwrap();
    id_of(&bytes)
}

pub(in crate::snapshot) fn open(dir: &Path) -> Result<Chain, SnapshotError> {
    let bytes = directory::read_state(dir)?;
    let mut reader = directory::parse_state(dir, &bytes)?;
    Chain::open(dir, bytes, &mut reader)
}

/// Maps and completes RAM from the chain.
fn restored(chain: &Chain) -> GuestRam {
    let ram = chain.map().unwrap();
    assert_eq!(chain.complete(&ram, u64::MAX).unwrap(), None);
    ram
}

/// Saves a chain of `count` snapshots, named by number, each with one changed page.
fn chain_of(parent: &Path, count: usize) -> (GuestRam, SnapshotId) {
    let ram = ram();
    ram.write_slice(&[1; PAGE], address(9)).unwrap();
    let mut id = save(&ram, &parent.join("0"), None);
    for number in 1..count {
        id = add(&ram, parent, number, id);
    }
    (ram, id)
}

/// Adds a snapshot to such a chain.
fn add(ram: &GuestRam, parent: &Path, number: usize, latest: SnapshotId) -> SnapshotId {
    let mut changed = PageSet::none(PAGES);
    changed.insert(number % PAGES..number % PAGES + 1);
    ram.write_slice(&[7; 8], address(number % PAGES)).unwrap();
    let base = parent.join((number - 1).to_string());
    save(ram, &parent.join(number.to_string()), Some((&base, latest, &changed)))
}

/// A write to one page.
#[derive(Clone, Debug)]
struct Write {
    page: usize,
    /// Zero makes the whole page zero.
    byte: u8,
    /// A write by the VMM, which vm-memory logs; otherwise by the guest, which KVM would log.
    by_vmm: bool,
}

fn write() -> impl Strategy<Value = Write> {
    (0..PAGES, 0..4u8, any::<bool>()).prop_map(|(page, byte, by_vmm)| Write { page, byte, by_vmm })
}

/// The VMM's writes that were logged since the last call.
fn vmm_wrote(ram: &GuestRam) -> PageSet {
    let mut pages = PageSet::none(PAGES);
    let mut first = 0;
    for region in ram.iter() {
        pages.insert_bits(first, &write_log(region).take());
        first += usize::try_from(region.len()).unwrap() / PAGE;
    }
    pages
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    // Catches: a page that is lost, taken from the wrong layer, or not made zero again; a log that is not cleared.
    #[test]
    fn a_restored_chain_is_what_ram_was(rounds in proptest::collection::vec(proptest::collection::vec(write(), 0..30), 1..7)) {
        let parent = tempfile::tempdir().unwrap();
        let dir = |number: usize| parent.path().join(number.to_string());
        let ram = ram();
        ram.iter().for_each(|region| write_log(region).begin());
        let mut latest = None;
        let mut models = Vec::new();
        for (number, writes) in rounds.iter().enumerate() {
            let mut changed = PageSet::none(PAGES);
            for Write { page, byte, by_vmm } in writes {
                let bytes = if *byte == 0 { vec![0; PAGE] } else { vec![*byte; 3] };
                if *by_vmm {
                    ram.write_slice(&bytes, address(*page)).unwrap();
                } else {
                    // A guest's write is not in vm-memory's log. So the entry that this write makes is taken out again.
                    let before = vmm_wrote(&ram);
                    ram.write_slice(&bytes, address(*page)).unwrap();
                    let _ = vmm_wrote(&ram);
                    changed.union(&before);
                    changed.insert(*page..*page + 1);
                }
            }
            changed.union(&vmm_wrote(&ram));
            let base = latest.map(|id| (dir(number - 1), id));
            let base = base.as_ref().map(|(base, id)| (base.as_path(), *id, &changed));
            latest = Some(save(&ram, &dir(number), base));
            models.push(contents(&ram));
        }
        for (number, model) in models.iter().enumerate() {
            let chain = open(&dir(number)).unwrap();
            chain.verify().unwrap();
            prop_assert_eq!(chain.links().len(), number + 1);
            let restored = restored(&chain);
            prop_assert!(&contents(&restored) == model, "snapshot {}", number);
            // A whole snapshot of the restored RAM must be the same: pages of every layer are found to be in use.
            let whole = parent.path().join(format!("whole-{number}"));
            save(&restored, &whole, None);
            prop_assert!(&contents(&open(&whole).unwrap().map().unwrap()) == model, "snapshot {} saved again", number);
        }
    }
}

#[test]
fn a_chain_has_an_end() {
    let parent = tempfile::tempdir().unwrap();
    let (ram, id) = chain_of(parent.path(), MAX_LAYERS);
    let last = parent.path().join((MAX_LAYERS - 1).to_string());
    let chain = open(&last).unwrap();
    chain.verify().unwrap();
    assert!(contents(&restored(&chain)) == contents(&ram));
    let error = new_base(id, &last, &parent.path().join("next")).unwrap_err().to_string();
    assert!(error.contains("is the last of a chain of 64 snapshots: save without a base, or merge it"), "{error}");
    // A snapshot that stores a false number of layers does not make a longer chain possible.
    let mut writer = StateWriter::new();
    let layout = MemoryLayout { pages: 0, ..chain.whole.layout.clone() };
    let base = BaseState { dir: last, id, layers: 2, pages: Vec::new() };
    writer.section(MEMORY, MEMORY_VERSION, &layout).unwrap();
    writer.section(BASE, BASE_VERSION, &base).unwrap();
    let dir = parent.path().join("liar");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(STATE_FILE), writer.finish()).unwrap();
    File::create(dir.join(MEMORY_FILE)).unwrap().set_len(layout.file_bytes().unwrap()).unwrap();
    let error = open(&dir).unwrap_err().to_string();
    assert!(error.contains("liar: a chain of more than 64 snapshots"), "{error}");
}

// Catches: a wrong number of snapshots, with which a later save would decide whether the chain is full.
#[test]
fn a_chain_counts_its_snapshots() {
    let parent = tempfile::tempdir().unwrap();
    let (_, id) = chain_of(parent.path(), 2);
    for layers in [0, 1, 2, 3, 4, 64, 65, usize::MAX] {
        let mut writer = StateWriter::new();
        let layout = open(&parent.path().join("0")).unwrap().whole.layout;
        let layout = MemoryLayout { pages: 0, ..layout };
        let base = BaseState { dir: "../1".into(), id, layers, pages: Vec::new() };
        writer.section(MEMORY, MEMORY_VERSION, &layout).unwrap();
        writer.section(BASE, BASE_VERSION, &base).unwrap();
        let dir = parent.path().join(format!("of {layers}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(STATE_FILE), writer.finish()).unwrap();
        File::create(dir.join(MEMORY_FILE)).unwrap().set_len(layout.file_bytes().unwrap()).unwrap();
        match open(&dir) {
            Ok(_) => assert_eq!(layers, 3),
            Err(error) => {
                let reason = format!("it counts {layers} snapshots in its chain, which has 3");
                assert!(layers != 3 && error.to_string().contains(&reason), "{error}");
            }
        }
    }
}

#[test]
fn a_base_that_is_missing_another_or_damaged_is_named() {
    let parent = tempfile::tempdir().unwrap();
    let path = |name: &str| parent.path().join(name);
    let (ram, id) = chain_of(parent.path(), 3);
    let refuse = || open(&path("2")).unwrap_err().to_string();

    fs::rename(path("0"), path("away")).unwrap();
    let error = refuse();
    assert!(error.contains("1 holds changes only, and its base cannot be used: snapshot: cannot open"), "{error}");
    assert!(error.contains("0/state: No such file"), "{error}");

    // A snapshot of the same RAM with another state is another snapshot: here it has one section more.
    fs::rename(path("away"), path("0")).unwrap();
    let whole = fs::read(path("0/state")).unwrap();
    fs::copy(path("1/state"), path("0/state")).unwrap();
    let error = refuse();
    assert!(error.contains("0 is not the snapshot that they were made to: it was changed, or replaced"), "{error}");
    // So no chain contains itself, because no file can contain its own hash.
    fs::copy(path("2/state"), path("1/state")).unwrap();
    assert!(refuse().contains("1 is not the snapshot that they were made to"));
    fs::write(path("0/state"), whole).unwrap();
    let error = new_base(id, &path("0"), &path("3")).map(drop).unwrap_err();
    assert!(error.to_string().contains("0 is not the latest snapshot of this VM"), "{error}");

    // An identical copy is accepted as the base again, and the chain can be moved as a whole.
    let (ram_again, _) = (ram, fs::remove_dir_all(path("1")).unwrap());
    let moved = tempfile::tempdir().unwrap();
    let (other, _) = chain_of(moved.path(), 3);
    assert!(contents(&other) == contents(&ram_again));
    let elsewhere = path("elsewhere");
    fs::rename(moved.path(), &elsewhere).unwrap();
    std::os::unix::fs::symlink(elsewhere.join("2"), path("link")).unwrap();
    assert!(contents(&restored(&open(&path("link")).unwrap())) == contents(&other));

    // Damaged or truncated memory is found in each layer.
    for name in ["0", "1", "2"] {
        let file = elsewhere.join(name).join(MEMORY_FILE);
        let before = fs::read(&file).unwrap();
        let mut damaged = before.clone();
        damaged[9 * PAGE + 100] ^= 1;
        fs::write(&file, damaged).unwrap();
        let error = open(&path("link")).unwrap().verify().unwrap_err().to_string();
        assert!(error.contains("is not what was saved"), "{name}: {error}");
        fs::write(&file, &before[..PAGE]).unwrap();
        let error = open(&path("link")).unwrap_err().to_string();
        assert!(error.contains("is truncated: 4096 bytes"), "{name}: {error}");
        fs::write(&file, before).unwrap();
    }
}

#[test]
fn impossible_lists_of_pages_are_errors() {
    for (runs, good) in [
        (&[(0, 1), (1, 2), (127, 1)][..], true),
        (&[(0, 0)], false),
        (&[(128, 1)], false),
        (&[(127, 2)], false),
        (&[(usize::MAX, 2)], false),
        (&[(5, 2), (6, 1)], false),
        (&[(5, 1), (4, 1)], false),
    ] {
        let result = own_pages(Path::new("d"), runs, PAGES);
        assert_eq!(result.is_ok(), good, "{runs:?}: {result:?}");
    }
}
