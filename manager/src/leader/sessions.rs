//! The open sessions: what each node was told, and what is new for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::payloads;
use super::role::Role;
use super::tables::Encoded;
use super::trust::{Renewals, Trust};
use skep_common::limits::{
    CONDITION_CHARS_MAX, DESCRIPTION_BYTES_MAX, DESCRIPTION_PERIOD, PORT_CONDITIONS_MAX,
};
use skep_common::object::{self, NodeDescription};
use skep_common::spec::PortProtocol;
use skep_common::{NodeId, Object, TaskId, Timestamp};
use skep_manager_core::assignments::{self, AssignedImage, CopyDuties, Stream};
use skep_manager_core::claims::Claims;
use skep_manager_core::description::describe;
use skep_manager_core::endpoints::{Drain, News, NodeTable, PeerNews};
use skep_manager_core::{Action, Expect, State, level, rotation, store};
use skep_proto::dispatcher_message::Message;
use skep_proto::{
    Assignments, DispatcherMessage, Hello, ImageAssignment, ImageHolder, ImageReport,
    PortCondition, Welcome,
};
use skep_runtime::identity::sign_grant;
use tonic::Status;

use crate::dispatcher::ToAgent;
use crate::join::manager_addresses;

/// One node's session.
#[derive(Debug)]
struct Session {
    id: u64,
    to_agent: ToAgent,
    stream: Stream,
    told_table: Option<(u64, NodeTable)>,
    /// What is new since then is of other nodes alone.
    lacks_peers_alone: bool,
    /// The digest of the table that the node said it has of another leader; empty: none.
    has_table: Bytes,
    told_managers: Vec<String>,
    told_role: Role,
    told_trust: Trust,
    /// It is to get another certificate, and was not told yet.
    must_renew: bool,
    /// Ports that the node cannot serve, once it said so in this session.
    conditions: Option<Vec<object::PortCondition>>,
    /// Digests of the images that the node said it holds.
    images: BTreeSet<String>,
    is_dirty: bool,
    description: NodeDescription,
    /// When what it says of itself was last handed to the store.
    described_at: Option<Timestamp>,
    address: std::net::SocketAddr,
}

/// All sessions of this leader.
#[derive(Debug)]
pub(super) struct Sessions {
    term: u64,
    open: BTreeMap<NodeId, Session>,
    held_back: BTreeSet<TaskId>,
    duties: CopyDuties,
    encoded: Encoded,
    for_all: KeptForAll,
    /// Images or nodes changed: duties are chosen anew.
    are_duties_stale: bool,
    renewals: Renewals,
    /// The newest state that was looked at for what it has for whom.
    seen: State,
    /// What nodes have of what only one may have, as stored.
    claims: Claims,
    /// The level of the managers, as of the nodes that the claims are of.
    level: u32,
    /// What these nodes say of themselves is to be compared with the store.
    undescribed: BTreeSet<NodeId>,
    /// Of what these nodes say something is not accepted: compared again whenever a node changes.
    not_accepted: BTreeSet<NodeId>,
    /// The newest version of the tables that was compared with what nodes were told.
    compared: u64,
    peer_news: PeerNews,
}

impl Session {
    fn is_stale(&self, version: u64) -> bool {
        self.told_table.as_ref().is_none_or(|(told, _)| *told != version)
    }
}

impl Sessions {
    pub(super) fn new(term: u64) -> Self {
        Self {
            term,
            open: BTreeMap::new(),
            held_back: BTreeSet::new(),
            duties: CopyDuties::new(),
            encoded: Encoded::default(),
            for_all: KeptForAll::default(),
            are_duties_stale: true,
            renewals: Renewals::default(),
            seen: State::default(),
            claims: Claims::default(),
            level: 0,
            undescribed: BTreeSet::new(),
            not_accepted: BTreeSet::new(),
            compared: 0,
            peer_news: PeerNews::default(),
        }
    }

    /// Marks one node for the next dispatch.
    fn mark(&mut self, node_id: NodeId) {
        if let Some(session) = self.open.get_mut(&node_id) {
            session.is_dirty = true;
        }
    }

    /// Marks the nodes that a new state has something new for.
    fn look_at(&mut self, state: &State) {
        if state.version() == self.seen.version() {
            return;
        }
        match assignments::concerned(&self.seen, state) {
            Some(nodes) => nodes.into_iter().for_each(|node_id| self.mark(node_id)),
            None => {
                self.are_duties_stale = true;
                self.open.values_mut().for_each(|session| session.is_dirty = true);
            }
        }
        self.seen = state.clone();
    }

