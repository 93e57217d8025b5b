//! Who is let in of those that have a certificate: it says what its node was when it was signed, managers know what
//! became of the node since.
//!
//! # Invariants
//!
//! - A removed node is refused whatever it asks for, with a sentence, and its open connections end.
//! - A manager's certificate of a node that is a worker now is good for what workers may do, and its open
//!   connections end soon.
//! - So it is of a node that the swarm's state does not have: one whose joining a restored backup does not know.
//! - In Raft the certificate decides where nothing is known of a node, which may be joining, and where this manager
//!   may be behind: it neither refuses its leader nor cuts it off. Where it may be behind, it decides also elsewhere
//!   about nodes that are not known here.

use std::fmt::Debug;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use skep_common::NodeId;
use skep_common::spec::NodeRole;
use skep_proto::REMOVED_METADATA;
use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataValue;

use crate::access::Caller;

/// How long the connections of a node that was a manager go on: it is about to get another certificate, and may
/// wait for the answer that it is a worker.
const DEMOTED_GRACE: Duration = Duration::from_secs(10);

/// What became of nodes.
pub trait Register: Debug + Send + Sync + 'static {
    /// Whether the node was removed from the swarm. One that was is never a member again.
    fn is_removed(&self, node_id: NodeId) -> bool;
    /// The role that the node has, as far as that is known here.
    fn role(&self, node_id: NodeId) -> Option<NodeRole>;
    /// Whether what is known here is the swarm's state of a moment ago.
    fn is_current(&self) -> bool;
    /// Wakes when an answer of the others may be another one.
    fn changes(&self) -> watch::Receiver<u64>;
}

/// Decides about callers by a [`Register`]; without one, by their certificates alone.
#[derive(Debug, Clone, Default)]
pub struct Gate(Option<Arc<dyn Register>>);

impl Gate {
    /// By what that one says.
    pub fn of(register: impl Register) -> Self {
        Self(Some(Arc::new(register)))
    }

    /// Who the caller of the method at `path` is today, or why it is refused.
    pub fn admit(&self, path: &str, caller: Caller) -> Result<Caller, Status> {
        let (Some(register), Caller::Node(node_id, role)) = (&self.0, caller) else {
            return Ok(caller);
        };
        if register.is_removed(node_id) {
            return Err(removed(node_id));
        }
        let is_raft = path.starts_with("/skep.v1.Raft/");
        let role = match (role, register.role(node_id)) {
            (NodeRole::Manager, Some(NodeRole::Worker)) if !is_raft || register.is_current() => {
                NodeRole::Worker
            }
            (NodeRole::Manager, None) if !is_raft && register.is_current() => NodeRole::Worker,
            _ => role,
        };
        Ok(Caller::Node(node_id, role))
    }

    /// Returns when an open connection of the caller is to end; never where it may go on. One that a removed node
    /// opens goes on as well: the node is told there what it is.
    pub(crate) async fn end_of(self, caller: Caller) {
        let (Some(register), Caller::Node(node_id, role)) = (self.0, caller) else {
            return pending().await;
        };
        let mut changes = register.changes();
        if register.is_removed(node_id) {
            return pending().await;
        }
        let begin = || Box::pin(tokio::time::sleep(DEMOTED_GRACE));
        let mut grace = None;
        loop {
            if register.is_removed(node_id) {
                return;
            }
            match lost_role(&*register, node_id, role) {
                true if grace.is_none() => grace = Some(begin()),
                true => {}
                false => grace = None,
            }
            let is_over = async {
                match &mut grace {
                    Some(grace) => grace.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    return pending().await; // The manager ends, and the port with it.
                },
                () = is_over => match register.is_current() {
                    true => return,
                    false => grace = Some(begin()), // It may be the leader by now, which tells what is missed here.
                },
            }
        }
    }
}

/// Whether a certificate says more than its node is.
fn lost_role(register: &dyn Register, node_id: NodeId, role: NodeRole) -> bool {
    role == NodeRole::Manager && register.role(node_id) == Some(NodeRole::Worker)
}

