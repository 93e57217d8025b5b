//! What a change would do: its actions on a copy of the state, and then the leader's own passes over that,
//! with nodes that start and stop whatever they are told at once, until nothing is left to do.
//!
//! ```text
//! state ─┬──────────────► passes ─► at rest: what happens in any case ─┐
//!        └─ the change ─► passes ─► at rest ───────────────────────────┴► what the change does
//! ```
//!
//! # Reading order
//!
//! [`of_actions`] and [`of_nodes_down`], then `course` (the passes), `difference` (what became of slots),
//! `words`.
//!
//! # Invariants
//!
//! - What is shown is what the leader then does, as long as nothing else changes: it is the same code. Where
//!   tasks wait for room, or several of an update are under way at a time (parallelism, start-first), nodes also
//!   depend on who reports first: one order of many is shown.
//! - Nothing is written, and no time passes: delays of updates are skipped, up to a limit that a warning tells.
//! - Absent on purpose: failures. A task of an update that has no place is waited for without end, and the
//!   steps say what its deadline would do. Tasks of jobs run and do not end.

mod course;
mod difference;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeSet;

use rand::Rng;
use skep_common::object::NodeState;
use skep_common::{NodeId, Object, ServiceId, TaskId, Timestamp};

use crate::command::{Action, Expect, Refusal};
use crate::store::State;
use course::{Budget, Course};

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Ask for a part of it.
    #[error(
        "too large to plan: the tasks had not come to rest after {n_passes} passes with {n_steps} changes"
    )]
    TooLarge {
        /// Passes that were made.
        n_passes: usize,
        /// Changes that they led to.
        n_steps: usize,
    },
    /// The change itself is refused.
    #[error("{0}")]
    Refused(Refusal),
}

/// What becomes of one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTask {
    /// Its service.
    pub service_id: ServiceId,
    /// `service.slot`.
    pub name: String,
    /// The task that is there now; `None` where there is none.
    pub task_id: Option<TaskId>,
    /// Where that is.
    pub from: Option<NodeId>,
    /// Where the slot's task will be.
    pub to: Option<NodeId>,
    /// Why it would fit nowhere.
    pub reason: String,
}

/// What a change would do, each list by service and slot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WhatIf {
    /// Slots that get a task, and had none.
    pub created: Vec<PlannedTask>,
    /// Slots whose task is replaced by one on another node or on the same, or finds a node.
    pub moved: Vec<PlannedTask>,
    /// Slots that have no task any more.
    pub stopped: Vec<PlannedTask>,
    /// Slots whose new task would fit nowhere.
    pub unplaced: Vec<PlannedTask>,
    /// How services get there.
    pub steps: Vec<String>,
    /// What would be gone until nodes come back.
    pub losses: Vec<String>,
    /// What else there is to know.
    pub warnings: Vec<String>,
}

/// When a question is asked, and for how long.
pub struct Ask<'a> {
    /// Now.
    pub now: Timestamp,
    /// Whether to give up.
    pub is_late: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for Ask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ask").field("now", &self.now).finish_non_exhaustive()
    }
}

/// The managers' group, as far as a question is about it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Managers {
    /// Those that vote.
    pub voters: BTreeSet<NodeId>,
    /// How many others vote, of which it is not known which nodes they are.
    pub n_unnamed: usize,
    /// The one that leads.
    pub leader: Option<NodeId>,
}

/// What would come of one transaction of a client.
pub fn of_actions(
    state: &State,
    actions: Vec<Action>,
    ask: &Ask<'_>,
    rng: &mut impl Rng,
) -> Result<WhatIf, Error> {
    let updated = words::Updated::of(state, &actions);
    let (mut answer, after) = compare(state, actions, ask, rng)?;
    answer.steps = updated.steps(&answer, &after);
    Ok(answer)
}

/// What would become of tasks, images and the managers' group, were these nodes down.
pub fn of_nodes_down(
    state: &State,
    node_ids: &BTreeSet<NodeId>,
    managers: &Managers,
    ask: &Ask<'_>,
    rng: &mut impl Rng,
) -> Result<WhatIf, Error> {
    let mut actions = Vec::new();
    let mut warnings = Vec::new();
    for node in node_ids.iter().filter_map(|node_id| state.node(*node_id)) {
        if node.status.state == NodeState::Down {
            warnings.push(format!("{} is down already", crate::node_name(node)));
            continue;
        }
        let mut node = (**node).clone();
        node.status.state = NodeState::Down;
        "what if".clone_into(&mut node.status.message);
        let expect = Expect::Version(node.meta.version);
        actions.push(Action::Put { object: Object::Node(Box::new(node)), expect });
    }
    let (mut answer, after) = compare(state, actions, ask, rng)?;
    answer.losses = words::losses(state, node_ids, managers);
    answer.losses.extend(words::lost_slots(&answer.stopped, &after));
    if let Some(leader) = managers.leader.filter(|leader| node_ids.contains(leader)) {
        let name = words::name_of(state, leader);
        warnings.push(format!("{name} leads: another manager would take over within seconds"));
    }
    warnings.append(&mut answer.warnings);
    answer.warnings = warnings;
    Ok(answer)
}

fn compare(
    state: &State,
    actions: Vec<Action>,
    ask: &Ask<'_>,
    rng: &mut impl Rng,
) -> Result<(WhatIf, State), Error> {
    let mut budget = Budget::new(ask.is_late);
    let mut without = Course::new(state.clone(), ask.now, rng, &mut budget);
    without.run()?;
    let is_at_rest = !without.has_changed();
    let without = without.into_state();
    let mut with = Course::new(state.clone(), ask.now, rng, &mut budget);
    with.commit(actions)?;
    with.run()?;
    let is_cut = with.is_cut();
    let after = with.into_state();
    let mut answer = difference::between(state, &without, &after);
    if !is_at_rest {
        let warning = "the swarm is not at rest: what is under way now is taken to be over";
        answer.warnings.push(warning.to_owned());
    }
    if is_cut {
        let hours = course::HORIZON.as_secs() / 3600;
        answer.warnings.push(format!(
            "what comes more than {hours} h from now is left out: updates and delays of restarts go on after that"
        ));
    }
    Ok((answer, after))
}