    /// Takes a session in, and returns what it changes in the store; `None` where it was turned away.
    pub(super) fn open(
        &mut self,
        state: &State,
        node_id: NodeId,
        session_id: u64,
        period: Duration,
        hello: &Hello,
        to_agent: ToAgent,
    ) -> Option<Vec<Action>> {
        let refuse = |status: Status| {
            let _ = to_agent.try_send(Err(status)); // The agent has gone already.
            None
        };
        let Some(cluster) = state.cluster() else {
            return refuse(Status::unavailable("this manager is about to found its swarm"));
        };
        let Some(node) = state.node(node_id) else {
            return refuse(skep_runtime::gate::removed(node_id));
        };
        let description = match description(&hello.description_json) {
            Ok(description) => description,
            Err(why) => {
                return refuse(Status::invalid_argument(format!("the node's description: {why}")));
            }
        };
        let address = match hello.addr.parse::<std::net::SocketAddr>() {
            Ok(address) => address,
            Err(error) => {
                return refuse(Status::invalid_argument(format!("the node's address: {error}")));
            }
        };
        let for_all = self.for_all.of(state);
        let (told_managers, told_trust) = (for_all.managers.clone(), for_all.trust.clone());
        let told_role = Role::of(node);
        let welcome = Welcome {
            session_id: format!("{session_id:016x}"),
            heartbeat_millis: u64::try_from(period.as_millis()).unwrap_or(u64::MAX),
            term: self.term,
            managers: told_managers.clone(),
            node_number: node.number.into(),
            ingress_pool: cluster.ingress_pool.to_string(),
            role: told_role.name.clone(),
            trust_pem: told_trust.pem.clone(),
            raft_id: Some(told_role.raft_id),
            nodes: u32::try_from(state.nodes().len()).unwrap_or(u32::MAX),
        };
        let message = DispatcherMessage { message: Some(Message::Welcome(welcome)) };
        if to_agent.try_send(Ok(message)).is_err() {
            return None; // The agent has gone already.
        }
        let session = Session {
            id: session_id,
            to_agent,
            stream: Stream::default(),
            told_table: None,
            lacks_peers_alone: false,
            has_table: hello.table_digest.clone(),
            told_managers,
            told_role,
            told_trust,
            must_renew: false,
            conditions: None,
            images: hello.image_digests.iter().cloned().collect(),
            is_dirty: true,
            description,
            described_at: None,
            address,
        };
        self.open.insert(node_id, session);
        self.undescribed.insert(node_id);
        Some(holdings(state, node_id, &hello.image_digests))
    }

    /// Takes over what a node says of itself now.
    pub(super) fn note_description(&mut self, node_id: NodeId, json: &str) {
        let Some(session) = self.open.get_mut(&node_id) else { return };
        match description(json) {
            Ok(description) => {
                session.description = description;
                self.undescribed.insert(node_id);
            }
            Err(error) => {
                tracing::warn!(node.id = %node_id, %error, "an unreadable description is ignored");
            }
        }
    }

    /// What nodes with a session say of themselves, where the store has something else; `n_max` at most.
    ///
    /// What a manager of before does not know waits until all managers know it.
    pub(super) fn descriptions(
        &mut self,
        state: &State,
        now: Timestamp,
        n_max: usize,
    ) -> Vec<Action> {
        self.look_at_nodes(state);
        let (level, mut actions) = (self.level, Vec::new());
        for node_id in std::mem::take(&mut self.undescribed) {
            let (Some(session), Some(node)) = (self.open.get_mut(&node_id), state.node(node_id))
            else {
                self.not_accepted.remove(&node_id);
                continue;
            };
            let description = self.claims.accept(node_id, &session.description);
            match description == session.description {
                true => self.not_accepted.remove(&node_id),
                false => self.not_accepted.insert(node_id),
            };
            let mut changed = describe(node, description, session.conditions.as_ref(), level);
            changed.status.addr = session.address.ip().to_string();
            changed.status.port = session.address.port();
            if changed == **node {
                continue;
            }
            // Also if it is written now: it may be refused, or be out of date by then.
            self.undescribed.insert(node_id);
            let is_due = session.described_at.is_none_or(|at| now >= at.after(DESCRIPTION_PERIOD));
            if is_due && actions.len() < n_max {
                session.described_at = Some(now);
                let expect = Expect::Version(node.meta.version);
                actions.push(Action::Put { object: Object::Node(Box::new(changed)), expect });
            }
        }
        actions
    }

