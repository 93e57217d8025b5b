//! The candidates of a group, in the order in which they are taken: a tree with a level for each
//! preference, whose leaves are heaps of nodes.
//!
//! ```text
//! zone a (2 tasks) ──► rack 1 (1) ──► n1 n4      a task goes down the branch with the fewest tasks of
//!                 └──► rack 2 (1) ──► n2         its service, and takes the first node of the leaf
//! zone b (3 tasks) ──► …
//! ```
//!
//! A branch without a candidate is taken off, so each step places a task or makes the tree smaller. All
//! tasks of the service count for their branch, also those on nodes that are no candidates.
//! Source: SwarmKit `manager/scheduler/{decision_tree,nodeset}.go`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use skep_common::Node;
use skep_common::spec::{Placement, PlacementPreference};

use super::Rank;
use crate::constraint::LabelKey;

/// Reads the preferences of a spec; an error says what is wrong with one.
pub(crate) fn parse_all(placement: Option<&Placement>) -> Result<Vec<LabelKey>, String> {
    let preferences = placement.and_then(|placement| placement.preferences.as_deref());
    preferences.unwrap_or_default().iter().map(parse).collect()
}

fn parse(preference: &PlacementPreference) -> Result<LabelKey, String> {
    let Some(spread) = &preference.spread else {
        return Err("invalid placement preference: it must have Spread".to_owned());
    };
    let descriptor = &spread.spread_descriptor;
    LabelKey::parse(descriptor).ok_or_else(|| {
        format!(
            "invalid placement preference: cannot spread over {descriptor:?}: use node.labels.KEY or \
             engine.labels.KEY"
        )
    })
}

/// A node of the tree; without preferences it is one leaf.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// Active tasks of the service below it.
    n_tasks: u32,
    branches: BTreeMap<String, Candidates>,
    nodes: BinaryHeap<Reverse<Rank>>,
}

impl Candidates {
    /// Counts tasks of the service on a node, whether it is a candidate or not.
    pub(super) fn charge(&mut self, preferences: &[LabelKey], node: &Node, n_tasks: u32) {
        self.n_tasks += n_tasks;
        if let [first, rest @ ..] = preferences
            && n_tasks > 0
        {
            self.branch(first, node).charge(rest, node, n_tasks);
        }
    }

    /// Adds a candidate.
    pub(super) fn push(&mut self, preferences: &[LabelKey], node: &Node, rank: Rank) {
        match preferences {
            [] => self.nodes.push(Reverse(rank)),
            [first, rest @ ..] => self.branch(first, node).push(rest, node, rank),
        }
    }

    fn branch(&mut self, preference: &LabelKey, node: &Node) -> &mut Self {
        self.branches.entry(preference.value(node).to_owned()).or_default()
    }

    /// Takes the first candidate of the branch with the fewest tasks; ties end in the label's value.
    pub(super) fn pop(&mut self) -> Option<Rank> {
        if let Some(Reverse(rank)) = self.nodes.pop() {
            return Some(rank);
        }
        loop {
            let fewest =
                self.branches.iter().min_by_key(|(value, branch)| (branch.n_tasks, *value));
            let value = fewest?.0.clone();
            if let Some(rank) = self.branches.get_mut(&value).and_then(Self::pop) {
                return Some(rank);
            }
            self.branches.remove(&value);
        }
    }
}
