use std::os::unix::fs::MetadataExt;

use vm_memory::Bytes;

use super::{layout::block_bytes, *};

const MIB: u64 = 1 << 20;

/// 2 MiB at 0 and 1 MiB above the hole, with a few pages in use, among them the first and the last.
fn ram() -> GuestRam {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20), (GuestAddress(1 << 32), 1 << 20)]).unwrap();
    for at in [0, 0x1000, 0x80_0ff, 2 * MIB - 1, 1 << 32, (1 << 32) + MIB - 1] {
        ram.write_slice(&[0xa5], GuestAddress(at)).unwrap();
    }
    ram
}

fn write_all(file: &File, path: &Path, memory: &GuestRam) -> Result<MemoryLayout, MemoryError> {
    write(file, path, memory, &in_use(memory)?, &Progress::default())
}

struct Saved {
    dir: tempfile::TempDir,
    layout: MemoryLayout,
}

impl Saved {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(dir.path().join("memory")).unwrap();
        let layout = write_all(&file, &dir.path().join("memory"), &ram()).unwrap();
        Self { dir, layout }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("memory")
    }

    fn open(&self) -> File {
        File::options().read(true).write(true).open(self.path()).unwrap()
    }

    fn map(&self) -> Result<GuestRam, MemoryError> {
        let file = Arc::new(File::open(self.path()).unwrap());
        verify(&file, &self.path(), &self.layout)?;
        map(&file, &self.path(), &self.layout)
    }
}

fn contents(memory: &GuestRam) -> Vec<(u64, Vec<u8>)> {
    let read = |region: &RamRegion| {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        region.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        (region.start_addr().0, bytes)
    };
    memory.iter().map(read).collect()
}

#[test]
fn round_trip() {
    let saved = Saved::new();
    assert_eq!(saved.layout.pages, 6);
    let restored = saved.map().unwrap();
    assert!(contents(&restored) == contents(&ram()));
    // A layout is the same after it was encoded and decoded.
    let json = serde_json::to_string(&saved.layout).unwrap();
    assert_eq!(serde_json::from_str::<MemoryLayout>(&json).unwrap(), saved.layout);
}

#[test]
fn writes_of_the_restored_guest_do_not_reach_the_file() {
    let saved = Saved::new();
    let restored = saved.map().unwrap();
    restored.write_slice(&[1, 2, 3], GuestAddress(0x5000)).unwrap();
    verify(&saved.open(), &saved.path(), &saved.layout).unwrap();
}

#[test]
fn only_pages_in_use_take_space() {
    let saved = Saved::new();
    let meta = saved.open().metadata().unwrap();
    assert_eq!(meta.len(), 3 * MIB);
    // On a file system without holes nothing can be checked. With holes, 6 pages are far below a MiB.
    if lseek(saved.open(), 0x2000, Whence::SeekHole).unwrap() < 0x80_000 {
        assert!(meta.blocks() * 512 < MIB, "{} blocks", meta.blocks());
    }
}

#[test]
fn a_copy_without_holes_is_the_same_snapshot() {
    let saved = Saved::new();
    let dense = std::fs::read(saved.path()).unwrap();
    std::fs::remove_file(saved.path()).unwrap();
    std::fs::write(saved.path(), dense).unwrap();
    assert!(contents(&saved.map().unwrap()) == contents(&ram()));
}

#[test]
fn a_truncated_file_says_what_is_missing() {
    let saved = Saved::new();
    for length in [0, 1, 3 * MIB - 4096, 3 * MIB - 1] {
        saved.open().set_len(length).unwrap();
        let error = saved.map().unwrap_err().to_string();
        assert!(error.contains(&format!("is truncated: {length} bytes, expected {}", 3 * MIB)), "{error}");
    }
}

#[test]
fn a_longer_file_is_an_error() {
    let saved = Saved::new();
    saved.open().set_len(3 * MIB + 1).unwrap();
    assert!(matches!(saved.map(), Err(MemoryError::TooLong { .. })));
}

#[test]
fn an_edited_byte_is_found_in_data_and_in_holes() {
    for (at, byte) in [(0, 0xa4), (0, 0), (0x40_0000 - 0x30_0000 + 5, 1), (3 * MIB - 1, 0), (0x3000, 0x80)] {
        let saved = Saved::new();
        saved.open().write_all_at(&[byte], at).unwrap();
        let error = saved.map().unwrap_err().to_string();
        assert!(error.contains("checksum differs: the file was changed or damaged"), "{at:#x}: {error}");
    }
}

#[test]
fn pages_that_changed_places_are_found() {
    let saved = Saved::new();
    // The page at 0 has the same bytes as the one at 0x10000 then has: only the index in the checksum differs.
    let mut page = [0; PAGE_BYTES];
    saved.open().read_exact_at(&mut page, 0).unwrap();
    saved.open().write_all_at(&ZERO_PAGE, 0).unwrap();
    saved.open().write_all_at(&page, 0x1_0000).unwrap();
    assert!(matches!(saved.map(), Err(MemoryError::Damaged { .. })));
}

