//! Who leads, as far as this manager knows.
//!
//! # Invariants
//!
//! - `is_self` is true only after this manager, as leader of that term, had an entry of its own
//!   committed by a quorum and applied it: the state it reads holds all that was acknowledged before.
//! - It is false again once no quorum answered for so long that another manager may lead.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::{Raft, RaftMetrics, ServerState, alias};
use tokio::sync::watch;

use super::feed::Hub;
use super::machine::Machine;
use super::options::Timing;
use super::types::TypeConfig;

/// The leader's id and address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    /// Its Raft id.
    pub raft_id: u64,
    /// Where managers reach it.
    pub addr: String,
}

/// Who leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader, if there is one.
    pub leader: Option<Leader>,
    /// The term, which names at most one leader. Never falls.
    pub term: u64,
    /// This manager leads, and its state is current. Control loops run while this holds.
    pub is_self: bool,
}

impl Leadership {
    /// Whether that manager leads.
    pub(crate) fn is_led_by(&self, raft_id: u64) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader.raft_id == raft_id)
    }
}

/// openraft's metrics, as they change.
#[derive(Clone)]
pub(crate) struct Metrics(alias::WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>);

impl Metrics {
    pub(crate) fn of(raft: &Raft<TypeConfig, Machine>) -> Self {
        Self(raft.metrics())
    }

    /// Looks at them; openraft waits meanwhile.
    pub(crate) fn borrow(&self) -> watch::Ref<'_, RaftMetrics<TypeConfig>> {
        self.0.borrow_watched()
    }

    /// The leader's Raft id and address, as openraft knows them.
    pub(crate) fn leader(&self) -> Option<(u64, String)> {
        let metrics = self.borrow();
        let leader = metrics.current_leader?;
        let node = metrics.membership_config.membership().get_node(&leader)?;
        Some((leader, node.addr.clone()))
    }

    /// Waits until they are as asked for; none when openraft is gone.
    pub(crate) async fn wait_for(
        &mut self,
        condition: impl Fn(&RaftMetrics<TypeConfig>) -> bool + Send,
    ) -> Option<RaftMetrics<TypeConfig>> {
        loop {
            {
                let metrics = self.0.borrow_and_update();
                if condition(&metrics) {
                    return Some(metrics.clone());
                }
            }
            self.0.changed().await.ok()?;
        }
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// Follows openraft's metrics until it stops.
pub(crate) async fn follow(
    mut metrics: Metrics,
    timing: Timing,
    leadership: watch::Sender<Leadership>,
    hub: Arc<Hub>,
) {
    loop {
        let (next, expiry) = {
            let metrics = metrics.0.borrow_and_update();
            if metrics.running_state.is_err() {
                break;
            }
            judge(&metrics, timing.leader_silence_max())
        };
        announce(&leadership, next);
        let changed = tokio::select! {
            changed = metrics.0.changed() => changed.is_ok(),
            () = wait(expiry) => true,
        };
        if !changed {
            break;
        }
    }
    let term = leadership.borrow().term;
    announce(&leadership, Leadership { leader: None, term, is_self: false });
    hub.close();
}

async fn wait(expiry: Option<Duration>) {
    match expiry {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

fn announce(leadership: &watch::Sender<Leadership>, next: Leadership) {
    leadership.send_if_modified(|current| {
        if *current == next {
            return false;
        }
        if current.leader != next.leader || current.is_self != next.is_self {
            let leader = next.leader.as_ref().map(|leader| format!("{:x}", leader.raft_id));
            tracing::info!(
                raft.term = next.term,
                raft.leader = leader,
                is_self = next.is_self,
                "the leader of the swarm changed"
            );
        }
        *current = next;
        true
    });
}

/// What the metrics say, and when silence would change that.
fn judge(
    metrics: &RaftMetrics<TypeConfig>,
    silence_max: Duration,
) -> (Leadership, Option<Duration>) {
    let term = metrics.current_term;
    let membership = metrics.membership_config.membership();
    let leader = metrics.current_leader.and_then(|raft_id| {
        let addr = membership.get_node(&raft_id)?.addr.clone();
        Some(Leader { raft_id, addr })
    });
    let is_leading =
        metrics.state == ServerState::Leader && metrics.current_leader == Some(metrics.id);
    if !is_leading {
        return (Leadership { leader, term, is_self: false }, None);
    }
    let has_applied = metrics.last_applied.is_some_and(|applied| applied.leader_id.term == term);
    let is_alone = membership.voter_ids().count() == 1;
    let silence = metrics.last_quorum_acked.map(|acked| openraft::Instant::elapsed(&*acked));
    match silence {
        _ if is_alone => (Leadership { leader, term, is_self: has_applied }, None),
        Some(silence) if silence < silence_max => {
            (Leadership { leader, term, is_self: has_applied }, Some(silence_max - silence))
        }
        // Elected just now, and nobody answered yet.
        None => (Leadership { leader, term, is_self: false }, None),
        Some(_) => (Leadership { leader: None, term, is_self: false }, None),
    }
}
