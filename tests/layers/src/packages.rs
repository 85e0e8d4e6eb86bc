//! Cargo's packages: which file is the root of a crate, and by which name others call it.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::tree::{Tree, is_under, join, parent};

/// A crate's root, found where Cargo finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The folder that its files lie in. A package's `lib.rs` and `main.rs` share it.
    pub base: String,
    /// `lib.rs`, `main.rs`, or another file that Cargo starts from. None if a test did not bother to make one.
    pub file: Option<String>,
    /// The name that other crates use, if it is a library.
    pub library: Option<String>,
}

#[derive(Deserialize)]
struct Manifest {
    package: Option<Package>,
    lib: Option<Target>,
    #[serde(default)]
    bin: Vec<Target>,
    #[serde(default)]
    example: Vec<Target>,
    #[serde(default)]
    test: Vec<Target>,
    #[serde(default)]
    bench: Vec<Target>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
}

#[derive(Deserialize)]
struct Target {
    name: Option<String>,
    path: Option<String>,
}

/// All crate roots of a tree. A tree without manifests, as in a test, has one package per folder that holds a `src`.
pub fn roots(tree: &Tree) -> Vec<Root> {
    let mut roots: BTreeMap<String, Vec<Root>> = BTreeMap::new();
    for (file, _) in tree.rust() {
        let package = package_of(tree, file);
        let inside = file.strip_prefix(&package).unwrap_or(file).trim_start_matches('/');
        let base = base(tree, &package, inside);
        let is_library = inside == "src/lib.rs";
        let is_root = is_library || base == file || file == join(&base, "main.rs");
        let of_base = roots.entry(base.clone()).or_default();
        if is_root || named_targets(tree, &package).iter().any(|path| path == file) {
            let library = if is_library { library_name(tree, &package) } else { None };
            of_base.push(Root { base, file: Some(file.to_owned()), library });
        }
    }
    let or_without_file = |(base, roots): (String, Vec<Root>)| {
        if roots.is_empty() { vec![Root { base, file: None, library: None }] } else { roots }
    };
    roots.into_iter().flat_map(or_without_file).collect()
}

/// The root whose `crate::` a file uses when no `mod` says otherwise: the library's, if there is one.
pub fn root_of(roots: &[Root], file: &str) -> Option<usize> {
    let candidates = roots.iter().enumerate().filter(|(_, root)| is_under(file, &root.base));
    candidates.max_by_key(|(_, root)| (root.base.len(), root.library.is_some())).map(|(index, _)| index)
}

/// The nearest folder above with a manifest; else the one that holds `src`.
fn package_of(tree: &Tree, file: &str) -> String {
    let mut folder = parent(file);
    loop {
        if tree.get(&join(folder, "Cargo.toml")).is_some_and(|text| text.contains("[package]")) {
            return folder.to_owned();
        }
        if folder.is_empty() {
            break;
        }
        folder = parent(folder);
    }
    file.split_once("/src/").map_or(parent(file), |(package, _)| package).to_owned()
}

fn base(tree: &Tree, package: &str, inside: &str) -> String {
    let parts: Vec<&str> = inside.split('/').collect();
    let own_folder = |depth: usize| {
        let folder = join(package, &parts[..depth].join("/"));
        tree.get(&join(&folder, "main.rs")).is_some().then_some(folder)
    };
    match parts.as_slice() {
        ["src", "bin", _, _, ..] => own_folder(3).unwrap_or_else(|| join(package, "src")),
        ["src", "bin", _] => join(package, inside),
        ["src", ..] => join(package, "src"),
        // tests/a.rs, benches/a.rs, build.rs: each is a crate of its own; tests/a/main.rs with what lies beside it too.
        [_, _, _, ..] => own_folder(2).unwrap_or_else(|| join(package, parts[0])),
        _ => join(package, inside),
    }
}

fn manifest(tree: &Tree, package: &str) -> Option<Manifest> {
    toml::from_str(tree.get(&join(package, "Cargo.toml"))?).ok()
}

/// Targets whose manifest gives a path.
fn named_targets(tree: &Tree, package: &str) -> Vec<String> {
    let Some(manifest) = manifest(tree, package) else { return Vec::new() };
    let Manifest { package: _, lib, bin, example, test, bench } = manifest;
    let all = lib.into_iter().chain(bin).chain(example).chain(test).chain(bench);
    all.filter_map(|target| Some(join(package, &target.path?))).collect()
}

fn library_name(tree: &Tree, package: &str) -> Option<String> {
    let name = match manifest(tree, package) {
        Some(Manifest { lib: Some(Target { name: Some(name), .. }), .. }) => name,
        Some(manifest) => manifest.package?.name,
        None => package.rsplit('/').next()?.to_owned(),
    };
    Some(name.replace('-', "_"))
}