#[test]
fn hostile_layouts_are_errors() {
    let region = |guest_base, bytes, file_offset| RegionLayout { guest_base, bytes, file_offset };
    let impossible: &[&[RegionLayout]] = &[
        &[],
        &[region(0, 0, 0)],
        &[region(0, 4095, 0)],
        &[region(1, 4096, 0)],
        &[region(0, 4096, 4096)],
        &[region(0, 8192, 0), region(4096, 4096, 8192)],
        &[region(8192, 4096, 0), region(0, 4096, 4096)],
        &[region(0, 4096, 0), region(8192, 4096, 0)],
        &[region(u64::MAX - 4095, 4096, 0)],
        &[region(4096, u64::MAX - 4095, 0)],
        &[region(GUEST_ADDRESS_END, 4096, 0)],
        &[region(0, 4096, 0); MAX_REGIONS + 1],
    ];
    let saved = Saved::new();
    for regions in impossible {
        let layout = MemoryLayout { regions: regions.to_vec(), ..saved.layout.clone() };
        let result = map(&Arc::new(saved.open()), &saved.path(), &layout);
        assert!(matches!(result, Err(MemoryError::Layout { .. })), "{regions:?}: {result:?}");
    }
    // Possible, but far more than the file: found before anything is mapped.
    let large = 1 << 40;
    let larger = Blocks { bytes: 1 << 26, ..saved.layout.blocks.clone() };
    let blocks = MemoryLayout { blocks: larger, ..saved.layout.clone() };
    assert_eq!(
        MemoryLayout { regions: vec![region(0, large, 0)], ..blocks.clone() }.file_bytes().ok(),
        None,
        "over devices"
    );
    let layout = MemoryLayout { regions: vec![region(1 << 32, large, 0)], ..blocks };
    let result = map(&Arc::new(saved.open()), &saved.path(), &layout);
    assert!(matches!(result, Err(MemoryError::Truncated { .. })), "{result:?}");
}

// Catches: RAM where a VM has its local APICs, or where Intel CPUs need pages for the guest's real mode.
#[test]
fn ram_over_the_local_apics_is_refused() {
    let layout = |guest_base, bytes| MemoryLayout {
        regions: vec![RegionLayout { guest_base, bytes, file_offset: 0 }],
        ..MemoryLayout::of(&ram())
    };
    for (guest_base, bytes) in [(0xfee0_0000, 4096), (0xfedf_f000, 8192), (0xfffb_c000, 4096), (0, 1 << 32)] {
        let error = layout(guest_base, bytes).file_bytes().unwrap_err().to_string();
        assert!(error.contains("where the local APICs are"), "{guest_base:#x}: {error}");
    }
    assert!(layout(0xfedf_f000, 4096).file_bytes().is_ok());
    assert!(layout(1 << 32, 4096).file_bytes().is_ok());
}

#[test]
fn hostile_blocks_are_errors() {
    let good = Saved::new().layout;
    assert_eq!(good.file_bytes().unwrap(), 3 * MIB);
    assert_eq!(good.blocks.sums.iter().map(|(block, _)| *block).collect::<Vec<_>>(), [0, 8, 31, 32, 47]);
    let with = |bytes, sums: &[(u64, u32)]| {
        let blocks = Blocks { bytes, sums: sums.to_vec(), ..good.blocks };
        MemoryLayout { blocks, ..good.clone() }
    };
    for bad in [
        with(0, &[]),
        with(4096, &[]),
        with(65_537, &[]),
        with(65_536, &[(48, 1)]),
        with(65_536, &[(1, 1), (1, 1)]),
        with(65_536, &[(2, 1), (1, 1)]),
        with(u64::MAX, &[]),
    ] {
        assert!(matches!(bad.file_bytes(), Err(MemoryError::Layout { .. })), "{bad:?}");
    }
}

// Catches: a block that passes although another page of it, a page of zeros or a page of another block changed.
#[test]
fn each_block_is_checked_separately() {
    let saved = Saved::new();
    let check = |block: u64| {
        let (mut buffer, first) = (Vec::new(), usize::try_from(block * 16).unwrap());
        let pages = first..first + 16;
        read_block(&saved.open(), &saved.path(), &saved.layout, block, &[pages], &mut buffer).map(|()| buffer.len())
    };
    for block in 0..48 {
        assert_eq!(check(block).unwrap(), 65_536, "{block}");
    }
    for (at, byte, damaged) in [(0x80_000 + 5, 1, 8), (0x9_0000, 7, 9), (3 * MIB - 1, 0, 47)] {
        saved.open().write_all_at(&[byte], at).unwrap();
        for block in 0..48 {
            assert_eq!(check(block).is_err(), block == damaged, "{block} of {damaged}");
        }
        let undo = if damaged == 47 { 0xa5 } else { 0 };
        saved.open().write_all_at(&[undo], at).unwrap();
    }
    saved.open().set_len(MIB).unwrap();
    assert!(matches!(check(20), Err(MemoryError::Truncated { .. })));
}

