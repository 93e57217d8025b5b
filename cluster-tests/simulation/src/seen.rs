//! What invariants are shown of a run, each at the moment when it happens.

use std::collections::BTreeSet;
use std::sync::Arc;

use skep_common::{NodeId, Timestamp};
use skep_manager_core::endpoints::Table;
use skep_manager_core::secrets::PayloadKey;
use skep_manager_core::{Action, Change, Command, Outcome, State};

use crate::message::{Assignments, MachineId};

/// One fact.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "each is looked at once, by reference")]
pub(crate) enum Seen {
    /// The first manager applied an entry.
    Committed {
        proposal: u64,
        before: State,
        after: State,
        changes: Vec<Change>,
        command: Arc<Command>,
        outcome: Outcome,
    },
    /// A manager applied an entry, or was given all up to it.
    Applied { manager: MachineId, term: u64, proposal: Option<u64>, level: u32, state: State },
    /// A member was sent a part of the log, or a snapshot, of this format level.
    Sent { manager: MachineId, level: u32 },
    /// A manager proposes a command of this format level, decided on that state.
    Proposed { manager: MachineId, level: u32, state: State },
    /// A manager's state after a restart, from a snapshot of this format level.
    Restored { manager: MachineId, level: u32, state: State },
    /// A leader decided.
    Planned { state: State, actions: Arc<Vec<Action>>, now: Timestamp },
    /// A leader proposes, on a view of this version.
    Decided { proposal: u64, view: u64 },
    /// A manager began to lead.
    Led { manager: MachineId, term: u64 },
    /// A leader has a new table.
    Tabled { term: u64, version: u64, table: Arc<Table>, state: State, silent: BTreeSet<NodeId> },
    /// A leader told a node.
    ///
    /// `payloads` are the secrets and configs that it has then, and `state` the view that says so.
    Told {
        term: u64,
        node_id: NodeId,
        what: Arc<Assignments>,
        payloads: BTreeSet<PayloadKey>,
        state: State,
    },
    /// An agent does as it was told.
    Accepted { machine: MachineId, term: u64, what: Arc<Assignments> },
    /// A kernel balances by another table.
    Programmed { machine: MachineId },
    /// A container runs.
    Started,
    /// A client was told that its wish was granted, at this version.
    Granted { kind: skep_common::Kind, id: u128, index: u64 },
    /// A client was given a linearizable view that was asked for at a moment with so many granted wishes.
    Read { state: State, n_granted: usize },
    /// A second has passed.
    Second,
    /// Everything has come to rest, or has not within the bound.
    AtRest { is_settled: bool },
}
