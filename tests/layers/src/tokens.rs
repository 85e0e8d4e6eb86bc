//! Paths in tokens that are no syntax yet: a macro's arguments, the body of `macro_rules!`, an attribute's arguments.

use proc_macro2::{Delimiter, Ident, Span, TokenStream, TokenTree};

/// What stands in a stream of tokens.
#[derive(Default)]
pub struct Found {
    /// Whole imports.
    pub uses: Vec<syn::ItemUse>,
    /// Paths, single names included.
    pub paths: Vec<(Vec<String>, Span)>,
}

/// Finds the imports and paths in `tokens`, and in the groups within. An attribute may have paths in string literals:
/// `#[serde(with = "a::b")]`.
pub fn read(tokens: &TokenStream, in_attribute: bool) -> Found {
    let mut found = Found::default();
    Scanner::new(tokens.clone(), in_attribute).scan(&mut found);
    found
}

/// Whether a `cfg(…)` with these tokens holds in tests only: `test`, or `all(test, …)`.
pub fn requires_test(tokens: &TokenStream) -> bool {
    let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
    match tokens.as_slice() {
        [TokenTree::Ident(name)] => name == "test",
        [TokenTree::Ident(name), TokenTree::Group(group)] if name == "all" => {
            let inner: Vec<TokenTree> = group.stream().into_iter().collect();
            inner.split(is_comma).any(|part| requires_test(&part.iter().cloned().collect()))
        }
        _ => false,
    }
}

fn is_comma(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',')
}

struct Scanner {
    tokens: Vec<TokenTree>,
    in_attribute: bool,
    at: usize,
}

impl Scanner {
    fn new(tokens: impl IntoIterator<Item = TokenTree>, in_attribute: bool) -> Self {
        Self { tokens: tokens.into_iter().collect(), in_attribute, at: 0 }
    }

    fn scan(mut self, found: &mut Found) {
        let mut ignored = Found::default();
        while let Some(token) = self.tokens.get(self.at).cloned() {
            match token {
                TokenTree::Ident(ident) if ident == "use" && self.import(found) => {}
                // `.name` is a field or a method, `$name` a macro's own variable; `$crate` begins a path.
                TokenTree::Ident(ident) if !self.follows(".") && (ident == "crate" || !self.follows("$")) => {
                    let colons = self.follows("::");
                    // The rest of `Vec::<T>::new` and of `$name::new` is no path of its own.
                    let goes_on = colons && self.at.checked_sub(3).is_some_and(|at| self.ends_path(at));
                    let before = if colons { vec![String::new()] } else { Vec::new() };
                    self.path(if goes_on { &mut ignored } else { found }, before);
                }
                TokenTree::Group(group) => {
                    self.at += 1;
                    Self::new(group.stream(), self.in_attribute).scan(found);
                }
                TokenTree::Literal(literal) => {
                    self.at += 1;
                    if self.in_attribute
                        && let Ok(text) = syn::parse2::<syn::LitStr>(TokenTree::Literal(literal).into())
                        && let Ok(path) = text.parse_with(syn::Path::parse_mod_style)
                        && path.segments.len() > 1
                    {
                        let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
                        found.paths.push((names, text.span()));
                    }
                }
                _ => self.at += 1,
            }
        }
    }

    /// `use …;`, if it is one from here on.
    fn import(&mut self, found: &mut Found) -> bool {
        let rest = &self.tokens[self.at..];
        let Some(end) = rest.iter().position(|token| matches!(token, TokenTree::Punct(p) if p.as_char() == ';')) else {
            return false;
        };
        let Ok(item) = syn::parse2(rest[..=end].iter().cloned().collect()) else { return false };
        found.uses.push(item);
        self.at += end + 1;
        true
    }

    /// The path that begins here, after `before`; `a::{b, c}` is two.
    fn path(&mut self, found: &mut Found, before: Vec<String>) {
        let mut names = before;
        let mut span = Span::call_site();
        while let Some(TokenTree::Ident(ident)) = self.tokens.get(self.at) {
            (names, span) = (push(names, ident), ident.span());
            self.at += 1;
            if !self.is_colons(self.at) {
                break;
            }
            match self.tokens.get(self.at + 2) {
                Some(TokenTree::Ident(_)) => self.at += 2,
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    for part in inner.split(is_comma) {
                        Self::new(part.to_vec(), self.in_attribute).path(found, names.clone());
                    }
                    self.at += 3;
                    return;
                }
                _ => break,
            }
        }
        found.paths.push((names, span));
    }

    fn is_colons(&self, at: usize) -> bool {
        let colon = |at: usize| matches!(self.tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == ':');
        colon(at) && colon(at + 1)
    }

    fn ends_path(&self, at: usize) -> bool {
        match self.tokens.get(at) {
            Some(TokenTree::Punct(punct)) => punct.as_char() == '>',
            Some(TokenTree::Ident(_)) => true,
            _ => false,
        }
    }

    /// Whether the tokens right before are this punctuation.
    fn follows(&self, punctuation: &str) -> bool {
        let Some(start) = self.at.checked_sub(punctuation.len()) else { return false };
        let single = |at: usize, c: char| matches!(self.tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == c);
        let all = punctuation.chars().enumerate().all(|(i, c)| single(start + i, c));
        // `a..b` is a range.
        all && !(punctuation == "." && start > 0 && single(start - 1, '.'))
    }
}

fn push(mut names: Vec<String>, ident: &Ident) -> Vec<String> {
    // `a::{self}` is `a`.
    if names.is_empty() || ident != "self" {
        names.push(ident.to_string());
    }
    names
}
