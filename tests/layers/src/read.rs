//! Reads one file: the names that its modules bind, and every path that is written in it.

use std::rc::Rc;

use proc_macro2::{Span, TokenStream};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, Meta, UseTree, Visibility};

use crate::modules::{Binding, Kind, Lines, Mention, ModuleId, Modules, Use, place};
use crate::tokens;

/// A `mod x;`: another file.
pub struct Declared {
    pub parent: ModuleId,
    pub name: String,
    /// The inline modules that it stands in.
    pub inline: Vec<String>,
    /// `#[path = "…"]`.
    pub path: Option<String>,
    pub test: bool,
}

/// Walks through a file's syntax.
pub struct Reader<'a> {
    modules: &'a mut Modules,
    file: Rc<str>,
    module: ModuleId,
    inline: Vec<String>,
    test: bool,
    in_attribute: bool,
    pub declared: Vec<Declared>,
    pub tests: Vec<Lines>,
}

impl<'a> Reader<'a> {
    pub fn new(modules: &'a mut Modules, file: Rc<str>, module: ModuleId, test: bool) -> Self {
        let (inline, declared, tests) = (Vec::new(), Vec::new(), Vec::new());
        Self { modules, file, module, inline, test, in_attribute: false, declared, tests }
    }

    pub fn file(&mut self, file: &syn::File) {
        self.test |= is_for_tests(&file.attrs);
        if self.test {
            self.tests.push(0..=usize::MAX);
        }
        self.visit_file(file);
    }

    fn mention(&mut self, path: Vec<String>, span: Span, kind: Kind) {
        let place = place(&self.file, span);
        self.modules.mentions.push(Mention { module: self.module, path, place, test: self.test, kind });
    }

    fn define(&mut self, name: &syn::Ident) {
        let item = Binding::Item(self.file.clone());
        self.modules.bind(self.module, &name.to_string(), item);
    }

    /// The imports of a tree, each with the names before it.
    fn import(&mut self, tree: &UseTree, before: &[String], public: bool) {
        let kind = if public { Kind::Reexport } else { Kind::Import };
        let with = |name: &syn::Ident| match name.to_string() {
            // `a::{self}` is `a`.
            name if name == "self" && !before.is_empty() => before.to_vec(),
            name => [before, &[name]].concat(),
        };
        match tree {
            UseTree::Path(path) => {
                let before = [before, &[path.ident.to_string()]].concat();
                self.import(&path.tree, &before, public);
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(tree, before, public)),
            UseTree::Name(name) => {
                let path = with(&name.ident);
                self.bind_import(&path.clone(), path.last().cloned(), public);
                self.mention(path, name.ident.span(), kind);
            }
            UseTree::Rename(rename) => {
                let path = with(&rename.ident);
                self.bind_import(&path, Some(rename.rename.to_string()), public);
                self.mention(path, rename.ident.span(), kind);
            }
            UseTree::Glob(glob) => {
                self.modules.glob(self.module, Use { path: before.to_vec(), public });
                self.mention(before.to_vec(), glob.star_token.span(), kind);
            }
        }
    }

    fn bind_import(&mut self, path: &[String], name: Option<String>, public: bool) {
        if let Some(name) = name
            && name != "_"
        {
            self.modules.bind(self.module, &name, Binding::Use(Use { path: path.to_vec(), public }));
        }
    }

    /// Visits an item that has these attributes.
    fn within(&mut self, attrs: &[Attribute], span: Span, visit: impl FnOnce(&mut Self)) {
        let before = self.test;
        if is_for_tests(attrs) {
            self.test = true;
            self.tests.push(span.start().line..=span.end().line);
        }
        visit(self);
        self.test = before;
    }

    fn module(&mut self, item: &syn::ItemMod) {
        let name = item.ident.to_string();
        if item.content.is_some() {
            let inner = self.modules.add(self.module, &name, self.file.clone());
            let outer = std::mem::replace(&mut self.module, inner);
            self.inline.push(name);
            visit::visit_item_mod(self, item);
            self.inline.pop();
            self.module = outer;
            return;
        }
        let path = item.attrs.iter().find_map(|attr| match &attr.meta {
            Meta::NameValue(pair) if pair.path.is_ident("path") => string(&pair.value),
            _ => None,
        });
        let declared = Declared { parent: self.module, name, inline: self.inline.clone(), path, test: self.test };
        self.declared.push(declared);
        visit::visit_item_mod(self, item);
    }

