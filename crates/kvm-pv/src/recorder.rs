//! Guest memory that remembers every store, and a check of what a reader could have seen between them.

use std::cell::RefCell;

use crate::memory::{GuestWrite, OutsideRam};

/// RAM from address 0.
pub(super) struct Recorder {
    ram: RefCell<Vec<u8>>,
    stores: RefCell<Vec<(u64, Vec<u8>)>>,
}

impl Recorder {
    pub(super) fn new(bytes: usize) -> Self {
        Self { ram: RefCell::new(vec![0; bytes]), stores: RefCell::default() }
    }

    pub(super) fn stores(&self) -> usize {
        self.stores.borrow().len()
    }

    /// Every store so far: address and bytes.
    pub(super) fn stores_since_start(&self) -> Vec<(u64, Vec<u8>)> {
        self.stores.borrow().clone()
    }

    fn range(&self, addr: u64, bytes: usize) -> Result<core::ops::Range<usize>, OutsideRam> {
        let start = usize::try_from(addr).unwrap();
        let end = start.checked_add(bytes).filter(|&end| end <= self.ram.borrow().len());
        end.map(|end| start..end).ok_or(OutsideRam { addr, bytes })
    }

    /// Replays the stores to the structure at `addr` and says what was wrong: the version torn, contents changed under
    /// an even version, a version that was shown before, or an odd version left at the end.
    pub(super) fn check_seqlock(&self, addr: u64, bytes: usize) -> Result<(), String> {
        check(addr, bytes, &self.stores.borrow())
    }
}

fn check(addr: u64, bytes: usize, stores: &[(u64, Vec<u8>)]) -> Result<(), String> {
    let end = addr + bytes as u64;
    let (mut version, mut shown) = (0, vec![]);
    for (at, data) in stores.iter().filter(|(at, data)| *at < end && at + data.len() as u64 > addr) {
        if *at == addr && data.len() == 4 {
            version = u32::from_le_bytes(data[..].try_into().unwrap());
            if version % 2 == 0 && shown.contains(&version) {
                return Err(format!("version {version} came twice"));
            }
            shown.push(version);
        } else if *at < addr + 4 {
            return Err(format!("the version was written by a store of {} bytes at {at:#x}", data.len()));
        } else if version % 2 == 0 {
            return Err(format!("contents were written under the even version {version}"));
        }
    }
    if version % 2 == 0 { Ok(()) } else { Err(format!("the odd version {version} was left")) }
}

impl GuestWrite for Recorder {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let range = self.range(addr, bytes.len())?;
        self.ram.borrow_mut()[range].copy_from_slice(bytes);
        self.stores.borrow_mut().push((addr, bytes.to_vec()));
        Ok(())
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), OutsideRam> {
        let range = self.range(addr, bytes.len())?;
        bytes.copy_from_slice(&self.ram.borrow()[range]);
        Ok(())
    }
}

/// The check itself must notice: each wrong order that a writer could have.
#[test]
fn the_check_catches_wrong_orders() {
    let (odd, even, body) = ((0, vec![1, 0, 0, 0]), (0, vec![2, 0, 0, 0]), (4, vec![9; 28]));
    let judge = |stores: &[_]| check(0, 32, stores);
    assert_eq!(judge(&[odd.clone(), body.clone(), even.clone()]), Ok(()));
    for wrong in [
        vec![body.clone(), odd.clone(), even.clone()],
        vec![odd.clone(), even.clone(), body.clone()],
        vec![even.clone(), body.clone()],
        vec![odd.clone(), body.clone()],
        vec![odd.clone(), body.clone(), even.clone(), odd.clone(), body.clone(), even.clone()],
        vec![(0, vec![1; 32])],
        vec![odd.clone(), body, (0, vec![2, 0])],
    ] {
        judge(&wrong).unwrap_err();
    }
}