/// What a removed node is told, for people and for its agent.
pub fn removed(node_id: NodeId) -> Status {
    let mut status = Status::permission_denied(format!(
        "node {node_id} was removed from the swarm: run `skep swarm leave` on it, then let it join again"
    ));
    status.metadata_mut().insert(REMOVED_METADATA, MetadataValue::from_static("true"));
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Debug, Default)]
    struct Known {
        unknown: Mutex<Vec<NodeId>>,
        removed: Mutex<Vec<NodeId>>,
        workers: Mutex<Vec<NodeId>>,
        is_behind: AtomicBool,
        changes: watch::Sender<u64>,
    }

    impl Register for Arc<Known> {
        fn is_removed(&self, node_id: NodeId) -> bool {
            self.removed.lock().unwrap().contains(&node_id)
        }
        fn role(&self, node_id: NodeId) -> Option<NodeRole> {
            if self.unknown.lock().unwrap().contains(&node_id) {
                return None;
            }
            let is_worker = self.workers.lock().unwrap().contains(&node_id);
            Some(if is_worker { NodeRole::Worker } else { NodeRole::Manager })
        }
        fn is_current(&self) -> bool {
            !self.is_behind.load(Ordering::Relaxed)
        }
        fn changes(&self) -> watch::Receiver<u64> {
            self.changes.subscribe()
        }
    }

    const RAFT: &str = "/skep.v1.Raft/Append";
    const CONTROL: &str = "/skep.v1.Control/List";
    const MANAGER: Caller = Caller::Node(NodeId(7), NodeRole::Manager);
    const WORKER: Caller = Caller::Node(NodeId(7), NodeRole::Worker);

    async fn has_ended(gate: &Gate, change: impl FnOnce()) -> Option<Duration> {
        let begun = tokio::time::sleep(Duration::ZERO).deadline();
        let end = gate.clone().end_of(MANAGER);
        tokio::pin!(end);
        assert!(futures::poll!(&mut end).is_pending());
        change();
        let ended = tokio::time::timeout(2 * DEMOTED_GRACE, end).await;
        ended.ok().map(|()| tokio::time::sleep(Duration::ZERO).deadline() - begun)
    }

    #[tokio::test(start_paused = true)]
    async fn what_became_of_a_node_counts_more_than_its_certificate() {
        let known = Arc::new(Known::default());
        let gate = Gate::of(Arc::clone(&known));
        let wake = || known.changes.send_modify(|version| *version += 1);
        assert_eq!(Gate::default().admit(RAFT, MANAGER).unwrap(), MANAGER);
        assert_eq!(gate.admit(RAFT, MANAGER).unwrap(), MANAGER);
        assert_eq!(has_ended(&gate, wake).await, None);

        let demoted = has_ended(&gate, || {
            known.workers.lock().unwrap().push(NodeId(7));
            wake();
            wake();
        });
        let waited = demoted.await.unwrap();
        assert!((DEMOTED_GRACE..DEMOTED_GRACE * 3 / 2).contains(&waited), "{waited:?}");
        assert_eq!(gate.admit(RAFT, MANAGER).unwrap(), WORKER);
        known.is_behind.store(true, Ordering::Relaxed);
        assert_eq!(gate.admit(RAFT, MANAGER).unwrap(), MANAGER, "it may be the leader by now");
        assert_eq!(gate.admit(CONTROL, MANAGER).unwrap(), WORKER);
        let promoted = has_ended(&gate, || {
            known.workers.lock().unwrap().clear();
            wake();
        });
        assert_eq!(promoted.await, None, "it is one again before the time is over");

        let removed = has_ended(&gate, || {
            known.removed.lock().unwrap().push(NodeId(7));
            wake();
        });
        assert_eq!(removed.await, Some(Duration::ZERO));
        for caller in [MANAGER, WORKER] {
            let refused = gate.admit(CONTROL, caller).unwrap_err();
            assert!(refused.message().contains("was removed from the swarm"), "{refused}");
            assert!(refused.metadata().contains_key(REMOVED_METADATA));
        }
        assert_eq!(has_ended(&gate, wake).await, None, "one that it opens later tells it so");
        let other = Caller::Node(NodeId(8), NodeRole::Manager);
        assert_eq!(gate.admit(RAFT, other).unwrap(), other);
        assert_eq!(gate.admit(CONTROL, Caller::Anonymous).unwrap(), Caller::Anonymous);
    }

    #[tokio::test(start_paused = true)]
    async fn a_manager_that_is_behind_does_not_cut_its_leader_off() {
        let known = Arc::new(Known::default());
        let gate = Gate::of(Arc::clone(&known));
        known.workers.lock().unwrap().push(NodeId(7));
        known.is_behind.store(true, Ordering::Relaxed);
        let end = gate.end_of(MANAGER);
        tokio::pin!(end);
        let waited = tokio::time::timeout(5 * DEMOTED_GRACE, &mut end).await;
        assert!(waited.is_err(), "it may be the leader");
        known.is_behind.store(false, Ordering::Relaxed);
        assert_eq!(tokio::time::timeout(2 * DEMOTED_GRACE, end).await, Ok(()));
    }

    #[test]
    fn a_node_that_the_state_does_not_have_is_no_manager() {
        let known = Arc::new(Known::default());
        let gate = Gate::of(Arc::clone(&known));
        known.unknown.lock().unwrap().push(NodeId(7));
        for (name, is_behind, path, caller, expect) in [
            ("in a restored swarm", false, CONTROL, MANAGER, WORKER),
            ("it may be joining", false, RAFT, MANAGER, MANAGER),
            ("it may have joined", true, CONTROL, MANAGER, MANAGER),
            ("it may lead", true, RAFT, MANAGER, MANAGER),
            ("a worker", false, CONTROL, WORKER, WORKER),
        ] {
            known.is_behind.store(is_behind, Ordering::Relaxed);
            assert_eq!(gate.admit(path, caller).unwrap(), expect, "{name}");
        }
    }
}
