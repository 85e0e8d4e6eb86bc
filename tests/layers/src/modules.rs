//! The modules of every crate: which file holds each, and which names it binds.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::rc::Rc;

use proc_macro2::{LexError, Span, TokenStream};

use crate::finding::{Finding, Place};
use crate::packages::{self, Root};
use crate::read::Reader;
use crate::tree::{Tree, join, parent, stem};

/// A module's number in [`Modules`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(usize);

/// A module: a file, or a `mod x { … }` in one.
#[derive(Debug)]
pub struct Module {
    /// The crate's name (its folder's, if it is no library) and the modules' names down to this one.
    pub path: Vec<String>,
    /// The file that it is in. A folder without `mod.rs` has the folder's name.
    pub file: Rc<str>,
    pub parent: Option<ModuleId>,
    /// What its names mean. A name may have several meanings: a module and a macro, or one for each `cfg`.
    pub names: HashMap<String, Vec<Binding>>,
    pub globs: Vec<Use>,
}

/// What a name means in a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    Module(ModuleId),
    /// Something defined in this file.
    Item(Rc<str>),
    Use(Use),
}

/// An import: the path as it was written, and whether other modules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    pub path: Vec<String>,
    pub public: bool,
}

/// A path in the source.
#[derive(Clone, Debug)]
pub struct Mention {
    pub module: ModuleId,
    /// Its names. The first may be `crate`, `self`, `super`, or empty for a leading `::`.
    pub path: Vec<String>,
    pub place: Place,
    /// Code that is compiled for tests only.
    pub test: bool,
    pub kind: Kind,
}

/// Where a path was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `use`, for this module alone.
    Import,
    /// `pub use`: for others.
    Reexport,
    /// Anywhere else.
    Path,
}

/// A word as the compiler sees it, keywords included, outside comments and literals.
#[derive(Clone, Debug)]
pub struct Word {
    pub word: String,
    pub place: Place,
    pub test: bool,
}

/// The modules of a tree.
#[derive(Debug, Default)]
pub struct Modules {
    modules: Vec<Module>,
    pub mentions: Vec<Mention>,
    pub words: Vec<Word>,
    /// Libraries by the name that other crates use.
    pub libraries: HashMap<String, ModuleId>,
    /// Files that are no Rust.
    pub unreadable: Vec<Finding>,
}

impl Modules {
    /// Follows the `mod` items of every crate from its roots. A file that none of them reaches gets the module that its
    /// path says.
    pub fn read(tree: &Tree) -> Self {
        let mut modules = Self::default();
        let mut files = Files { tree, parsed: BTreeMap::new(), seen: BTreeSet::new() };
        let roots = packages::roots(tree);
        let tops: Vec<ModuleId> = roots.iter().map(|root| modules.add_root(root)).collect();
        for (root, top) in roots.iter().zip(&tops) {
            if let Some(file) = &root.file {
                modules.read_file(&mut files, file, *top, parent(file), false);
            }
        }
        for (file, _) in tree.rust() {
            if files.seen.contains(file) {
                continue;
            }
            let Some(root) = packages::root_of(&roots, file) else { continue };
            let inside = file.strip_prefix(&roots[root].base).unwrap_or(file).trim_start_matches('/');
            let mut module = tops[root];
            for folder in inside.split('/').take(inside.matches('/').count()) {
                module = modules.child(module, folder);
            }
            if stem(file) != "mod" {
                module = modules.child(module, stem(file));
            }
            modules.modules[module.0].file = file.into();
            modules.read_file(&mut files, file, module, &module_folder(file), false);
        }
        modules
    }

    pub fn get(&self, id: ModuleId) -> &Module {
        &self.modules[id.0]
    }

    /// The root of a module's crate.
    pub fn root(&self, mut id: ModuleId) -> ModuleId {
        while let Some(parent) = self.get(id).parent {
            id = parent;
        }
        id
    }

    /// Whether `inner` is `outer` or lies within it: it sees what is private in `outer`.
    pub fn is_within(&self, inner: ModuleId, outer: ModuleId) -> bool {
        inner == outer || self.get(inner).parent.is_some_and(|parent| self.is_within(parent, outer))
    }

    /// A new module `name` in `parent`.
    pub fn add(&mut self, parent: ModuleId, name: &str, file: Rc<str>) -> ModuleId {
        let path = [self.get(parent).path.as_slice(), &[name.to_owned()]].concat();
        let id = self.push(Module { path, file, parent: Some(parent), names: HashMap::new(), globs: Vec::new() });
        self.bind(parent, name, Binding::Module(id));
        id
    }

    /// Gives a name in `module` one more meaning.
    pub fn bind(&mut self, module: ModuleId, name: &str, binding: Binding) {
        let meanings = self.modules[module.0].names.entry(name.to_owned()).or_default();
        if !meanings.contains(&binding) {
            meanings.push(binding);
        }
    }

    /// `use path::*` in `module`.
    pub fn glob(&mut self, module: ModuleId, import: Use) {
        self.modules[module.0].globs.push(import);
    }