    /// A macro that is exported stands at the root of its crate, whichever module defines it.
    fn macro_rules(&mut self, item: &syn::ItemMacro) {
        let Some(name) = &item.ident else { return };
        self.define(name);
        if item.attrs.iter().any(|attr| attr.path().is_ident("macro_export")) {
            let path = self.modules.get(self.module).path.iter().skip(1).cloned();
            let path = std::iter::once("crate".to_owned()).chain(path).chain([name.to_string()]).collect();
            let root = self.modules.root(self.module);
            if root != self.module {
                self.modules.bind(root, &name.to_string(), Binding::Use(Use { path, public: true }));
            }
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let none: &[Attribute] = &[];
        let (attrs, name): (&[Attribute], Option<&syn::Ident>) = match item {
            Item::Const(item) => (&item.attrs, Some(&item.ident)),
            Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            Item::ExternCrate(item) => (&item.attrs, None),
            Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Item::ForeignMod(item) => (&item.attrs, None),
            Item::Impl(item) => (&item.attrs, None),
            Item::Macro(item) => (&item.attrs, None),
            Item::Mod(item) => (&item.attrs, None),
            Item::Static(item) => (&item.attrs, Some(&item.ident)),
            Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            Item::TraitAlias(item) => (&item.attrs, Some(&item.ident)),
            Item::Type(item) => (&item.attrs, Some(&item.ident)),
            Item::Union(item) => (&item.attrs, Some(&item.ident)),
            Item::Use(item) => (&item.attrs, None),
            _ => (none, None),
        };
        if let Some(name) = name {
            self.define(name);
        }
        self.within(attrs, item.span(), |reader| match item {
            Item::Mod(item) => reader.module(item),
            item => visit::visit_item(reader, item),
        });
    }

    fn visit_item_macro(&mut self, item: &'ast syn::ItemMacro) {
        self.macro_rules(item);
        visit::visit_item_macro(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.within(&item.attrs, item.span(), |reader| visit::visit_impl_item_fn(reader, item));
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let public = !matches!(item.vis, Visibility::Inherited);
        let before: &[String] = if item.leading_colon.is_some() { &[String::new()] } else { &[] };
        self.import(&item.tree, before, public);
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        // `extern crate self as x` names this crate.
        let path = match item.ident.to_string() {
            name if name == "self" => vec!["crate".to_owned()],
            name => vec![String::new(), name],
        };
        let name = item.rename.as_ref().map_or(&item.ident, |(_, name)| name);
        let public = !matches!(item.vis, Visibility::Inherited);
        self.bind_import(&path, Some(name.to_string()), public);
        self.mention(path, item.ident.span(), if public { Kind::Reexport } else { Kind::Import });
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let mut names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if path.leading_colon.is_some() {
            names.insert(0, String::new());
        }
        self.mention(names, path.span(), Kind::Path);
        visit::visit_path(self, path);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if !attribute.path().is_ident("doc") {
            self.in_attribute = true;
            visit::visit_attribute(self, attribute);
            self.in_attribute = false;
        }
    }

    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        let found = tokens::read(tokens, self.in_attribute);
        found.uses.iter().for_each(|item| self.visit_item_use(item));
        found.paths.into_iter().for_each(|(path, span)| self.mention(path, span, Kind::Path));
    }
}

fn string(value: &syn::Expr) -> Option<String> {
    match value {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
        _ => None,
    }
}

/// Whether an item with these attributes is compiled for tests only.
fn is_for_tests(attrs: &[Attribute]) -> bool {
    attrs.iter().any(|attr| match &attr.meta {
        Meta::Path(path) => path.segments.last().is_some_and(|last| last.ident == "test"),
        Meta::List(list) if list.path.is_ident("cfg") => tokens::requires_test(&list.tokens),
        _ => false,
    })
}
