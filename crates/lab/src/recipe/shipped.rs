//! The recipes that are shipped: those of VMMs, and faults that can be injected into this VMM's own restore.

use super::{Recipe, RecipeError, parse};

/// Name and text of each.
const SHIPPED: [(&str, &str); 10] = [
    ("kvm-doc", include_str!("shipped/kvm-doc.toml")),
    ("qemu", include_str!("shipped/qemu.toml")),
    ("qemu-account-downtime", include_str!("shipped/qemu-account-downtime.toml")),
    ("firecracker", include_str!("shipped/firecracker.toml")),
    ("cloud-hypervisor", include_str!("shipped/cloud-hypervisor.toml")),
    ("dragonball", include_str!("shipped/dragonball.toml")),
    ("stratovirt", include_str!("shipped/stratovirt.toml")),
    ("masterclock-update", include_str!("shipped/masterclock-update.toml")),
    ("tsc-offsets", include_str!("shipped/tsc-offsets.toml")),
    ("deadline-by-khz", include_str!("shipped/deadline-by-khz.toml")),
];

/// Name and text of each fault.
const FAULTS: [(&str, &str); 8] = [
    ("deadline-before-lapic", include_str!("faults/deadline-before-lapic.toml")),
    ("deadline-before-tsc", include_str!("faults/deadline-before-tsc.toml")),
    ("page-not-republished", include_str!("faults/page-not-republished.toml")),
    ("no-guest-stopped", include_str!("faults/no-guest-stopped.toml")),
    ("zero-to-now", include_str!("faults/zero-to-now.toml")),
    ("tsc-jump", include_str!("faults/tsc-jump.toml")),
    ("page-base-ahead", include_str!("faults/page-base-ahead.toml")),
    (super::VMCLOCK_KEPT, include_str!("faults/vmclock-kept.toml")),
];

/// The fault that has a length, and its text.
const HOST_STOP: (&str, &str) = (super::HOST_STOP, include_str!("faults/host-stop.toml"));

/// The text of the recipe of this name.
pub(super) fn text(name: &str) -> Option<&'static str> {
    SHIPPED.into_iter().chain(FAULTS).find_map(|(of, text)| (of == name).then_some(text))
}

/// The text of the fault of this name.
pub(super) fn fault_text(name: &str) -> Option<&'static str> {
    FAULTS.into_iter().chain([HOST_STOP]).find_map(|(of, text)| (of == name).then_some(text))
}

/// The names of VMMs' recipes.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SHIPPED.into_iter().map(|(name, _)| name)
}

/// The names of the faults that can be injected, without [`super::HOST_STOP`].
pub fn fault_names() -> impl Iterator<Item = &'static str> {
    FAULTS.into_iter().map(|(name, _)| name)
}

/// All recipes but the faults.
///
/// # Errors
/// [`RecipeError`]; a test makes sure that there is none.
pub fn shipped() -> Result<Vec<Recipe>, RecipeError> {
    SHIPPED.into_iter().map(|(name, text)| parse::parse(name, name, text)).collect()
}