    fn add_root(&mut self, root: &Root) -> ModuleId {
        let name = root.library.clone().unwrap_or_else(|| stem(&root.base).to_owned());
        let file = root.file.as_ref().unwrap_or(&root.base).as_str().into();
        let module =
            self.push(Module { path: vec![name], file, parent: None, names: HashMap::new(), globs: Vec::new() });
        if let Some(library) = &root.library {
            self.libraries.insert(library.clone(), module);
        }
        module
    }

    fn push(&mut self, module: Module) -> ModuleId {
        self.modules.push(module);
        ModuleId(self.modules.len() - 1)
    }

    /// The module `name` in `module`, made if there is none.
    fn child(&mut self, module: ModuleId, name: &str) -> ModuleId {
        let mut known = self.get(module).names.get(name).into_iter().flatten();
        let known = known.find_map(|binding| if let Binding::Module(id) = binding { Some(*id) } else { None });
        known.unwrap_or_else(|| {
            let file = &self.get(module).file;
            let folder = if file.ends_with(".rs") { module_folder(file) } else { file.to_string() };
            self.add(module, name, join(&folder, name).into())
        })
    }

    /// Reads `file` as the content of `module`; `folder` is where its own `mod x;` are looked for.
    fn read_file(&mut self, files: &mut Files<'_>, file: &str, module: ModuleId, folder: &str, test: bool) {
        files.seen.insert(file.to_owned());
        let name: Rc<str> = file.into();
        let parsed = match files.parse(file) {
            Ok(parsed) => parsed,
            Err((span, error)) => {
                let what = format!("not read: {error}");
                self.unreadable.push(Finding { place: place(&name, span), what });
                return;
            }
        };
        let mut reader = Reader::new(self, name.clone(), module, test);
        reader.file(&parsed.syntax);
        let (declared, tests) = (reader.declared, reader.tests);
        let in_tests = |span: Span| test || tests.iter().any(|lines| lines.contains(&span.start().line));
        collect_words(&parsed.tokens, &mut |word, span| {
            self.words.push(Word { word, place: place(&name, span), test: in_tests(span) });
        });
        for inner in declared {
            let inline = inner.inline.iter().fold(folder.to_owned(), |folder, name| join(&folder, name));
            let candidates = match &inner.path {
                // Relative to the file's folder; within an inline module, to the folder that its files would have.
                Some(path) if inner.inline.is_empty() => vec![normal(&join(parent(file), path))],
                Some(path) => vec![normal(&join(&inline, path))],
                None => vec![join(&inline, &format!("{}.rs", inner.name)), join(&inline, &inner.name) + "/mod.rs"],
            };
            let Some(found) = candidates.into_iter().find(|file| files.tree.get(file).is_some()) else { continue };
            let child = self.add(inner.parent, &inner.name, found.as_str().into());
            let inner_folder = if inner.path.is_some() { parent(&found).to_owned() } else { module_folder(&found) };
            // A `#[path]` that leads back to a file above would go on for ever.
            if self.get(child).path.len() < 32 {
                self.read_file(files, &found, child, &inner_folder, inner.test);
            }
        }
    }
}

/// Each file is parsed once, whichever number of crates it is a module of.
struct Files<'a> {
    tree: &'a Tree,
    parsed: BTreeMap<String, Rc<Parsed>>,
    seen: BTreeSet<String>,
}

struct Parsed {
    tokens: TokenStream,
    syntax: syn::File,
}

impl Files<'_> {
    fn parse(&mut self, file: &str) -> Result<Rc<Parsed>, (Span, String)> {
        if let Some(parsed) = self.parsed.get(file) {
            return Ok(parsed.clone());
        }
        let text = self.tree.get(file).unwrap_or_default();
        let tokens: TokenStream = text.parse().map_err(|error: LexError| (error.span(), error.to_string()))?;
        let syntax = syn::parse2(tokens.clone()).map_err(|error: syn::Error| (error.span(), error.to_string()))?;
        let parsed = Rc::new(Parsed { tokens, syntax });
        self.parsed.insert(file.to_owned(), parsed.clone());
        Ok(parsed)
    }
}

/// The place of a token.
pub fn place(file: &Rc<str>, span: Span) -> Place {
    let start = span.start();
    Place { file: file.clone(), line: start.line, column: start.column + 1 }
}

/// Lines of code for tests only.
pub type Lines = RangeInclusive<usize>;

fn collect_words(tokens: &TokenStream, found: &mut impl FnMut(String, Span)) {
    for token in tokens.clone() {
        match token {
            proc_macro2::TokenTree::Ident(ident) => found(ident.to_string(), ident.span()),
            proc_macro2::TokenTree::Group(group) => collect_words(&group.stream(), found),
            _ => {}
        }
    }
}

/// Where the `mod x;` of a file are looked for.
fn module_folder(file: &str) -> String {
    match stem(file) {
        "mod" | "lib" | "main" => parent(file).to_owned(),
        name => join(parent(file), name),
    }
}

/// A path without `.` and `..`.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
