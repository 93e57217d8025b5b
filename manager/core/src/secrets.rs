//! The versions of secrets and configs: which of them services and tasks still use.

use skep_common::spec::ServiceSpec;

use crate::fork::Fork;
use crate::store::State;
use crate::validate::Error;

/// Erases versions that nobody uses any more. None is erased so far.
pub(crate) fn reap(_fork: &mut Fork<'_>) {}

/// Fills in the id, the name and the version of each secret and config that a service names. None is
/// filled in so far.
pub(crate) fn resolve(_state: &State, _spec: &mut ServiceSpec) -> Result<(), Error> {
    Ok(())
}
