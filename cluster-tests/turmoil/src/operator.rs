//! Who changes the set of managers: has machines join, and takes managers out, by the product's own ways.
//!
//! There are no agents in this ring. What a manager's agent would hear, that it is out of the Raft group, its machine
//! is told from here: sooner or later, so that some go on for a while as if they still were managers.
//!
//! # Invariants
//!
//! - No manager is taken out where fewer than [`MANAGERS_MIN`] would be left, as far as it is known.
//! - What may have been done by half is asked for again until it is done.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skep_common::spec::NodeRole;
use skep_common::{Node, NodeId};
use skep_proto::control_client::ControlClient;
use skep_proto::{JoinTokenRequest, ListRequest, RemoveNodeRequest, UpdateNodeRequest};
use skep_runtime::transport::{ChannelPool, Peer, Tls};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::ledger::{Ledger, Phase};
use crate::machines::{Identity, Machines, Wish, machine_of};
use crate::network::address_of;

/// Fewer are not asked for: with two, either of them that fails stops all until it is back.
const MANAGERS_MIN: usize = 2;
/// Nobody waits for ever.
const PATIENCE: Duration = Duration::from_secs(3);
/// A request whose outcome is not known has one after this time: longer than a manager tries to write it.
const UNKNOWN_MAX: Duration = Duration::from_secs(11);
/// Between looks at what the state says of nodes.
const LOOK: Duration = Duration::from_millis(400);
/// Between looks at what is waited for.
const POLL: Duration = Duration::from_millis(50);
/// Where nothing fails, a change is complete everywhere within this time.
const PROMPT: Duration = Duration::from_secs(10);
/// A machine that was taken out hears of it within this time.
const TOLD_MAX: Duration = Duration::from_secs(8);
/// For this long nothing may change once all changes are made: several times what an election takes.
const REST: Duration = Duration::from_secs(4);

/// The one who administers the swarm.
#[derive(Debug)]
pub(crate) struct Operator {
    rng: StdRng,
    hands: Hands,
    /// A manager that may have been removed by half.
    removing: Option<(NodeId, u64)>,
}

/// What it does it with.
#[derive(Debug, Clone)]
struct Hands {
    pool: ChannelPool,
    machines: Arc<Machines>,
    ledger: Arc<Ledger>,
}

impl Operator {
    pub(crate) fn new(seed: u64, tls: Tls, machines: Arc<Machines>, ledger: Arc<Ledger>) -> Self {
        let rng = StdRng::seed_from_u64(seed ^ 0x6f70_6572_6174_6f72);
        let hands = Hands { pool: ChannelPool::new(tls), machines, ledger };
        Self { rng, hands, removing: None }
    }

    /// Changes the managers as long as things fail, and proves in the end that it works.
    pub(crate) async fn run(mut self) -> turmoil::Result {
        self.hands.wait_for(Phase::Faults).await;
        let telling = self.hands.clone().tell(StdRng::seed_from_u64(self.rng.random()));
        tokio::select! {
            () = self.change() => {}
            () = telling => {}
        }
        Ok(())
    }

    async fn change(&mut self) {
        let token = self.token().await;
        while self.hands.ledger.phase() == Phase::Faults {
            let pause = Duration::from_millis(self.rng.random_range(200..2000));
            tokio::time::sleep(pause).await;
            if let Some((node_id, raft_id)) = self.removing {
                self.remove_by_force(node_id, raft_id).await;
            } else {
                self.change_once(&token).await;
            }
        }
        while let Some((node_id, raft_id)) = self.removing {
            self.remove_by_force(node_id, raft_id).await;
            tokio::time::sleep(POLL).await;
        }
        // Until then what was asked for may still be written.
        tokio::time::sleep(UNKNOWN_MAX).await;
        let members = self.hands.wait_settled().await;
        self.hands.ledger.set_members(members);
        self.hands.wait_for(Phase::Proof).await;
        if let Err(why) = self.prove(&token).await {
            self.hands.ledger.violate(12, why);
        }
    }

