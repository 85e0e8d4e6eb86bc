//! Finds an address in the guest's program: function, instruction, source line. Reads nothing but the ELF file.

use std::sync::Arc;

use addr2line::Context;
use gimli::{Dwarf, EndianReader, RunTimeEndian, SectionId};
use machine::{INSTRUCTION_MAX, vcpu::disassembly::disassemble};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind};

use super::{SweepError, result::Code};

/// Debug information. The `Arc` lets a reader own its section data.
type Reader = EndianReader<RunTimeEndian, Arc<[u8]>>;

/// Where the embedded guest's build puts the workspace in its source paths.
const WORKSPACE: &str = "/vmm/";
/// Where the compiler puts the standard library in source paths. Such lines are skipped: the caller's line is of use.
const STANDARD_LIBRARY: &str = "/rustc/";

/// A function.
#[derive(Clone, Debug)]
struct Symbol {
    address: u64,
    size: u64,
    name: String,
}

/// A guest's program.
pub(super) struct Program {
    /// Sorted by address.
    symbols: Vec<Symbol>,
    /// Address and bytes of each segment that is loaded.
    segments: Vec<(u64, Vec<u8>)>,
    lines: Option<Context<Reader>>,
}

impl Program {
    /// Reads an ELF file; a file without symbols or debug information has addresses only.
    pub(super) fn read(file: &[u8]) -> Self {
        let Ok(elf) = object::File::parse(file) else {
            return Self { symbols: Vec::new(), segments: Vec::new(), lines: None };
        };
        let mut symbols: Vec<Symbol> = elf
            .symbols()
            // Labels of assembly code have no type.
            .filter(|symbol| {
                symbol.is_definition()
                    && matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Label | SymbolKind::Unknown)
            })
            .filter_map(|symbol| {
                let name = symbol.name().ok().filter(|name| !name.is_empty())?;
                // Without the hash that Rust appends: two builds then have the same names.
                let name = format!("{:#}", rustc_demangle::demangle(name));
                Some(Symbol { address: symbol.address(), size: symbol.size(), name })
            })
            .collect();
        symbols.sort_by(|a, b| (a.address, a.size, &a.name).cmp(&(b.address, b.size, &b.name)));
        let segments = elf.segments().filter_map(|s| Some((s.address(), s.data().ok()?.to_vec()))).collect();
        Self { symbols, segments, lines: lines(&elf) }
    }

    /// The instruction at `address`.
    pub(super) fn at(&self, address: u64) -> Code {
        let bytes = self.bytes(address);
        let (length, instruction) = disassemble(bytes, address, 64);
        Code {
            address,
            symbol: self.symbol(address),
            bytes: hex::encode(bytes.get(..length).unwrap_or_default()),
            instruction,
            source: self.source(address),
        }
    }

    /// The name of the instruction at `address`.
    pub(super) fn mnemonic(&self, address: u64) -> String {
        let (_, text) = disassemble(self.bytes(address), address, 64);
        text.split_whitespace().next().unwrap_or_default().to_owned()
    }

    /// The address of the one function that `name` means: its whole name, or the end of it after a `::`.
    ///
    /// # Errors
    /// If none or several have that name.
    pub(super) fn address_of(&self, name: &str) -> Result<u64, SweepError> {
        let end = format!("::{name}");
        let exact = || self.symbols.iter().filter(|symbol| symbol.name == name);
        let ending = || self.symbols.iter().filter(|symbol| symbol.name.ends_with(&end));
        let mut found: Vec<&Symbol> = if exact().next().is_some() { exact().collect() } else { ending().collect() };
        found.dedup_by_key(|symbol| symbol.address);
        match found.as_slice() {
            [only] => Ok(only.address),
            [] => Err(SweepError::NoSymbol(name.to_owned())),
            several => {
                let names = several.iter().map(|symbol| format!("{} at {:#x}", symbol.name, symbol.address));
                Err(SweepError::SeveralSymbols { name: name.to_owned(), found: names.collect() })
            }
        }
    }

    fn symbol(&self, address: u64) -> Option<String> {
        let after = self.symbols.partition_point(|symbol| symbol.address <= address);
        let before = self.symbols.get(..after)?;
        // The nearest symbol whose size covers `address`; a label without a size covers everything up to the next one.
        let holds = |symbol: &&Symbol| symbol.size == 0 || address - symbol.address < symbol.size;
        let symbol = before.iter().rev().take(8).find(holds)?;
        let offset = address - symbol.address;
        Some(if offset == 0 { symbol.name.clone() } else { format!("{}+{offset:#x}", symbol.name) })
    }

    fn bytes(&self, address: u64) -> &[u8] {
        let found = self.segments.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            let end = bytes.len().min(offset.saturating_add(INSTRUCTION_MAX));
            bytes.get(offset..end)
        });
        found.unwrap_or_default()
    }

    fn source(&self, address: u64) -> Option<String> {
        let mut frames = self.lines.as_ref()?.find_frames(address).skip_all_loads().ok()?;
        while let Ok(Some(frame)) = frames.next() {
            let Some(location) = frame.location else { continue };
            if let (Some(file), Some(line)) = (location.file, location.line)
                && !file.starts_with(STANDARD_LIBRARY)
            {
                return Some(format!("{}:{line}", file.strip_prefix(WORKSPACE).unwrap_or(file)));
            }
        }
        None
    }
}

fn lines(elf: &object::File<'_>) -> Option<Context<Reader>> {
    let section = |id: SectionId| -> Result<_, gimli::Error> {
        let data =
            elf.section_by_name(id.name()).and_then(|section| section.uncompressed_data().ok()).unwrap_or_default();
        Ok(Reader::new(Arc::from(&*data), RunTimeEndian::Little))
    };
    Context::from_dwarf(Dwarf::load(section).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use guest_image::GUEST_ELF;

    use super::*;

    #[test]
    fn finds_functions_and_lines_of_the_embedded_guest() {
        let program = Program::read(GUEST_ELF);
        let address = program.address_of("kernel::main").unwrap();
        let code = program.at(address);
        assert_eq!(code.symbol.as_deref(), Some("guest::kernel::main"));
        assert!(code.source.is_some_and(|source| source.starts_with("guest/src/kernel.rs")), "a source line");
        assert!(!code.bytes.is_empty());
        assert!(matches!(program.address_of("fmt"), Err(SweepError::SeveralSymbols { .. })));
        assert!(matches!(program.address_of("no_such_function"), Err(SweepError::NoSymbol(_))));
    }

    #[test]
    fn a_file_that_is_no_elf_has_no_symbols() {
        let program = Program::read(b"not an ELF file");
        assert_eq!(program.at(0x10).symbol, None);
        assert!(program.address_of("main").is_err());
    }
}
