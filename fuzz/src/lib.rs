//! What the fuzz targets do with their bytes: a library, so that the same code runs as a test, without a fuzzer.

mod bytes;
mod lapic;

pub use lapic::lapic_doors;
