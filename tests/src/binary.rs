//! Paths of the program and the guest, built from the present sources.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Cargo's target directory and what a test executable's place in it says: `TARGET[/TRIPLE]/PROFILE/deps/NAME`.
struct Place {
    target: PathBuf,
    triple: Option<String>,
    profile: String,
    /// Where this profile's programs are.
    programs: PathBuf,
}

impl Place {
    fn of_this_test() -> Self {
        let exe = env::current_exe().expect("the path of this test");
        let programs = exe.ancestors().nth(2).expect("a directory above deps/");
        // Cargo tags the directory if it made it; if not, it is the one above, when no target was named.
        let tagged = exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
        let target = tagged.or_else(|| programs.parent()).expect("cargo's target directory");
        let mut words = programs.strip_prefix(target).expect("inside the target directory").iter().rev();
        let mut word = || words.next().map(|word| word.to_str().expect("UTF-8").to_owned());
        Self {
            profile: match word().expect("the profile's directory").as_str() {
                "debug" => "dev".to_owned(),
                other => other.to_owned(),
            },
            triple: word(),
            target: target.to_owned(),
            programs: programs.to_owned(),
        }
    }
}

/// The `vmm` program. Cargo builds the programs of a package for that package's own tests only, so the first call of a
/// process has it built; when it is up to date, that takes a moment.
pub fn vmm() -> &'static Path {
    static VMM: OnceLock<PathBuf> = OnceLock::new();
    VMM.get_or_init(|| built("--bin", "vmm", "vmm"))
}

/// The guest's bytes, with this section under a name that the VMM does not look for.
///
/// # Panics
/// If it has no such section.
#[must_use]
pub fn guest_without(section: &str) -> Vec<u8> {
    let mut bytes = fs::read(guest()).expect("the guest");
    let name = format!("\0{section}\0").into_bytes();
    let places: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&name)).collect();
    assert_eq!(places.len(), 1, "the name stands in the table of sections' names, and nowhere else");
    bytes[places[0] + 1..places[0] + name.len() - 1].fill(b'x');
    bytes
}

/// A program of `examples/`.
#[must_use]
pub fn example(name: &str) -> PathBuf {
    built("--example", name, &format!("examples/{name}"))
}

/// The program `name`, built; `kind` is cargo's option for it, `place` where it is in the profile's directory.
fn built(kind: &str, name: &str, place_in_profile: &str) -> PathBuf {
    let place = Place::of_this_test();
    // Set by `cargo test`. Without it a test program was started by hand, and uses what is there.
    if let Some(cargo) = env::var_os("CARGO") {
        // The packages are chosen as in `cargo run`, so that nothing is compiled twice with other features.
        let mut build = Command::new(cargo);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        build.args(["build", "--quiet", kind, name, "--profile", &place.profile, "--target-dir"]);
        build.arg(&place.target);
        if let Some(triple) = &place.triple {
            build.args(["--target", triple]);
        }
        let status = build.status().expect("cargo runs");
        assert!(status.success(), "building {name} failed: {status}");
    }
    place.programs.join(place_in_profile)
}

/// Cargo's target directory.
pub(crate) fn target() -> PathBuf {
    Place::of_this_test().target
}

/// The guest kernel's file, where the build leaves it for users.
pub fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        vmm();
        let guest = target().join("guest.bin");
        assert!(guest.exists(), "the build of vmm has not left {}", guest.display());
        guest
    })
}
