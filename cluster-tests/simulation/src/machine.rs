//! One machine: its daemon, as a worker and perhaps as a manager, its disk and its clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use skep_common::{NodeId, Timestamp};
use skep_manager_core::State;

use crate::agent::Agent;
use crate::changing::{Change, Changes};
use crate::client::Wish;
use crate::leader::Leader;
use crate::log::Entry;
use crate::membership::ManagerId;
use crate::message::MachineId;
use crate::replica::Replica;
use crate::role::RoleChange;

/// Who waits for a proposal of this manager.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waiter {
    /// Its own leader's loop.
    Loop,
    /// A client's request here.
    Request,
    /// A manager that forwarded it.
    Remote(MachineId),
    /// The leader's work on managers that are to be workers.
    Retirement,
}

/// How far a client's request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Wants to know how far the log is.
    Asking,
    /// Waits until this manager is so far.
    Catching(u64),
    /// The members are changed first.
    Changing(Change),
    /// Its command is on its way.
    Proposed,
}

/// A client's request to a manager.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) wish: Wish,
    pub(crate) seed: u64,
    pub(crate) stage: Stage,
    /// Granted wishes when it was made: it must see all of them.
    pub(crate) n_granted: usize,
    /// What its command is about.
    pub(crate) about: Option<(skep_common::Kind, u128)>,
    /// What is written when the members have changed; where there is nothing, it is decided anew.
    pub(crate) then: Option<Vec<skep_manager_core::Action>>,
    /// The members have been changed for it.
    pub(crate) has_changed: bool,
    /// It is decided anew once its command is committed.
    pub(crate) goes_on: bool,
    /// A machine that waits for the answer, with its number there.
    pub(crate) asked_by: Option<(MachineId, u64)>,
}

/// A machine's role as a manager.
#[derive(Debug)]
pub(crate) struct Manager {
    pub(crate) replica: Replica,
    pub(crate) state: State,
    pub(crate) leader: Option<Leader>,
    /// Whether it is to be seen now if a majority still answers.
    pub(crate) is_judged: bool,
    /// The leader's loop has something to look at.
    pub(crate) is_due: bool,
    pub(crate) waiting: BTreeMap<u64, Waiter>,
    /// Managers that asked how far the log is.
    pub(crate) asked: BTreeMap<u64, MachineId>,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// The disk is full until then.
    pub(crate) is_stopped: bool,
    /// The term whose heartbeats are under way.
    pub(crate) speaks_in: u64,
    pub(crate) wakes_at: Option<Timestamp>,
    /// What is asked of it as the leader.
    pub(crate) changes: Changes,
    /// It is a member of the Raft group, as far as it was told.
    pub(crate) is_member: bool,
}

impl Manager {
    /// A manager that begins with this log.
    pub(crate) fn new(id: ManagerId, log: Vec<Arc<Entry>>, now: Timestamp) -> Self {
        Self {
            is_member: !log.is_empty(),
            replica: Replica::new(id, log, now),
            state: State::default(),
            leader: None,
            is_judged: false,
            is_due: false,
            waiting: BTreeMap::new(),
            asked: BTreeMap::new(),
            requests: BTreeMap::new(),
            is_stopped: false,
            speaks_in: 0,
            wakes_at: None,
            changes: Changes::default(),
        }
    }
}

/// One machine.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) node_id: NodeId,
    /// The format level that its program knows.
    pub(crate) level: u32,
    /// Whether its daemon runs.
    pub(crate) is_up: bool,
    /// Counts the daemon's lives: what was asked for in one does not happen in the next.
    pub(crate) life: u32,
    pub(crate) paused_until: Timestamp,
    /// What its clock shows beside the true time.
    pub(crate) clock_offset: i64,
    pub(crate) has_slow_disk_until: Timestamp,
    pub(crate) flaps_until: Timestamp,
    /// The last moment at which a fault hit it.
    pub(crate) disturbed_at: Timestamp,
    pub(crate) session_since: Timestamp,
    /// Its role as a manager, which it has while its certificate is for one.
    pub(crate) manager: Option<Manager>,
    /// Where it takes up another role, how far it is.
    pub(crate) role_change: RoleChange,
    pub(crate) agent: Agent,
    pub(crate) rng: StdRng,
}

impl Machine {
    /// What its clock shows.
    pub(crate) fn clock(&self, now: Timestamp) -> Timestamp {
        Timestamp(now.0 + self.clock_offset)
    }

    /// Whether nothing has happened to it for so long.
    pub(crate) fn is_calm(&self, now: Timestamp, time: Duration) -> bool {
        self.is_up && now >= self.disturbed_at.after(time)
    }
}
