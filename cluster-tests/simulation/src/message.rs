//! What machines tell each other.

use std::sync::Arc;

use skep_common::object::TaskStatus;
use skep_common::spec::NodeRole;
use skep_common::{NodeId, TaskId};
use skep_manager_core::endpoints::NodeTable;
use skep_manager_core::{Command, Outcome, assignments};

use crate::changing::{Change, Verdict};
use crate::membership::ManagerId;
use crate::replica::RaftMessage;

/// A machine, by its place.
pub(crate) type MachineId = usize;

/// One message. Those with a session travel in its two streams, in order.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Raft {
        from: ManagerId,
        to: ManagerId,
        message: RaftMessage,
    },
    /// An agent asks for a session, and says which format level its program knows.
    Hello {
        session: u64,
        level: u32,
    },
    Welcome {
        session: u64,
        term: u64,
    },
    /// Which role the node has, and where managers are.
    Role {
        session: u64,
        role: NodeRole,
        raft_id: u64,
        managers: Vec<MachineId>,
    },
    /// The manager asked does not lead.
    Redirect {
        session: u64,
        leader: Option<MachineId>,
    },
    /// The node is no member any more.
    Removed {
        session: u64,
    },
    Assignments {
        session: u64,
        what: Arc<Assignments>,
    },
    Report {
        session: u64,
        tasks: Arc<Vec<(TaskId, TaskStatus)>>,
    },
    MeshApplied {
        session: u64,
        version: u64,
    },
    /// One side ended the session.
    End {
        session: u64,
    },
    Beat {
        session: u64,
    },
    BeatTaken,
    /// A manager asks the leader how far the log is.
    AskIndex {
        request: u64,
    },
    /// `None`: ask another one.
    Index {
        request: u64,
        index: Option<u64>,
    },
    Propose {
        id: u64,
        command: Arc<Command>,
    },
    /// A manager asks the leader for a change of the members.
    Change {
        id: u64,
        change: Change,
    },
    /// What became of that.
    Changed {
        id: u64,
        verdict: Verdict,
    },
    /// A node asks a manager for a certificate.
    Renew {
        request: u64,
        node_id: NodeId,
    },
    /// The role that it is for, and by which Raft id the node is a manager; `None`: ask again.
    Renewed {
        request: u64,
        role: Option<(NodeRole, u64)>,
    },
    /// A program asks a manager to be admitted.
    Admit {
        request: u64,
        node_id: NodeId,
        manager: ManagerId,
        level: u32,
    },
    Admitted {
        request: u64,
        is_member: bool,
    },
    /// What became of a proposal; `None` where it was not taken, or its leader was lost.
    Proposed {
        id: u64,
        outcome: Option<Outcome>,
        may_commit: bool,
    },
}

impl Message {
    /// The session whose stream it travels in.
    pub(crate) fn stream(&self) -> Option<u64> {
        match self {
            Self::Hello { session, .. }
            | Self::Welcome { session, .. }
            | Self::Role { session, .. }
            | Self::Redirect { session, .. }
            | Self::Removed { session }
            | Self::Assignments { session, .. }
            | Self::Report { session, .. }
            | Self::MeshApplied { session, .. }
            | Self::End { session } => Some(*session),
            Self::Raft { .. }
            | Self::Change { .. }
            | Self::Changed { .. }
            | Self::Renew { .. }
            | Self::Renewed { .. }
            | Self::Admit { .. }
            | Self::Admitted { .. }
            | Self::Beat { .. }
            | Self::BeatTaken
            | Self::AskIndex { .. }
            | Self::Index { .. }
            | Self::Propose { .. }
            | Self::Proposed { .. } => None,
        }
    }

    /// For the trace.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Raft { message, .. } => match message {
                RaftMessage::Vote { is_trial: true, .. } => "pre-vote",
                RaftMessage::Vote { .. } => "vote",
                RaftMessage::VoteReply { .. } => "vote reply",
                RaftMessage::Append { .. } => "append",
                RaftMessage::AppendReply { .. } => "append reply",
                RaftMessage::Install { .. } => "install",
                RaftMessage::TransferLeader { .. } => "transfer leader",
            },
            Self::Role { .. } => "role",
            Self::Change { .. } => "change",
            Self::Changed { .. } => "changed",
            Self::Renew { .. } => "renew",
            Self::Renewed { .. } => "renewed",
            Self::Admit { .. } => "admit",
            Self::Admitted { .. } => "admitted",
            Self::Hello { .. } => "hello",
            Self::Welcome { .. } => "welcome",
            Self::Redirect { .. } => "redirect",
            Self::Removed { .. } => "removed",
            Self::Assignments { .. } => "assignments",
            Self::Report { .. } => "report",
            Self::MeshApplied { .. } => "mesh applied",
            Self::End { .. } => "end",
            Self::Beat { .. } => "beat",
            Self::BeatTaken => "beat taken",
            Self::AskIndex { .. } => "ask index",
            Self::Index { .. } => "index",
            Self::Propose { .. } => "propose",
            Self::Proposed { .. } => "proposed",
        }
    }
}

/// What a leader tells a node at once.
#[derive(Debug)]
pub(crate) struct Assignments {
    /// Tasks; absent where only the table is new.
    pub(crate) tasks: Option<assignments::Message>,
    /// The newest table, with its number.
    pub(crate) table: Option<(u64, NodeTable)>,
}
