//! Brings the parts that nodes play to those that are asked of them.

use crate::fork::Fork;

/// Takes the next step of every change of a role. None is taken so far.
pub(crate) fn advance(_fork: &mut Fork<'_>) {}
