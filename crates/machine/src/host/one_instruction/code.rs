//! A page of code that the process writes for itself, one for each thread.
//!
//! It is never both writable and executable. What was written once is kept until the page is full, so that the page is
//! seldom made writable.

use std::{cell::RefCell, io, ptr::NonNull};

/// The longest instruction.
const INSTRUCTION_MAX: usize = 15;
/// INT3, behind the code: never executed.
const FILL: u8 = 0xcc;
const RET: u8 = 0xc3;
const PAGE: usize = 4096;
/// An instruction and a RET.
const SLOT: usize = 32;

/// The bytes of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Code {
    bytes: [u8; INSTRUCTION_MAX],
    length: usize,
}

impl Code {
    /// None if there are too many for an instruction.
    pub(super) fn new(instruction: &[u8]) -> Option<Self> {
        let (mut bytes, length) = ([0; INSTRUCTION_MAX], instruction.len());
        bytes.get_mut(..length)?.copy_from_slice(instruction);
        Some(Self { bytes, length })
    }
}

/// An executable page.
struct Page {
    at: NonNull<u8>,
    /// The instructions in its slots.
    written: Vec<Code>,
}

thread_local! {
    static CODE: RefCell<Option<Page>> = const { RefCell::new(None) };
}

/// Calls `run` with the address of `instruction`, which is followed by a RET. None if the operating system does not let
/// the process make code, which is logged.
pub(super) fn with_code<R>(instruction: &Code, run: impl FnOnce(*const u8) -> R) -> Option<R> {
    CODE.with_borrow_mut(|page| {
        let code = (|| {
            let page = match page {
                Some(page) => page,
                None => page.insert(Page::new()?),
            };
            page.code(instruction)
        })();
        match code {
            Ok(code) => Some(run(code)),
            Err(error) => {
                log::warn!("this host does not let vmm make code for an instruction: {error}");
                None
            }
        }
    })
}

impl Page {
    fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping anywhere, which replaces none.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ, flags, -1, 0) };
        let mapped = if at == libc::MAP_FAILED { None } else { NonNull::new(at.cast()) };
        Ok(Self { at: mapped.ok_or_else(io::Error::last_os_error)?, written: Vec::new() })
    }

    /// The address of `instruction`'s code, which is written first if it is not there.
    fn code(&mut self, instruction: &Code) -> io::Result<*mut u8> {
        let slot = match self.written.iter().position(|written| written == instruction) {
            Some(slot) => slot,
            None => self.write(instruction)?,
        };
        Ok(self.slot(slot))
    }

    /// The address of slot number `slot`, which is below `PAGE / SLOT`.
    fn slot(&self, slot: usize) -> *mut u8 {
        self.at.as_ptr().wrapping_add(slot * SLOT)
    }

    fn write(&mut self, instruction: &Code) -> io::Result<usize> {
        if self.written.len() == PAGE / SLOT {
            self.written.clear();
        }
        let slot = self.written.len();
        let Code { bytes, length } = instruction;
        let mut code = [FILL; SLOT];
        for (to, from) in code.iter_mut().zip(bytes.iter().take(*length).chain(&[RET])) {
            *to = *from;
        }
        self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the page is writable, is this object's, and has room for the slot; no code in it is being executed,
        // because only this thread does that, and it is here.
        unsafe { self.slot(slot).copy_from_nonoverlapping(code.as_ptr(), SLOT) };
        self.protect(libc::PROT_READ | libc::PROT_EXEC)?;
        self.written.push(*instruction);
        Ok(slot)
    }

    fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: the mapping is this object's, and of this size.
        match unsafe { libc::mprotect(self.at.as_ptr().cast(), PAGE, protection) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's, and of this size; no pointer into it is left.
        unsafe { libc::munmap(self.at.as_ptr().cast(), PAGE) };
    }
}
