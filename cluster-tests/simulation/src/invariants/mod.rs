//! What must hold whatever goes wrong, each in a file of its own.
//!
//! Invariants are shown facts ([`Seen`]) as they happen and may look at the whole world, also at what no part
//! of a real swarm could know. They use as little of the cores as they can: what they check is not how
//! the cores came to it.

mod i01_acknowledged;
mod i02_one_per_slot;
mod i03_placement;
mod i04_held_once;
mod i05_only_grows;
mod i06_secrets;
mod i07_balancer;
mod i08_update;
mod i09_deposed;
mod i10_one_log;
mod i11_plan_is_deed;
mod i12_comes_to_rest;
mod i13_jobs;
mod i14_members;
mod i15_levels;
mod i16_attempts;
#[cfg(test)]
mod tests;

use crate::seen::Seen;
use crate::world::World;

pub(crate) use i12_comes_to_rest::unrest;
pub(crate) use i14_members::managers_rest;
pub(crate) use i15_levels::levels_rest;

/// One thing that must hold.
pub(crate) trait Invariant {
    /// For people: number and sentence.
    fn name(&self) -> &'static str;

    /// Takes note of a fact; an error says what does not hold.
    fn check(&mut self, world: &World, seen: &Seen) -> Result<(), String>;
}

/// All of them, fresh.
pub(crate) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(i01_acknowledged::Acknowledged::default()),
        Box::new(i02_one_per_slot::OnePerSlot),
        Box::new(i03_placement::Placement),
        Box::new(i04_held_once::HeldOnce),
        Box::new(i05_only_grows::OnlyGrows),
        Box::new(i06_secrets::Secrets),
        Box::new(i07_balancer::Balancer::default()),
        Box::new(i08_update::Update::default()),
        Box::new(i09_deposed::Deposed::default()),
        Box::new(i10_one_log::OneLog::default()),
        Box::new(i11_plan_is_deed::PlanIsDeed::default()),
        Box::new(i12_comes_to_rest::ComesToRest),
        Box::new(i13_jobs::Jobs),
        Box::new(i14_members::Members),
        Box::new(i15_levels::Levels),
        Box::new(i16_attempts::Attempts),
    ]
}

/// An error with a formatted sentence, unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($word:tt)+) => {
        if !$condition {
            return Err(format!($($word)+));
        }
    };
}
use ensure;
