//! The last program of `cargo test`: it tests nothing, and prints how many tests the programs before it skipped, and why.

use std::{env, io};

fn main() -> io::Result<()> {
    // Whoever asks for a list of tests runs none.
    if env::args().any(|arg| arg == "--list") {
        return Ok(());
    }
    vm_tests::report_skips()
}
