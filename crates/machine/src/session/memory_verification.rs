//! Verifies that a restored guest runs on the memory that was saved.
//!
//! The [`Pager`] maps no damaged block into the guest. So the machine's results are valid even if some blocks have not
//! been checked when it ends. But a snapshot needs all of RAM, and a session whose guest waits for a damaged block must
//! end.

use std::sync::Arc;

use super::{
    error::SessionError,
    request::{Inbox, Request},
};
use crate::snapshot::Pager;

/// The machine thread's handle to the pager; none if all of RAM is present.
#[derive(Clone, Copy)]
pub(super) struct MemoryVerification<'a>(Option<&'a Pager>);

impl<'a> MemoryVerification<'a> {
    /// Damage that `pager` finds, if there is one, is posted to `inbox`.
    pub(super) fn new(pager: Option<&'a Pager>, inbox: &Inbox) -> Self {
        if let Some(pager) = pager {
            let inbox = Arc::clone(inbox);
            // Posting fails only if the machine has ended already.
            pager.on_damage(move || drop(inbox.post(Request::Damaged)));
        }
        Self(pager)
    }

    /// Checks whether the pager has found damage.
    ///
    /// # Errors
    /// [`SessionError::Damaged`], once; the session must end with it.
    pub(super) fn check(&self) -> Result<(), SessionError> {
        self.0.map_or(Ok(()), Pager::check).map_err(SessionError::Damaged)
    }

    /// Waits until all of RAM is verified and mapped.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(super) fn finish(&self) -> Result<(), SessionError> {
        self.0.map_or(Ok(()), Pager::finish).map_err(SessionError::Damaged)
    }
}
