//! Secrets and configs in the store: which of them stay while somebody uses them.

use skep_common::Kind;

use super::State;
use crate::command::Refusal;

impl State {
    /// Refuses to erase a secret or a config that a service uses. Nothing is refused so far.
    #[expect(clippy::unused_self, reason = "who uses a secret is in the tables")]
    pub(super) fn refuse_used_payload(&self, _kind: Kind, _id: u128) -> Result<(), Refusal> {
        Ok(())
    }
}