    /// Has those compared with the store for which another state of the nodes may decide otherwise.
    fn look_at_nodes(&mut self, state: &State) {
        let concerned = self.claims.update(state.nodes());
        if concerned.is_empty() {
            return;
        }
        let level = level::of_managers(state);
        match level == self.level {
            true => self.undescribed.extend(concerned.iter().chain(&self.not_accepted)),
            false => self.undescribed.extend(self.open.keys()),
        }
        self.level = level;
    }

    /// Whether that was the node's current session.
    pub(super) fn close(&mut self, node_id: NodeId, session_id: u64) -> bool {
        let is_current = self.is_current(node_id, session_id);
        if is_current {
            self.open.remove(&node_id);
        }
        is_current
    }

    /// Ends a node's session, whichever it is, and has the node told; says whether it did. One whose queue is full goes on
    /// until its connection closes: its node would not hear that it has to open another one.
    pub(super) fn end(&mut self, node_id: NodeId) -> bool {
        let Some(session) = self.open.get(&node_id) else { return false };
        let called_down = Status::unavailable("the node is called down: it was not heard");
        let is_full = session
            .to_agent
            .try_send(Err(called_down))
            .is_err_and(|error| matches!(error, tokio::sync::mpsc::error::TrySendError::Full(_)));
        if !is_full {
            self.open.remove(&node_id);
        }
        !is_full
    }

    pub(super) fn is_current(&self, node_id: NodeId, session_id: u64) -> bool {
        self.open.get(&node_id).is_some_and(|session| session.id == session_id)
    }

    /// Notes whether a node holds an image, by its own word, and returns what that changes in the store.
    pub(super) fn note_image(
        &mut self,
        state: &State,
        node_id: NodeId,
        report: ImageReport,
    ) -> Vec<Action> {
        let ImageReport { digest, held: holds, .. } = report;
        let mut is_news = holds;
        if let Some(session) = self.open.get_mut(&node_id) {
            if holds {
                session.images.insert(digest.clone());
            } else {
                // What it said before may be on its way to the store.
                is_news = session.images.remove(&digest);
            }
        }
        let mut records = state.images().values().filter(|record| record.digest == digest);
        // Failures are reported again and again; only one that corrects the store is worth a command.
        is_news |= records.any(|record| record.holders.contains(&node_id) != holds);
        is_news.then_some(Action::ImageHolder { digest, node_id, holds }).into_iter().collect()
    }

    /// Notes which ports a node cannot serve; the store has it with the next pass.
    pub(super) fn note_conditions(&mut self, node_id: NodeId, conditions: Vec<PortCondition>) {
        let Some(session) = self.open.get_mut(&node_id) else { return };
        let mut read: Vec<object::PortCondition> =
            conditions.iter().take(PORT_CONDITIONS_MAX).filter_map(port_condition).collect();
        read.sort();
        let known = session.conditions.replace(read.clone()).unwrap_or_default();
        self.undescribed.insert(node_id);
        for condition in read.iter().filter(|condition| !known.contains(condition)) {
            let (port, protocol) = (condition.published_port, condition.protocol.name());
            let message = &condition.message;
            tracing::warn!(node.id = %node_id, "port {port}/{protocol} of a node {message}");
        }
    }

    /// Takes note of the nodes for which the newest table has nothing new, and which are told nothing, or nothing
    /// that a task's end waits for.
    pub(super) fn skip_unconcerned(&mut self, drain: &mut Drain) {
        let newest = drain.version();
        if std::mem::replace(&mut self.compared, newest) == newest {
            return;
        }
        for (node_id, session) in &mut self.open {
            let Some((version, told)) = &mut session.told_table else { continue };
            let news = drain.news_for(*node_id, told);
            session.lacks_peers_alone = news == News::OfPeersAlone;
            if news == News::None {
                *version = newest;
            }
        }
    }

    /// When nodes that wait to be told of others are to be told.
    pub(super) fn deadline(&self) -> Option<Timestamp> {
        self.peer_news.deadline()
    }

    /// Has nodes get certificates of another root, some at a time.
    pub(super) fn renew(&mut self, state: &State, now: Timestamp) {
        for node_id in self.renewals.due(state, self.open.keys(), now) {
            if let Some(session) = self.open.get_mut(&node_id) {
                (session.must_renew, session.is_dirty) = (true, true);
            }
        }
    }

    /// Marks the nodes whose tasks are held back from now on, or no longer.
    fn hold_back(&mut self, state: &State, held_back: BTreeSet<TaskId>) {
        let before = std::mem::replace(&mut self.held_back, held_back);
        let changed = before.symmetric_difference(&self.held_back);
        let nodes = changed.filter_map(|task_id| state.task(*task_id)?.node_id);
        nodes.collect::<Vec<_>>().into_iter().for_each(|node_id| self.mark(node_id));
    }

