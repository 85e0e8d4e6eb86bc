//! The guest kernel that `build.rs` built, embedded in this program.

/// The ELF file of the guest, as PVH loaders take it.
pub static GUEST_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));

#[cfg(test)]
mod tests {
    use guest_abi::report::{MAX_CPUS, RING_BYTES};
    use guest_abi::sites::{Kind, SITE_BYTES, Site};
    use object::{Object, ObjectSection};

    use super::GUEST_ELF;

    #[test]
    fn has_rings_of_the_agreed_size() {
        let elf = object::File::parse(GUEST_ELF).unwrap();
        let ring = elf.section_by_name(guest_abi::report::SECTION).unwrap();
        assert_eq!(ring.size(), (RING_BYTES * MAX_CPUS) as u64);
        assert_eq!(ring.address() % 64, 0);
    }

    #[test]
    fn every_trap_site_names_the_instruction_that_stands_there() {
        let elf = object::File::parse(GUEST_ELF).unwrap();
        let text = elf.section_by_name(".text").unwrap();
        let table = elf.section_by_name(guest_abi::sites::SECTION).unwrap();
        let mut kinds = std::collections::BTreeSet::new();
        let (entries, rest) = table.data().unwrap().as_chunks::<SITE_BYTES>();
        assert!(rest.is_empty());
        for bytes in entries {
            let site = Site::from_bytes(bytes);
            let kind = Kind::from_number(site.kind).unwrap();
            assert_eq!(text.data_range(site.address, 2).unwrap(), Some(&kind.original()[..]), "{site:x?}");
            kinds.insert(kind);
        }
        // Each kind is there.
        assert_eq!(kinds.len(), 3);
    }
}
