//! Which roots nodes are told to trust.

use bytes::Bytes;
use skep_manager_core::State;

/// The roots, PEM; empty where nodes are told nothing. They keep the one that they joined with so far.
pub(super) fn trust_of(_state: &State) -> Bytes {
    Bytes::new()
}