    /// Tells every node what is new for it, as far as its queue has room.
    pub(super) fn dispatch(
        &mut self,
        state: &State,
        drain: &mut Drain,
        held_back: BTreeSet<TaskId>,
        now: Timestamp,
    ) {
        let are_nodes_same = state.nodes().ptr_eq(self.seen.nodes());
        self.look_at(state);
        self.hold_back(state, held_back);
        let version = drain.version();
        let mut round = self.peer_news.begin(now);
        if !self.open.values().any(|session| session.is_dirty || session.is_stale(version)) {
            return;
        }
        if std::mem::take(&mut self.are_duties_stale) {
            self.duties = assignments::copy_duties(state);
        }
        self.open.retain(|node_id, _| {
            let is_member = are_nodes_same || state.node(*node_id).is_some();
            if !is_member {
                drain.session_closed(*node_id); // Nobody waits for a node that was removed.
            }
            is_member
        });
        let for_all = self.for_all.of(state);
        let mut gone = Vec::new();
        for (node_id, session) in &mut self.open {
            let is_news = session.is_stale(version) && round.tells(session.lacks_peers_alone);
            if !session.is_dirty && !is_news {
                continue;
            }
            let permit = match session.to_agent.clone().try_reserve_owned() {
                Ok(permit) => permit,
                Err(tokio::sync::mpsc::error::TrySendError::Full(_)) => continue, // Told when there is room.
                Err(tokio::sync::mpsc::error::TrySendError::Closed(_)) => {
                    gone.push(*node_id);
                    continue;
                }
            };
            let set = assignments::for_node(
                state,
                *node_id,
                &self.duties,
                &session.images,
                &self.held_back,
            );
            session.is_dirty = false;
            let table = is_news.then(|| {
                let told = session.told_table.as_ref().map(|(_, told)| told);
                let table = drain.of_node(*node_id);
                let encoded = self.encoded.update(told, &session.has_table, version, &table);
                ((version, table), encoded)
            });
            let message = news(session, state, *node_id, set, table, &for_all, now);
            if is_news && !std::mem::take(&mut session.lacks_peers_alone) {
                drain.sent(*node_id);
            }
            if let Some(assignments) = message {
                permit.send(Ok(DispatcherMessage {
                    message: Some(Message::Assignments(assignments)),
                }));
            }
        }
        self.peer_news.end(&round, now);
        // The reader of such a session reports its end as well; nothing is sent to it until then.
        for node_id in gone {
            if let Some(session) = self.open.get_mut(&node_id) {
                session.is_dirty = false;
            }
        }
    }
}

/// A condition as the store has it; one that cannot be read is of no use to anybody.
fn port_condition(condition: &PortCondition) -> Option<object::PortCondition> {
    // A program chose its own command line; terminals are to show this.
    let shown = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    Some(object::PortCondition {
        service_id: condition.service_id.parse().ok()?,
        protocol: PortProtocol::of(&condition.protocol)?,
        published_port: u16::try_from(condition.port).ok()?,
        message: condition.message.chars().take(CONDITION_CHARS_MAX).map(shown).collect(),
    })
}

