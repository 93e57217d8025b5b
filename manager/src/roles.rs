//! Managers that are to be workers: how they leave the Raft group, and what they wait for. And members of the
//! group that no node names any more.
//!
//! The leader takes them out, one after the other, and begins with what it finds in the store: a new leader
//! goes on where the one before stopped. It transfers its leadership before it is taken out itself.

use std::time::Duration;

use skep_common::limits::RPC_DEADLINE;
use skep_common::mistakes::{self, Mistake};
use skep_common::object::Node;
use skep_common::spec::NodeRole;
use skep_common::{Kind, Object};
use skep_manager_core::roles::Retirement;
use skep_manager_core::{Action, Command, Expect, Outcome, State, node_name, roles};
use skep_proto::raft_client::RaftClient;
use skep_proto::{RemoveManagerRequest, RemoveManagerResponse};
use skep_runtime::clock;
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{ChannelPool, Peer};
use tonic::{Code, Request, Status};

use crate::consensus::{Consensus, Feed, MembershipError};
use crate::control::error::Error;

/// Between attempts to take a manager out.
const RETRY: Duration = Duration::from_secs(1);
/// How long whoever asks to leave waits until it is no member of the Raft group: longer than a change of the leader takes.
const PATIENCE: Duration = RPC_DEADLINE;

/// Takes out whoever is to be a worker, and whoever no node names, for as long as this manager leads in `term`.
pub(crate) async fn run(consensus: Consensus, term: u64) {
    let mut feed = consensus.subscribe();
    let mut told = None;
    loop {
        // In this order: a manager is named before it is added.
        let members = consensus.members();
        let state = consensus.state();
        let mut failure = None;
        for node in roles::retiring(&state) {
            if let Err(why) = retire(&consensus, term, node).await {
                failure = Some(format!("node {}: {why}", node_name(node)));
            }
        }
        let raft_ids: Vec<u64> = members.iter().map(|member| member.raft_id).collect();
        let unnamed = roles::unnamed(&state, &raft_ids, consensus.raft_id());
        // Taking them out later would mend the mistake.
        let unnamed = unnamed.into_iter().filter(|_| !mistakes::is(Mistake::RetiredEarly));
        for raft_id in unnamed {
            match consensus.remove_unnamed(raft_id).await {
                Ok(true) => tracing::info!(raft_id, "a manager that no node names is taken out"),
                Ok(false) => {} // It was named meanwhile.
                Err(error) => {
                    failure = Some(format!("manager {raft_id:x}: {}", reason(&error)));
                }
            }
        }
        let is_waiting = failure.is_some();
        if is_waiting && failure != told {
            let why = failure.as_deref();
            tracing::warn!(why, "a manager cannot be made a worker yet; it is tried again");
        }
        told = failure;
        let retry = async {
            if is_waiting { tokio::time::sleep(RETRY).await } else { std::future::pending().await }
        };
        tokio::select! {
            has_changed = nodes_changed(&mut feed) => if !has_changed { return },
            has_changed = consensus.members_changed(&members) => if !has_changed { return },
            () = retry => {}
        }
    }
}

/// Waits for a change of nodes; false when consensus has ended.
async fn nodes_changed(feed: &mut Feed) -> bool {
    while let Some(commit) = feed.next().await {
        if commit.all_changed || commit.changes.iter().any(|change| change.kind == Kind::Node) {
            return true;
        }
    }
    false
}

