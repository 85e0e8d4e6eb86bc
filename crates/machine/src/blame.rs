//! Whose fault an error is, and the exit code that `vmm` ends with for it.
//!
//! Every error type that a command can end with implements [`Blamed`] with a match that names each variant: a new
//! variant does not compile before its blame is decided. A variant that holds another error returns that error's blame.
//! [`ApiError`](crate::control::ApiError) has HTTP status codes instead, which say the same to a client.

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The run's: it began, and then the guest failed, a check failed, a snapshot could not be written or a thread of
    /// the VMM ended. Exit code 1.
    Run,
    /// The user's: a flag, an image, a snapshot or the path of a result cannot be used. Exit code 2.
    Usage,
    /// This host's: it cannot do what was asked for; another host may. Exit code 3.
    Host,
}

impl Blame {
    /// The exit code of a program that ends with such an error.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Run => 1,
            Self::Usage => 2,
            Self::Host => 3,
        }
    }
}

/// An error that says whose fault it is.
pub trait Blamed {
    /// Whose fault it is.
    fn blame(&self) -> Blame;
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Debug;

    use super::*;

    /// That each of `errors` is the fault of `blame`.
    #[track_caller]
    pub(crate) fn all_blame<E: Blamed + Debug>(blame: Blame, errors: impl IntoIterator<Item = E>) {
        for error in errors {
            assert_eq!(error.blame(), blame, "{error:?}");
        }
    }

    // Catches: a changed exit code. Scripts and CI jobs rely on them, and README.md lists them.
    #[test]
    fn exit_codes_are_those_of_the_readme() {
        assert_eq!([Blame::Run, Blame::Usage, Blame::Host].map(Blame::exit_code), [1, 2, 3]);
    }
}
