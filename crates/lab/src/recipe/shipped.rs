//! The recipes that are shipped.

use super::{Recipe, RecipeError, parse};

/// Name and text of each.
const SHIPPED: [(&str, &str); 7] = [
    ("kvm-doc", include_str!("shipped/kvm-doc.toml")),
    ("qemu", include_str!("shipped/qemu.toml")),
    ("qemu-account-downtime", include_str!("shipped/qemu-account-downtime.toml")),
    ("firecracker", include_str!("shipped/firecracker.toml")),
    ("cloud-hypervisor", include_str!("shipped/cloud-hypervisor.toml")),
    ("dragonball", include_str!("shipped/dragonball.toml")),
    ("stratovirt", include_str!("shipped/stratovirt.toml")),
];

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