async fn retire(consensus: &Consensus, term: u64, node: &Node) -> Result<(), String> {
    match roles::retirement(node, consensus.raft_id()) {
        Retirement::TransferLeadership => {
            let own = consensus.raft_id();
            consensus.ask_to_remove(own).await.map_err(|error| reason(&error))?;
            tracing::info!("this manager is to be a worker: it transfers its leadership");
            let is_gone = consensus.transfer_leader().await;
            return if is_gone {
                Ok(())
            } else {
                Err("nobody takes the leadership over".to_owned())
            };
        }
        Retirement::TakeOut { raft_id } => {
            consensus.ask_to_remove(raft_id).await.map_err(|error| reason(&error))?;
            if !mistakes::is(Mistake::RetiredEarly) {
                consensus.remove_manager(raft_id).await.map_err(|error| reason(&error))?;
            }
        }
        Retirement::Note => {}
    }
    let object = Object::Node(Box::new(roles::retired(node)));
    let expect = Expect::Version(node.meta.version);
    let command = Command::new(clock::now(), vec![Action::Put { object, expect }]);
    match consensus.propose_as_leader(term, &command).await {
        Ok(Outcome::Applied(_)) => {
            tracing::info!(node.id = %node.id, hostname = node.hostname(), "a manager is a worker now");
            Ok(())
        }
        Ok(Outcome::Refused(refusal)) => Err(refusal.to_string()),
        Err(error) => Err(Chain(&error).to_string()),
    }
}

/// What a user is to read of it.
pub(crate) fn reason(error: &MembershipError) -> String {
    match error {
        MembershipError::Refused { reason, .. } => reason.clone(),
        other => Chain(other).to_string(),
    }
}

fn with_raft_id(state: &State, raft_id: u64) -> Option<&Node> {
    let has_it = |node: &&std::sync::Arc<Node>| {
        node.manager_status.as_ref().is_some_and(|manager| manager.raft_id == raft_id)
    };
    state.nodes().values().find(has_it).map(|node| &**node)
}

/// Makes a manager that wants to leave a worker, and waits until it is no member of the Raft group any more.
pub(crate) async fn remove_manager(
    consensus: &Consensus,
    request: RemoveManagerRequest,
) -> Result<RemoveManagerResponse, Status> {
    let raft_id = request.raft_id;
    let mut feed = consensus.subscribe();
    let leaving = async {
        loop {
            let state = consensus.read_state().await.map_err(Error::Read)?;
            let Some(node) = with_raft_id(&state, raft_id) else {
                return Ok(RemoveManagerResponse {});
            };
            if node.spec.role == NodeRole::Manager && !demote(consensus, &state, node).await? {
                continue; // The node has just been written.
            }
            if !nodes_changed(&mut feed).await {
                return Err(Status::unavailable("this manager is stopping"));
            }
        }
    };
    let late = |_| {
        let why = "the leader has not taken it out in time: repeat, or see the leader's log";
        Err(Status::deadline_exceeded(why))
    };
    tokio::time::timeout(PATIENCE, leaving).await.unwrap_or_else(late)
}

/// False where the node was written meanwhile.
async fn demote(consensus: &Consensus, state: &State, node: &Node) -> Result<bool, Status> {
    let mut demoted = node.clone();
    let refused = |why: String| Status::failed_precondition(why);
    roles::ask(state, &mut demoted, NodeRole::Worker).map_err(|e| refused(e.to_string()))?;
    if let Some(manager) = &node.manager_status {
        let asked = consensus.ask_to_remove(manager.raft_id).await;
        asked.map_err(|error| refused(reason(&error)))?;
    }
    let object = Object::Node(Box::new(demoted));
    match crate::join::commit(consensus, object, Expect::Version(node.meta.version)).await {
        Ok(()) => Ok(true),
        Err(status) if status.code() == Code::Aborted => Ok(false),
        Err(status) => Err(status),
    }
}

/// Asks the other managers, one after the other, to take this one out of the Raft group.
pub(crate) async fn ask_to_leave(pool: &ChannelPool, consensus: &Consensus) -> Result<(), Status> {
    let raft_id = consensus.raft_id();
    let mut last =
        Status::failed_precondition("it is the last manager of the swarm, which would end with it");
    for member in consensus.members().into_iter().filter(|member| member.raft_id != raft_id) {
        let mut request = Request::new(RemoveManagerRequest { raft_id });
        request.set_timeout(2 * PATIENCE);
        let mut client = RaftClient::new(pool.channel(&member.addr, Peer::Manager));
        match client.remove_manager(request).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => return Err(status),
            Err(status) => last = status,
        }
    }
    Err(last)
}
