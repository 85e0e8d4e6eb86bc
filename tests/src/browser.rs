//! Pages in a headless Chromium.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::process;

/// Chromium's program names in Linux distributions.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// A Chromium on this machine.
#[derive(Debug)]
pub struct Browser(PathBuf);

/// A page after its scripts have run.
#[derive(Debug)]
pub struct Loaded {
    /// Its elements.
    pub html: String,
    /// The messages of its scripts and of the browser on the console.
    pub console: Vec<String>,
}

impl Browser {
    /// The first on PATH.
    ///
    /// # Errors
    /// If there is none.
    pub fn find() -> Result<Self, String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = NAMES.iter().flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)));
        let browser = found.into_iter().find(|path| path.is_file());
        browser.map(Self).ok_or_else(|| format!("none of {} is on PATH", NAMES.join(", ")))
    }

    /// Loads a page, and gives it some time of its own clock to run its scripts.
    ///
    /// # Panics
    /// If there is no temporary directory, or Chromium fails.
    #[track_caller]
    #[must_use]
    pub fn load(&self, page: &Path) -> Loaded {
        let profile = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new(&self.0);
        command.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            // Overlay scroll bars take no room, as on a telephone.
            "--hide-scrollbars",
            // /dev/shm is small in containers.
            "--disable-dev-shm-usage",
            // A page that looks into a frame; both are files.
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--window-size=1280,900",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.arg(format!("file://{}#check", page.display()));
        let ended = process::finish(&mut command).expect(0);
        let console = ended.stderr.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_owned).collect();
        Loaded { html: ended.stdout, console }
    }

    /// How wide the page is in a window of `width`: more, if it scrolls sideways.
    ///
    /// # Panics
    /// As [`Self::load`], or if the page reports no width.
    #[track_caller]
    #[must_use]
    pub fn width_in(&self, page: &Path, width: u32) -> u32 {
        let frame = page.with_extension("frame.html");
        let html = format!(
            "<!DOCTYPE html><iframe src=\"{}\" width={width} height=800 style=\"border:0\"></iframe><script>\
             onload = () => setTimeout(() => {{ const root = frames[0].document.documentElement; \
             document.body.dataset.width = root.scrollWidth; }}, 500);</script>",
            page.file_name().expect("a file").to_string_lossy()
        );
        fs::write(&frame, html).expect("a file beside the page");
        let loaded = self.load(&frame);
        let width = loaded.html.split_once("data-width=\"").and_then(|(_, rest)| rest.split_once('"'));
        width.unwrap_or_else(|| panic!("no width in {loaded:#?}")).0.parse().expect("a number")
    }
}

impl Loaded {
    /// The attributes of each element that is a `tag` of `class`, as written.
    pub fn elements<'a>(&'a self, tag: &str, class: &str) -> impl Iterator<Item = &'a str> {
        let start = format!("<{tag} class=\"{class}\"");
        let rest =
            self.html.match_indices(&start).map(|(at, found)| &self.html[at + found.len()..]).collect::<Vec<_>>();
        rest.into_iter().filter_map(|rest| rest.split_once('>').map(|(attributes, _)| attributes))
    }
}

/// The number in an attribute of an element.
///
/// # Panics
/// If it is not there.
#[track_caller]
#[must_use]
pub fn number(attributes: &str, name: &str) -> u64 {
    let value = attributes.split_once(&format!("{name}=\"")).and_then(|(_, rest)| rest.split_once('"'));
    let (value, _) = value.unwrap_or_else(|| panic!("no {name} in {attributes:?}"));
    value.parse().unwrap_or_else(|error| panic!("{name} is {value:?}: {error}"))
}
