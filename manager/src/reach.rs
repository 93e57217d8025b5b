//! Which managers answer: the leader's replication tells it, and the leader tells the others. Without a leader each
//! manager asks the others itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use skep_manager_core::quorum::{self, Voter};
use skep_manager_core::{State, node_name};
use skep_proto::raft_client::RaftClient;
use skep_proto::{RaftStatusRequest, RaftStatusResponse};
use skep_runtime::clock;
use skep_runtime::transport::{ChannelPool, Peer};
use tonic::{Request, Status};

use crate::consensus::{Consensus, Member, MemberRole};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// A machine that is out of breath is no reason to give up at once.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// A manager that takes longer to say how it is does not answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// What this manager knows of the others; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    consensus: Consensus,
    pool: ChannelPool,
    seen: Arc<Mutex<BTreeMap<u64, Seen>>>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    at: Instant,
    /// `at` is when it was first looked for.
    is_unheard: bool,
}

impl Reach {
    pub(crate) fn new(consensus: Consensus, pool: ChannelPool) -> Self {
        Self { consensus, pool, seen: Arc::default() }
    }

    /// Looks for as long as this manager runs.
    pub(crate) async fn run(self) {
        loop {
            self.look().await;
            tokio::time::sleep(PERIOD).await;
        }
    }

    async fn look(&self) {
        let (own, members) = (self.consensus.raft_id(), self.consensus.members());
        self.note(&members, BTreeMap::new());
        let leader = {
            let leadership = self.consensus.leadership().borrow().clone();
            leadership.leader.filter(|leader| !leadership.is_self && leader.raft_id != own)
        };
        if let Some(leader) = leader
            && self.consensus.is_current()
            && let Ok(answer) = self.ask(&leader.addr).await
            && !answer.heard.is_empty()
        {
            let heard = answer.heard.into_iter();
            let heard = heard.map(|peer| (peer.raft_id, Duration::from_millis(peer.millis_ago)));
            return self.note(&members, heard.chain([(leader.raft_id, Duration::ZERO)]).collect());
        }
        let heard = self.consensus.heard_of_others();
        if !heard.is_empty() {
            return self.note(&members, heard);
        }
        let others = members.iter().filter(|member| member.raft_id != own);
        let asked = others.map(async |member| {
            let answer = self.ask(&member.addr).await;
            answer.is_ok().then_some((member.raft_id, Duration::ZERO))
        });
        let answered = futures::future::join_all(asked).await;
        self.note(&members, answered.into_iter().flatten().collect());
    }

    async fn ask(&self, addr: &str) -> Result<RaftStatusResponse, Status> {
        let mut client = RaftClient::new(self.pool.channel(addr, Peer::Manager));
        let mut request = Request::new(RaftStatusRequest { brief: true });
        request.set_timeout(ANSWER_DEADLINE);
        let asked = tokio::time::timeout(ANSWER_DEADLINE, client.status(request)).await;
        let late = |_| Err(Status::deadline_exceeded("no answer in time"));
        Ok(asked.unwrap_or_else(late)?.into_inner())
    }

    /// Notes how long ago members were heard of, and forgets who is none.
    fn note(&self, members: &[Member], heard: BTreeMap<u64, Duration>) {
        let now = clock::monotonic();
        let mut seen = self.seen.lock().expect("nothing panics while it holds what was seen");
        seen.retain(|raft_id, _| members.iter().any(|member| member.raft_id == *raft_id));
        for member in members {
            seen.entry(member.raft_id).or_insert(Seen { at: now, is_unheard: true });
        }
        for (raft_id, ago) in heard {
            let Some(at) = now.checked_sub(ago) else { continue };
            if let Some(known) = seen.get_mut(&raft_id)
                && (known.is_unheard || known.at < at)
            {
                *known = Seen { at, is_unheard: false };
            }
        }
    }

    /// The managers that vote.
    pub(crate) fn voters(&self, state: &State) -> Vec<(u64, Voter)> {
        let (own, members) = (self.consensus.raft_id(), self.consensus.members());
        self.note(&members, self.consensus.heard_of_others());
        let now = clock::monotonic();
        let seen = self.seen.lock().expect("nothing panics while it holds what was seen").clone();
        let nodes = state.nodes().values();
        let names: BTreeMap<u64, String> = nodes
            .filter_map(|node| Some((node.manager_status.as_ref()?.raft_id, node_name(node))))
            .collect();
        let voter = |member: Member| {
            let seen = seen.get(&member.raft_id).filter(|_| member.raft_id != own);
            let name = names.get(&member.raft_id).unwrap_or(&member.addr).clone();
            let silence = seen.map_or(Duration::ZERO, |seen| now.duration_since(seen.at));
            let is_unheard = seen.is_some_and(|seen| seen.is_unheard);
            (member.raft_id, Voter { name, addr: member.addr, silence, is_unheard })
        };
        members.into_iter().filter(|member| member.role == MemberRole::Voter).map(voter).collect()
    }

    /// Whether fewer managers answer than are needed, and have for so long that waiting is of no use.
    pub(crate) fn is_quorum_lost(&self) -> bool {
        let voters = || self.all(&self.consensus.state());
        !self.consensus.is_current() && quorum::is_lost_for(&voters(), LOST_AFTER)
    }

    /// Why nothing can be read or written now.
    pub(crate) fn explain(&self) -> String {
        quorum::explain(&self.all(&self.consensus.state()))
    }

    fn all(&self, state: &State) -> Vec<Voter> {
        self.voters(state).into_iter().map(|(_, voter)| voter).collect()
    }
}
