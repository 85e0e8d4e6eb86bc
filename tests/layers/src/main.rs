//! Prints which folder depends on which, as the sources have it now.

use std::path::Path;

use layers::table::Table;
use layers::tree::Tree;
use layers::{Reading, picture};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tree = Tree::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))?;
    let table = Table::parse(include_str!("../layers.toml"))?;
    print!("{}", picture::picture(&Reading::new(&tree, &table)));
    Ok(())
}