// Catches: a part that is reported as checked and is not; one block too many or too few.
#[test]
fn a_check_in_place_ends_at_the_end_of_a_block() {
    let check = |saved: &Saved, most| {
        let memory = map(&Arc::new(saved.open()), &saved.path(), &saved.layout)?;
        check_mapped(&memory, &saved.open(), &saved.path(), &saved.layout, most)
    };
    let saved = Saved::new();
    for (most, rest) in [(0, Some(0)), (1, Some(8)), (2 * PAGE, Some(8)), (2 * PAGE + 1, Some(31)), (1 << 20, None)] {
        assert_eq!(check(&saved, most).unwrap(), rest, "{most}");
    }
    // Damage in block 31, and in a hole before it.
    saved.open().write_all_at(&[1], 2 * MIB - 1).unwrap();
    assert!(check(&saved, u64::MAX).is_err());
    assert_eq!(check(&saved, 2 * PAGE + 1).unwrap(), Some(31));
    saved.open().write_all_at(&[1], MIB).unwrap();
    assert!(check(&saved, 5 * PAGE).is_err());
}

// Catches: a file that was edited together with its checksum, and is refused because of its blocks' old checksums, or
// is not checked at all.
#[test]
fn blocks_of_another_checksum_are_not_used() {
    let saved = Saved::new();
    saved.open().write_all_at(&[7], 0x9_0000).unwrap();
    let path = saved.path();
    let ram = map(&Arc::new(saved.open()), &path, &saved.layout).unwrap();
    let MemoryLayout { pages, checksum, .. } = write_all(&tempfile::tempfile().unwrap(), &path, &ram).unwrap();
    let layout = MemoryLayout { pages, checksum, ..saved.layout.clone() };
    assert!(saved.layout.has_blocks() && !layout.has_blocks());
    verify(&saved.open(), &path, &layout).unwrap();
    assert!(matches!(verify(&saved.open(), &path, &saved.layout), Err(MemoryError::Damaged { .. })));
    saved.open().write_all_at(&[8], 0x9_0000).unwrap();
    assert!(matches!(verify(&saved.open(), &path, &layout), Err(MemoryError::Damaged { .. })));
}

// Catches: a number of block checksums that grows with RAM.
#[test]
fn larger_files_have_larger_blocks() {
    for (mib, block) in [(1, 1 << 16), (1024, 1 << 16), (1025, 1 << 17), (4096, 1 << 18), (1 << 20, 1 << 26)] {
        let region = RegionLayout { guest_base: 1 << 32, bytes: mib * MIB, file_offset: 0 };
        assert_eq!(block_bytes(region.bytes), block, "{mib} MiB");
        let blocks = Blocks { bytes: block, of: 0, sums: Vec::new() };
        let layout = MemoryLayout { regions: vec![region], pages: 0, checksum: 0, blocks };
        assert_eq!(layout.file_bytes().unwrap(), mib * MIB);
    }
}

#[test]
fn ram_that_is_not_whole_pages_is_not_saved() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 5000)]).unwrap();
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(write_all(&file, Path::new("memory"), &ram), Err(MemoryError::Layout { .. })));
}

#[test]
fn an_unwritable_file_is_an_error_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    std::fs::write(&path, b"").unwrap();
    let error = write_all(&File::open(&path).unwrap(), &path, &ram()).unwrap_err().to_string();
    assert!(error.contains("memory: cannot write"), "{error}");
}

/// Writes RAM with the pages that `pagemap` lists. Returns the file's bytes, its layout, and how many pages were
/// listed.
fn written(ram: &GuestRam, pagemap: &str) -> (Vec<u8>, MemoryLayout, usize) {
    let file = tempfile::tempfile().unwrap();
    let pages = touched::pages(ram, &MemoryLayout::of(ram), Path::new(pagemap)).unwrap();
    let layout = write(&file, Path::new("memory"), ram, &pages, &Progress::default()).unwrap();
    let mut bytes = vec![0; usize::try_from(3 * MIB).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    (bytes, layout, pages.count())
}

// Catches: a written page that is found neither in the pagemap nor in the restored file; and a search that finds every
// page.
#[test]
fn pages_in_use_are_all_that_are_not_zero_also_without_a_pagemap() {
    let saved = Saved::new();
    let restored = saved.map().unwrap();
    // Writes to a page of the file and to a hole, zeros over a page of the file, and a read, which writes nothing.
    restored.write_slice(&[7], GuestAddress(0x1000)).unwrap();
    restored.write_slice(&[8], GuestAddress((1 << 32) + 0x5000)).unwrap();
    restored.write_slice(&ZERO_PAGE, GuestAddress(0)).unwrap();
    let _: u8 = restored.read_obj(GuestAddress(0x4_0000)).unwrap();
    for (ram, count) in [(ram(), 6), (restored, 6)] {
        let (bytes, layout, found) = written(&ram, touched::PAGEMAP);
        let (all_bytes, all_layout, all) = written(&ram, "/nonexistent");
        assert_eq!(all, 768);
        // Huge pages, or a file system with larger blocks, can make it more than the pages in use.
        assert!((6..600).contains(&found), "{found} pages");
        assert_eq!((layout.pages, &layout), (count, &all_layout));
        assert!(bytes == all_bytes);
        assert!(bytes == contents(&ram).into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>());
    }
}
