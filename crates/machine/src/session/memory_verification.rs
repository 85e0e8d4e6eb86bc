//! That a restored guest runs on the memory that was saved.
//!
//! A block of it that is damaged is given to nobody ([`Pager`]). So what the machine comes to counts, whatever is left to be
//! checked; but a snapshot needs all of RAM, and a guest that waits for a damaged block must end.

use std::sync::Arc;

use super::{Inbox, Request, SessionError};
use crate::snapshot::Pager;

/// What the machine's thread has of it.
#[derive(Clone, Copy)]
pub(super) struct MemoryVerification<'a>(Option<&'a Pager>);

impl<'a> MemoryVerification<'a> {
    /// Damage that `pager` finds, if there is one, is posted to `inbox`.
    pub(super) fn new(pager: Option<&'a Pager>, inbox: &Inbox) -> Self {
        if let Some(pager) = pager {
            let inbox = Arc::clone(inbox);
            // Refused only when the machine has ended anyway.
            pager.on_damage(move || drop(inbox.post(Request::Damaged)));
        }
        Self(pager)
    }

    /// Whether the guest could do nothing for damage.
    ///
    /// # Errors
    /// [`SessionError::Damaged`], once; the session must end with it.
    pub(super) fn check(&self) -> Result<(), SessionError> {
        self.0.map_or(Ok(()), Pager::check).map_err(SessionError::Damaged)
    }

    /// Waits until all of RAM is there.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(super) fn settle(&self) -> Result<(), SessionError> {
        self.0.map_or(Ok(()), Pager::finish).map_err(SessionError::Damaged)
    }
}