    async fn token(&mut self) -> String {
        loop {
            let request = JoinTokenRequest { role: "manager".to_owned(), rotate: false };
            let mut control = self.control_drawn();
            if let Ok(answer) = asked(control.join_token(request)).await {
                return answer.into_inner().token;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn control_drawn(&mut self) -> ControlClient<Channel> {
        self.hands.control_drawn(&mut self.rng)
    }

    /// Adds a manager or takes one out, where the state allows it.
    async fn change_once(&mut self, token: &str) {
        let control = self.control_drawn();
        let Some(nodes) = self.hands.nodes(control).await else { return };
        let is_wanted =
            |node: &Node| node.spec.role == NodeRole::Manager && node.manager_status.is_some();
        let machines = &self.hands.machines;
        let wanted: Vec<(u64, Identity, Node)> = machines
            .inside()
            .into_iter()
            .filter(|(number, _)| machines.wish(*number) == Wish::None)
            .filter_map(|(number, identity)| {
                let node = nodes.get(&identity.node_id).filter(|node| is_wanted(node))?;
                identity.is_voter.then(|| (number, identity, node.clone()))
            })
            .collect();
        let outside = self.hands.outside();
        let may_remove = wanted.len() > MANAGERS_MIN;
        if !outside.is_empty() && (!may_remove || self.rng.random_bool(0.5)) {
            let number = outside[self.rng.random_range(0..outside.len())];
            self.add(number, token);
        } else if may_remove {
            let leader = self.hands.ledger.leader();
            let of_leader = wanted.iter().position(|(_, of, _)| Some(of.raft_id) == leader);
            let drawn = self.rng.random_range(0..wanted.len());
            let at = of_leader.filter(|_| self.rng.random_bool(0.3)).unwrap_or(drawn);
            let (number, identity, node) = &wanted[at];
            match self.rng.random_range(0..10) {
                0..5 => {
                    if let Err(status) = self.demote(identity.raft_id, node).await {
                        self.hands.ledger.refuse_change(&status);
                    }
                }
                5..8 => self.hands.leave(*number),
                _ => self.remove_by_force(node.id, identity.raft_id).await,
            }
        }
    }

    fn add(&self, number: u64, token: &str) {
        let Hands { machines, ledger, .. } = &self.hands;
        ledger.note(&format!("operator: machine {number} is to join"));
        machines.tell(number, Wish::Join { token: token.to_owned() });
    }

    /// `node demote`.
    async fn demote(&mut self, raft_id: u64, node: &Node) -> Result<(), Status> {
        let mut control = self.control_drawn();
        self.demote_through(&mut control, raft_id, node).await
    }

    async fn demote_through(
        &self,
        control: &mut ControlClient<Channel>,
        raft_id: u64,
        node: &Node,
    ) -> Result<(), Status> {
        let mut spec = node.spec.clone();
        spec.role = NodeRole::Worker;
        let request = UpdateNodeRequest {
            id: node.id.to_string(),
            version: node.meta.version.index,
            spec_json: serde_json::to_string(&spec).expect("a spec has no failing parts"),
        };
        let ledger = &self.hands.ledger;
        let had_joined = ledger.asked_out(raft_id);
        let demoted = asked(control.update_node(request)).await;
        ledger.note(&format!("operator: demotes {raft_id}: {}", told(&demoted)));
        match &demoted {
            Ok(_) => ledger.leaving(raft_id),
            // It surely stays then.
            Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::Aborted) => {
                if had_joined {
                    ledger.joined(raft_id);
                }
            }
            Err(_) => {}
        }
        demoted.map(drop)
    }

    /// `node rm --force`: the manager's node is down, as far as its agent goes.
    async fn remove_by_force(&mut self, node_id: NodeId, raft_id: u64) {
        let request = RemoveNodeRequest { id: node_id.to_string(), force: true };
        let mut control = self.control_drawn();
        let ledger = &self.hands.ledger;
        ledger.asked_out(raft_id);
        let removed = asked(control.remove_node(request)).await;
        ledger.note(&format!("operator: removes {raft_id}: {}", told(&removed)));
        self.removing = Some((node_id, raft_id));
        match removed {
            Err(status) if status.code() != Code::NotFound => ledger.refuse_change(&status),
            _ => {
                ledger.left(raft_id);
                self.removing = None;
            }
        }
    }

    /// Where nothing fails, managers go and come at once, and nobody's term changes by itself.
    async fn prove(&mut self, token: &str) -> Result<(), String> {
        let ledger = Arc::clone(&self.hands.ledger);
        let term = ledger.term();
        self.hands.wait_for(Phase::Changes).await;
        unchanged(term, ledger.term(), "clients work")?;
        let members = ledger.members().expect("they are known before that is proved");
        let members = self.prove_removal(members).await?;
        let members = self.prove_addition(&members, token).await?;
        self.prove_refusal(&members).await
    }

    async fn prove_removal(&mut self, mut members: BTreeSet<u64>) -> Result<BTreeSet<u64>, String> {
        if members.len() <= MANAGERS_MIN {
            return Ok(members);
        }
        let ledger = Arc::clone(&self.hands.ledger);
        let term = ledger.term();
        let leader = ledger.leader().filter(|leader| members.contains(leader));
        let ids: Vec<u64> = members.iter().copied().collect();
        let drawn = ids[self.rng.random_range(0..ids.len())];
        let raft_id = leader.filter(|_| self.rng.random_bool(0.5)).unwrap_or(drawn);
        if self.rng.random_bool(0.5) {
            let node = self.node_of(raft_id).await?;
            let demoted = self.demote(raft_id, &node).await;
            demoted.map_err(|status| format!("{raft_id} cannot be demoted: {status}"))?;
        } else {
            self.hands.leave(machine_of(raft_id));
        }
        members.remove(&raft_id);
        self.hands.wait_members(|now| *now == members).await?;
        ledger.set_members(members.clone());
        if leader != Some(raft_id) {
            unchanged(term, ledger.term(), "a manager goes that does not lead")?;
        }
        Ok(members)
    }

    async fn prove_addition(
        &self,
        members: &BTreeSet<u64>,
        token: &str,
    ) -> Result<BTreeSet<u64>, String> {
        let ledger = &self.hands.ledger;
        let outside = self.hands.wait_outside().await?;
        let term = ledger.term();
        self.add(outside, token);
        let has_come = |now: &BTreeSet<u64>| {
            now.len() == members.len() + 1 && now.iter().any(|id| machine_of(*id) == outside)
        };
        let members = self.hands.wait_members(has_come).await?;
        ledger.set_members(members.clone());
        tokio::time::sleep(REST).await;
        unchanged(term, ledger.term(), "a manager comes")?;
        self.hands.wait_members(|now| *now == members).await
    }

    /// A manager is kept that a majority needs, and goes on being one.
    async fn prove_refusal(&mut self, members: &BTreeSet<u64>) -> Result<(), String> {
        let leader = self.hands.ledger.leader().filter(|leader| members.contains(leader));
        let leader = leader.ok_or("nobody leads a swarm at rest")?;
        // Of an even number one more may go than the others can do without.
        if members.len().is_multiple_of(2) {
            return Ok(());
        }
        let node = self.node_of(leader).await?;
        let others = members.iter().map(|id| machine_of(*id));
        let others = others.filter(|number| *number != machine_of(leader));
        let silent: Vec<u64> = others.take(members.len() / 2).collect();
        silent.iter().for_each(|number| self.hands.machines.switch(*number, true));
        tokio::time::sleep(POLL).await;
        let mut control = self.hands.control(machine_of(leader));
        let refused = self.demote_through(&mut control, leader, &node).await;
        silent.iter().for_each(|number| self.hands.machines.switch(*number, false));
        match refused {
            Err(status) if status.message().contains("would lose its quorum") => {}
            other => return Err(format!("{leader} is needed, and is demoted: {other:?}")),
        }
        self.hands.ledger.look_anew();
        self.hands.wait_members(|now| now == members).await.map(drop)
    }

    async fn node_of(&mut self, raft_id: u64) -> Result<Node, String> {
        let control = self.control_drawn();
        let nodes = self.hands.nodes(control).await.ok_or("nobody lists the nodes")?;
        let has_it = |node: &Node| {
            node.manager_status.as_ref().is_some_and(|status| status.raft_id == raft_id)
        };
        let node = nodes.into_values().find(has_it);
        node.ok_or_else(|| format!("manager {raft_id} has no node"))
    }
}

fn unchanged(before: u64, after: u64, while_: &str) -> Result<(), String> {
    if before == after {
        return Ok(());
    }
    Err(format!("nothing fails, and the term goes from {before} to {after} while {while_}"))
}

impl Hands {
    async fn wait_for(&self, phase: Phase) {
        while self.ledger.phase() < phase {
            tokio::time::sleep(POLL).await;
        }
    }

    fn control_drawn(&self, rng: &mut StdRng) -> ControlClient<Channel> {
        let managers = self.managers();
        let number = managers.get(rng.random_range(0..managers.len().max(1))).copied().unwrap_or(1);
        self.control(number)
    }

    /// The machines of the managers: of those at rest, otherwise of all that may be.
    fn managers(&self) -> Vec<u64> {
        match self.ledger.members() {
            Some(members) => members.into_iter().map(machine_of).collect(),
            None => self.machines.voters(),
        }
    }

    fn control(&self, number: u64) -> ControlClient<Channel> {
        ControlClient::new(self.pool.channel(&address_of(number), Peer::Manager))
    }

    /// All nodes, as a majority of the managers has them.
    async fn nodes(&self, mut control: ControlClient<Channel>) -> Option<BTreeMap<NodeId, Node>> {
        let request = ListRequest { kind: "node".to_owned(), ..ListRequest::default() };
        let list = asked(control.list(request)).await.ok()?.into_inner();
        if !list.stale.is_empty() {
            return None;
        }
        let nodes = list.json.iter().map(|json| serde_json::from_str::<Node>(json));
        Some(nodes.map(|node| node.expect("it is a node")).map(|node| (node.id, node)).collect())
    }

    /// Machines that may be told to join.
    fn outside(&self) -> Vec<u64> {
        let is_outside = |number: &u64| {
            self.machines.identity(*number).is_none() && self.machines.wish(*number) == Wish::None
        };
        self.machines.numbers().filter(is_outside).collect()
    }

    fn leave(&self, number: u64) {
        self.ledger.note(&format!("operator: machine {number} is to leave"));
        self.machines.tell(number, Wish::Leave);
    }

    /// Waits until nothing is under way any more: all machines are managers or outside.
    async fn wait_settled(&self) -> BTreeSet<u64> {
        loop {
            let inside = self.machines.inside();
            let is_done = |number: u64| match self.machines.identity(number) {
                None => self.machines.wish(number) == Wish::None,
                Some(identity) => identity.is_voter && self.machines.wish(number) != Wish::Leave,
            };
            if let Ok(members) = self.ledger.at_rest()
                && self.machines.numbers().all(is_done)
                && members.iter().all(|id| inside.iter().any(|(_, of)| of.raft_id == *id))
            {
                return members;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until all managers say that they are those.
    async fn wait_members(
        &self,
        are_those: impl Fn(&BTreeSet<u64>) -> bool,
    ) -> Result<BTreeSet<u64>, String> {
        let deadline = Instant::now() + PROMPT;
        loop {
            let now = self.ledger.at_rest();
            match now {
                Ok(members) if are_those(&members) => return Ok(members),
                _ if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                now => {
                    let seconds = PROMPT.as_secs();
                    return Err(format!("a change takes longer than {seconds} s: {now:?}"));
                }
            }
        }
    }

    async fn wait_outside(&self) -> Result<u64, String> {
        let deadline = Instant::now() + TOLD_MAX + PROMPT;
        loop {
            match self.outside().first() {
                Some(number) => return Ok(*number),
                None if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                None => return Err("no machine gets out of the swarm".to_owned()),
            }
        }
    }

    /// Tells machines that they were taken out.
    async fn tell(self, mut rng: StdRng) {
        let mut due: BTreeMap<u64, Instant> = BTreeMap::new();
        loop {
            tokio::time::sleep(LOOK).await;
            let inside = self.machines.inside();
            let control = self.control_drawn(&mut rng);
            let Some(nodes) = self.nodes(control).await else { continue };
            for (number, Identity { node_id, raft_id, .. }) in inside {
                let is_out =
                    nodes.get(&node_id).is_none_or(|node| node.observed_role() == NodeRole::Worker);
                if !is_out {
                    continue;
                }
                let at = due.entry(raft_id).or_insert_with(|| {
                    // Most hear of it at once; what is cut off from the leader does not.
                    let time = if rng.random_bool(0.7) { LOOK } else { TOLD_MAX };
                    Instant::now() + time.mul_f64(rng.random())
                });
                let is_due = *at <= Instant::now() && self.machines.wish(number) != Wish::BeOutside;
                if is_due && self.machines.tell_out(raft_id) {
                    self.ledger.note(&format!("manager {raft_id} hears that it is none"));
                }
            }
        }
    }
}

async fn asked<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Err(Status::deadline_exceeded("the operator waits no longer"));
    tokio::time::timeout(PATIENCE, call).await.unwrap_or_else(late)
}

fn told<T>(answer: &Result<T, Status>) -> String {
    match answer {
        Ok(_) => "done".to_owned(),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}
