//! Follows a written path to what it names.

use crate::modules::{Binding, Mention, ModuleId, Modules, Use};

/// How a path gets to what it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The modules of this tree on the way, in order.
    pub stops: Vec<ModuleId>,
    pub end: End,
    /// The full path, without renames: `std::thread::sleep`, `vmm::run::Machine`.
    pub name: Vec<String>,
}

/// Where a path ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// At a module of this tree.
    Module,
    /// At something defined in this file.
    Item(std::rc::Rc<str>),
    /// At a name that its last module does not show, because a macro makes it.
    Unknown(String),
    /// Outside this tree.
    External,
}

/// A mention with the routes of its path.
#[derive(Debug)]
pub struct Resolved {
    pub mention: Mention,
    pub routes: Vec<Route>,
    /// A single name that was imported by name: that import is a mention itself.
    pub repeats_import: bool,
}

/// All paths of a tree, resolved.
pub struct Mentions(pub Vec<Resolved>);

impl Mentions {
    pub fn resolve(modules: &Modules) -> Self {
        let resolved = modules.mentions.iter().filter_map(|mention| {
            let single = mention.path.len() == 1 && mention.kind == crate::modules::Kind::Path;
            let mut routes = Resolver::new(modules, mention.module).path(mention.module, &mention.path);
            let mut repeats_import = false;
            if single {
                let name = mention.path.first()?;
                repeats_import = modules.get(mention.module).names.contains_key(name);
                // A local variable may have a module's name, and the name of a crate alone says nothing.
                routes.retain(|route| route.end != End::Module && route.name.len() > 1);
            }
            Some(Resolved { mention: mention.clone(), routes, repeats_import })
        });
        Self(resolved.collect())
    }
}

struct Resolver<'a> {
    modules: &'a Modules,
    /// Where the path is written: this decides which imports it sees.
    viewer: ModuleId,
    /// Names that are being looked up, so that `use self::a as a` ends.
    open: Vec<(ModuleId, String)>,
}

impl<'a> Resolver<'a> {
    fn new(modules: &'a Modules, viewer: ModuleId) -> Self {
        Self { modules, viewer, open: Vec::new() }
    }

    /// The routes of a path that is written in `module`.
    fn path(&mut self, module: ModuleId, path: &[String]) -> Vec<Route> {
        let Some((first, rest)) = path.split_first() else { return Vec::new() };
        match first.as_str() {
            "" => self.external(rest),
            "crate" => self.walk(self.modules.root(module), rest),
            "self" => self.walk(module, rest),
            "super" => self.modules.get(module).parent.map_or_else(Vec::new, |parent| self.walk(parent, rest)),
            "Self" => Vec::new(),
            _ => {
                let bindings = self.lookup(module, first);
                let mut routes = self.follow(module, first, &bindings, rest);
                if routes.is_empty() || bindings.iter().all(|(_, certain)| !certain) {
                    routes.extend(self.external(path));
                }
                routes
            }
        }
    }

    /// A path that begins with a crate's name.
    fn external(&mut self, path: &[String]) -> Vec<Route> {
        match path.split_first() {
            Some((library, rest)) if self.modules.libraries.contains_key(library) => {
                self.walk(self.modules.libraries[library], rest)
            }
            _ => vec![Route { stops: Vec::new(), end: End::External, name: path.to_vec() }],
        }
    }

    /// From a module on.
    fn walk(&mut self, module: ModuleId, rest: &[String]) -> Vec<Route> {
        let here = &self.modules.get(module).path;
        let mut routes = match rest.split_first() {
            None => vec![Route { stops: Vec::new(), end: End::Module, name: here.clone() }],
            Some((name, rest)) if name == "self" => return self.walk(module, rest),
            Some((name, rest)) if name == "super" => {
                self.modules.get(module).parent.map_or_else(Vec::new, |parent| self.walk(parent, rest))
            }
            Some((name, after)) => {
                let bindings = self.lookup(module, name);
                let mut routes = self.follow(module, name, &bindings, after);
                if bindings.iter().all(|(_, certain)| !certain) {
                    let end = End::Unknown(name.clone());
                    routes.push(Route { stops: Vec::new(), end, name: [here, rest].concat() });
                }
                routes
            }
        };
        routes.iter_mut().for_each(|route| route.stops.insert(0, module));
        routes
    }

    /// Goes on with each meaning of `name`.
    fn follow(&mut self, module: ModuleId, name: &str, bindings: &[(Binding, bool)], rest: &[String]) -> Vec<Route> {
        let here = (module, name.to_owned());
        if self.open.contains(&here) {
            return Vec::new();
        }
        self.open.push(here);
        let mut routes = Vec::new();
        let is_module = bindings.iter().any(|(binding, _)| matches!(binding, Binding::Module(_)));
        for (binding, _) in bindings {
            match binding {
                // A function or macro of the same name has nothing in it.
                Binding::Item(_) if is_module && !rest.is_empty() => {}
                Binding::Module(inner) => routes.extend(self.walk(*inner, rest)),
                Binding::Item(file) => {
                    let name = [&self.modules.get(module).path, [name.to_owned()].as_slice(), rest].concat();
                    routes.push(Route { stops: Vec::new(), end: End::Item(file.clone()), name });
                }
                Binding::Use(import) => {
                    let path = [import.path.as_slice(), rest].concat();
                    routes.extend(self.path(module, &path));
                }
            }
        }
        self.open.pop();
        routes
    }

    /// What a name means in a module, and whether that is certain: a glob of a crate outside this tree may have it.
    fn lookup(&mut self, module: ModuleId, name: &str) -> Vec<(Binding, bool)> {
        let inside = self.modules.is_within(self.viewer, module);
        let here = self.modules.get(module);
        let visible = |binding: &&Binding| match binding {
            Binding::Use(import) => import.public || inside,
            _ => true,
        };
        let named: Vec<_> = here.names.get(name).into_iter().flatten().filter(visible).cloned().collect();
        if !named.is_empty() {
            return named.into_iter().map(|binding| (binding, true)).collect();
        }
        let here_and_globs = (module, format!("{name}::*"));
        if self.open.contains(&here_and_globs) {
            return Vec::new();
        }
        self.open.push(here_and_globs);
        let mut found = Vec::new();
        for glob in here.globs.iter().filter(|glob| glob.public || inside) {
            let import = |certain| {
                let path = [glob.path.as_slice(), &[name.to_owned()]].concat();
                (Binding::Use(Use { path, public: glob.public }), certain)
            };
            for route in self.path(module, &glob.path) {
                match (&route.end, route.stops.last()) {
                    (End::External, _) => found.push(import(false)),
                    (End::Module, Some(target)) => {
                        let inner = self.lookup(*target, name);
                        if !inner.is_empty() {
                            found.push(import(inner.iter().any(|(_, certain)| *certain)));
                        }
                    }
                    _ => {}
                }
            }
        }
        self.open.pop();
        found
    }
}