fn description(json: &str) -> Result<NodeDescription, String> {
    if json.len() > DESCRIPTION_BYTES_MAX {
        return Err(format!(
            "it is longer than {DESCRIPTION_BYTES_MAX} bytes: give it fewer labels"
        ));
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// Corrects the store where it says something else than the node about what the node holds.
fn holdings(state: &State, node_id: NodeId, held: &[String]) -> Vec<Action> {
    let mut digests: BTreeMap<&str, bool> = BTreeMap::new();
    for image in state.images().values() {
        let known = digests.entry(&image.digest).or_insert(true);
        *known &= image.holders.contains(&node_id);
    }
    let wrong = digests.into_iter().filter_map(|(digest, is_known)| {
        let holds = held.iter().any(|held| held == digest);
        (holds != is_known).then(|| Action::ImageHolder {
            digest: digest.to_owned(),
            node_id,
            holds,
        })
    });
    wrong.collect()
}

/// What every node is told alike.
#[derive(Debug, Clone, Default)]
struct ForAll {
    managers: Vec<String>,
    trust: Trust,
}

/// The same, with what of a state it is of.
#[derive(Debug, Default)]
struct KeptForAll {
    nodes: store::Table<NodeId, object::Node>,
    cluster: Option<Arc<object::Cluster>>,
    for_all: Arc<ForAll>,
}

impl KeptForAll {
    fn of(&mut self, state: &State) -> Arc<ForAll> {
        let is_cluster_same = match (&self.cluster, state.cluster()) {
            (Some(known), Some(cluster)) => Arc::ptr_eq(known, cluster),
            (None, None) => true,
            _ => false,
        };
        if !is_cluster_same || !self.nodes.ptr_eq(state.nodes()) {
            let for_all = ForAll { managers: manager_addresses(state), trust: Trust::of(state) };
            let (nodes, cluster) = (state.nodes().clone(), state.cluster().cloned());
            *self = Self { nodes, cluster, for_all: Arc::new(for_all) };
        }
        Arc::clone(&self.for_all)
    }
}

fn news(
    session: &mut Session,
    state: &State,
    node_id: NodeId,
    set: assignments::AssignmentSet,
    table: Option<((u64, NodeTable), Bytes)>,
    for_all: &ForAll,
    now: Timestamp,
) -> Option<Assignments> {
    let ForAll { managers, trust } = for_all;
    let role = state.node(node_id).map(|node| Role::of(node)).unwrap_or_default();
    let is_role_new = role != session.told_role;
    let is_management_new = *managers != session.told_managers;
    let must_renew = std::mem::take(&mut session.must_renew);
    let is_trust_new = session.told_trust != *trust;
    let mut granted = regranted(session, trust, &set);
    let (next, is_all) = session.stream.next_part(set, |key| payloads::size(state, key));
    session.is_dirty |= !is_all; // The next pass tells the rest.
    let mut message = match next {
        Some(message) => Assignments {
            applies_to: message.applies_to,
            results_in: message.results_in,
            images: {
                granted.extend(message.changes.images);
                images(state, node_id, &granted, now)
            },
            removed_images: message.changes.removed_images,
            task_jsons: message.changes.tasks.iter().map(task_json).collect(),
            removed_tasks: texts(&message.changes.removed_tasks),
            secrets: payloads::payloads(state, &message.changes.payloads),
            removed_secrets: texts(&message.changes.removed_payloads),
            ..Assignments::default()
        },
        None if table.is_some()
            || is_management_new
            || is_role_new
            || is_trust_new
            || must_renew =>
        {
            let sequence = session.stream.sequence();
            Assignments {
                applies_to: sequence,
                results_in: sequence,
                images: images(state, node_id, &granted, now),
                ..Assignments::default()
            }
        }
        None => return None,
    };
    if let Some((table, encoded)) = table {
        session.told_table = Some(table);
        message.mesh = encoded;
    }
    if is_management_new {
        session.told_managers.clone_from(managers);
        message.managers.clone_from(managers);
    }
    if is_role_new {
        session.told_role.clone_from(&role);
        (message.role, message.raft_id) = (role.name, Some(role.raft_id));
    }
    if is_trust_new {
        session.told_trust.clone_from(trust);
        message.trust_pem = trust.pem.clone();
    }
    message.renew = must_renew;
    Some(message)
}

/// What is granted anew since another root signs: grants of the old one are of no use soon.
fn regranted(
    session: &Session,
    trust: &Trust,
    set: &assignments::AssignmentSet,
) -> BTreeMap<String, AssignedImage> {
    if session.told_trust.signer == trust.signer {
        return BTreeMap::new();
    }
    let granted = set.images.iter().filter(|(_, image)| !image.holders.is_empty());
    granted.map(|(digest, image)| (digest.clone(), image.clone())).collect()
}

fn texts<T: ToString>(list: &[T]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn task_json(task: &assignments::AssignedTask) -> String {
    serde_json::to_string(&task.to_task()).expect("a task has string keys and no failing parts")
}

fn images(
    state: &State,
    node_id: NodeId,
    images: &BTreeMap<String, AssignedImage>,
    now: Timestamp,
) -> Vec<ImageAssignment> {
    let key = state.cluster().map(|cluster| rotation::signing(cluster).1).unwrap_or_default();
    let assigned = images.iter().map(|(digest, image)| {
        let grant = if image.holders.is_empty() {
            Vec::new()
        } else {
            sign_grant(key, digest, node_id, now).unwrap_or_else(|error| {
                tracing::error!(error = %skep_runtime::telemetry::Chain(&error), "no grant for an image");
                Vec::new()
            })
        };
        let holder = |(id, addr): (&NodeId, &String)| ImageHolder { node_id: id.to_string(), addr: addr.clone() };
        ImageAssignment {
            digest: digest.clone(),
            name: image.name.clone(),
            holders: image.holders.iter().map(holder).collect(),
            grant: grant.into(),
        }
    });
    assigned.collect()
}

#[cfg(test)]
mod tests;
