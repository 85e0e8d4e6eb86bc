//! The files that are checked: those of a checkout, or those of a test.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

/// Folders that hold no sources: what is built, and Git's own.
const NOT_SOURCES: [&str; 2] = ["target", ".git"];

/// Text files by their path from the top, with `/` between folders.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    files: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the text files under `top`; binary files are left out.
    ///
    /// # Errors
    ///
    /// If a folder or file cannot be read.
    pub fn read(top: &Path) -> io::Result<Self> {
        let mut tree = Self::default();
        tree.read_folder(top, "")?;
        Ok(tree)
    }

    /// The same tree with one more file, or another content for it.
    #[must_use]
    pub fn with(mut self, file: &str, content: &str) -> Self {
        self.files.insert(file.to_owned(), content.to_owned());
        self
    }

    /// The content of a file.
    #[must_use]
    pub fn get(&self, file: &str) -> Option<&str> {
        self.files.get(file).map(String::as_str)
    }

    /// Every file with its content.
    pub fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(file, content)| (file.as_str(), content.as_str()))
    }

    /// The Rust files.
    pub fn rust(&self) -> impl Iterator<Item = (&str, &str)> {
        self.all().filter(|(file, _)| file.ends_with(".rs"))
    }

    fn read_folder(&mut self, folder: &Path, name: &str) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let entry_name = entry.file_name().to_string_lossy().into_owned();
            let path = if name.is_empty() { entry_name.clone() } else { format!("{name}/{entry_name}") };
            let kind = entry.file_type()?;
            if NOT_SOURCES.contains(&entry_name.as_str()) {
                continue;
            } else if kind.is_dir() {
                self.read_folder(&entry.path(), &path)?;
            } else if kind.is_file()
                && let Ok(text) = String::from_utf8(fs::read(entry.path())?)
            {
                self.files.insert(path, text);
            }
        }
        Ok(())
    }
}

/// Whether `file` is `prefix`, or lies in the folder `prefix`.
pub(crate) fn is_under(file: &str, prefix: &str) -> bool {
    file.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The folder that a file or folder lies in; empty for one at the top.
pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// A file's name without its folder and without `.rs`.
pub(crate) fn stem(path: &str) -> &str {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    name.strip_suffix(".rs").unwrap_or(name)
}

/// `folder/name`, or `name` at the top.
pub(crate) fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}
