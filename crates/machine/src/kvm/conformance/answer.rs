//! What a check found.

use serde::{Deserialize, Serialize};

use crate::kvm::Error;

/// One question to a KVM backend, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The check's name, which does not change from one version of `vmm` to the next.
    pub id: &'static str,
    /// What KVM was asked for.
    pub asked: String,
    /// What KVM said: a return code, or the reason of an exit.
    pub said: String,
    /// What the guest or a second counter showed.
    pub measured: String,
    /// What follows.
    pub verdict: Verdict,
    /// The documented behaviour, and where it is documented.
    pub rule: &'static str,
    /// The functions of Linux that decide it (arch/x86/kvm, unless another folder is named).
    pub kernel: &'static str,
}

/// How what was measured compares with the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As documented.
    Conforms,
    /// Not as documented.
    Differs,
    /// The backend says that it does not offer this.
    NotOffered,
    /// The documentation leaves it open: this is what this backend does.
    Noted,
    /// It could not be measured here: KVM refused a call that the check needs and that is not the one in question.
    Failed,
}

impl Verdict {
    /// The verdict's name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Conforms => "conforms",
            Self::Differs => "differs",
            Self::NotOffered => "not-offered",
            Self::Noted => "noted",
            Self::Failed => "failed",
        }
    }
}

/// An [`Answer`] without what is known before the check runs.
pub(super) struct Found {
    pub asked: String,
    pub said: String,
    pub measured: String,
    pub verdict: Verdict,
}

impl Found {
    pub fn new(
        asked: impl Into<String>,
        said: impl Into<String>,
        measured: impl Into<String>,
        verdict: Verdict,
    ) -> Self {
        Self { asked: asked.into(), said: said.into(), measured: measured.into(), verdict }
    }

    /// The guest did not reach the instruction in question; `said` is how it exited instead.
    pub fn unreached(asked: impl Into<String>, said: impl Into<String>) -> Self {
        Self::new(asked, said, "the guest did not get there", Verdict::Failed)
    }

    /// KVM says that it does not have what was asked for.
    pub fn not_offered(asked: impl Into<String>, said: impl Into<String>) -> Self {
        Self::new(asked, said, "nothing", Verdict::NotOffered)
    }
}

/// [`Verdict::Conforms`] or [`Verdict::Differs`].
pub(super) fn conforms(as_documented: bool) -> Verdict {
    if as_documented { Verdict::Conforms } else { Verdict::Differs }
}

/// KVM's answer to a call: "ok", or the error's name.
pub(super) fn said<T>(result: &Result<T, Error>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(Error::Call { source, .. }) => source.raw_os_error().map_or_else(|| source.to_string(), errno),
        Err(error) => error.to_string(),
    }
}

fn errno(number: i32) -> String {
    let name = match number {
        libc::EPERM => "EPERM",
        libc::ENXIO => "ENXIO",
        libc::EFAULT => "EFAULT",
        libc::EINVAL => "EINVAL",
        libc::ENOTTY => "ENOTTY",
        libc::ERANGE => "ERANGE",
        libc::EBUSY => "EBUSY",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        _ => return format!("errno {number}"),
    };
    name.to_owned()
}
