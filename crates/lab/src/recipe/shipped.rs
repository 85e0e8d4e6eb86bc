//! The recipes that are shipped.

use super::{Recipe, RecipeError, parse};

/// Name and text of each.
const SHIPPED: [(&str, &str); 2] =
    [("kvm-doc", include_str!("shipped/kvm-doc.toml")), ("qemu", include_str!("shipped/qemu.toml"))];

/// The text of the recipe of this name.
pub(super) fn text(name: &str) -> Option<&'static str> {
    SHIPPED.into_iter().find_map(|(of, text)| (of == name).then_some(text))
}

/// The names.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SHIPPED.into_iter().map(|(name, _)| name)
}

/// All of them.
///
/// # Errors
/// [`RecipeError`]; a test makes sure that there is none.
pub fn shipped() -> Result<Vec<Recipe>, RecipeError> {
    SHIPPED.into_iter().map(|(name, text)| parse::parse(name, name, text)).collect()
}
