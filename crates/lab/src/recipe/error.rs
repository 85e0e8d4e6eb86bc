//! Why a recipe cannot be used.

use machine::blame::{Blame, Blamed};

use super::shipped;

/// Why a recipe cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// There is no such recipe, and no such file.
    #[error(
        "--recipe {file}: {why}; name a file, or one of {}; `--recipe list` says what they are",
        shipped::names().collect::<Vec<_>>().join(", ")
    )]
    Unreadable {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// A line of the file is wrong.
    #[error("{file}:{line}: {why}")]
    Line {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
}

impl Blamed for RecipeError {
    fn blame(&self) -> Blame {
        match self {
            Self::Unreadable { .. } | Self::Line { .. } => Blame::Usage,
        }
    }
}
