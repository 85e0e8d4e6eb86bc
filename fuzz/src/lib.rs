//! The code of the fuzz targets: a library, so that it also runs as a test, without a fuzzer.

mod bytes;
mod lapic;

pub use lapic::lapic_doors;
