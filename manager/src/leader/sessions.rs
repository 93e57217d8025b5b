//! The open sessions: what each node was told, and what is new for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::payloads;
use super::role::role_of;
use super::trust::{Renewals, Trust};
use skep_common::limits::{
    CONDITION_CHARS_MAX, DESCRIPTION_BYTES_MAX, DESCRIPTION_PERIOD, PORT_CONDITIONS_MAX,
};
use skep_common::object::{self, NodeDescription};
use skep_common::spec::PortProtocol;
use skep_common::wireguard::{WireguardKey, WireguardKeys};
use skep_common::{NetworkId, NodeId, Object, ServiceId, TaskId, Timestamp};
use skep_manager_core::assignments::{self, AssignedImage, CopyDuties, Stream};
use skep_manager_core::claims::Claims;
use skep_manager_core::endpoints::networks::{
    Endpoint, NamedPort, NetworkChanges, NetworkService, Settings,
};
use skep_manager_core::endpoints::{self, Drain, NodeTable, PortKey};
use skep_manager_core::{Action, Expect, State, level, rotation, store};
use skep_proto::dispatcher_message::Message;
use skep_proto::{
    Assignments, DispatcherMessage, Hello, ImageAssignment, ImageHolder, ImageReport, MeshBackend,
    MeshPeer, MeshPort, MeshPortKey, MeshUpdate, NetworkEndpoint, NetworkSettings, NetworkUpdate,
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
    told_managers: Vec<String>,
    told_role: String,
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
    /// Images or nodes changed: duties are chosen anew.
    are_duties_stale: bool,
    renewals: Renewals,
    /// The newest state that was looked at for what it has for whom.
    seen: State,
    /// The nodes, of which version, that all descriptions were compared with, and when to compare them
    /// again.
    described: Option<(Nodes, Option<Timestamp>)>,
}

type Nodes = store::Table<NodeId, object::Node>;

impl Sessions {
    pub(super) fn new(term: u64) -> Self {
        Self {
            term,
            open: BTreeMap::new(),
            held_back: BTreeSet::new(),
            duties: CopyDuties::new(),
            are_duties_stale: true,
            renewals: Renewals::default(),
            seen: State::default(),
            described: None,
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
        let told_managers = manager_addresses(state);
        let told_role = role_of(node);
        let told_trust = Trust::of(state);
        let welcome = Welcome {
            session_id: format!("{session_id:016x}"),
            heartbeat_millis: u64::try_from(period.as_millis()).unwrap_or(u64::MAX),
            term: self.term,
            managers: told_managers.clone(),
            node_number: node.number.into(),
            ingress_pool: cluster.ingress_pool.to_string(),
            role: told_role.clone(),
            trust_pem: told_trust.pem.clone(),
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
        self.described = None;
        Some(holdings(state, node_id, &hello.image_digests))
    }

    /// Takes over what a node says of itself now.
    pub(super) fn note_description(&mut self, node_id: NodeId, json: &str) {
        let Some(session) = self.open.get_mut(&node_id) else { return };
        match description(json) {
            Ok(description) => {
                session.description = description;
                self.described = None;
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
        let is_current = self.described.as_ref().is_some_and(|(nodes, again_at)| {
            nodes.ptr_eq(state.nodes()) && again_at.is_none_or(|at| now < at)
        });
        if is_current {
            return Vec::new(); // The claims of all nodes are worth collecting only for news.
        }
        let mut claims = Claims::of(state);
        let level = level::of_managers(state);
        let is_known = level >= level::FACTS;
        let (mut actions, mut again_at) = (Vec::new(), None);
        for (node_id, session) in &mut self.open {
            let Some(node) = state.node(*node_id) else { continue };
            let due_at = session.described_at.map(|at| at.after(DESCRIPTION_PERIOD));
            let wait = due_at.filter(|at| now < *at);
            if wait.is_some() || actions.len() == n_max {
                again_at = [again_at, wait.or(Some(now))].into_iter().flatten().min();
                continue;
            }
            let mut changed = (**node).clone();
            let mut description = claims.accept(*node_id, &session.description);
            if level < level::CONTROL {
                // A manager that has not said its level yet is no reason to forget what is stored.
                let stored = node.description.as_ref();
                description.tls_info = stored.and_then(|stored| stored.tls_info.clone());
            }
            changed.description = Some(description);
            changed.status.addr = session.address.ip().to_string();
            changed.status.port = session.address.port();
            let conditions = session.conditions.as_ref();
            if let Some(conditions) = conditions.filter(|said| is_known || said.is_empty()) {
                changed.status.port_conditions.clone_from(conditions);
            }
            if changed != **node {
                session.described_at = Some(now);
                let expect = Expect::Version(node.meta.version);
                actions.push(Action::Put { object: Object::Node(Box::new(changed)), expect });
                // If it is refused it is decided anew.
                let due_at = now.after(DESCRIPTION_PERIOD);
                again_at = Some(again_at.map_or(due_at, |at: Timestamp| at.min(due_at)));
            }
        }
        self.described = Some((state.nodes().clone(), again_at));
        actions
    }

    /// Whether that was the node's current session.
    pub(super) fn close(&mut self, node_id: NodeId, session_id: u64) -> bool {
        let is_current = self.is_current(node_id, session_id);
        if is_current {
            self.open.remove(&node_id);
        }
        is_current
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
        self.described = None;
        for condition in read.iter().filter(|condition| !known.contains(condition)) {
            let (port, protocol) = (condition.published_port, condition.protocol.name());
            let message = &condition.message;
            tracing::warn!(node.id = %node_id, "port {port}/{protocol} of a node {message}");
        }
    }

    /// Takes note of the nodes for which the newest table has nothing new: they are told nothing.
    pub(super) fn skip_unconcerned(&mut self, drain: &mut Drain) {
        let newest = drain.version();
        for (node_id, session) in &mut self.open {
            let Some((version, told)) = &mut session.told_table else { continue };
            if *version != newest && drain.of_node(*node_id).is_same(told) {
                *version = newest;
                drain.has_no_news_for(*node_id);
            }
        }
    }

    /// Has nodes get certificates of another root, some at a time.
    pub(super) fn renew(&mut self, state: &State, now: Timestamp) {
        for node_id in self.renewals.due(state, self.open.keys(), now) {
            if let Some(session) = self.open.get_mut(&node_id) {
                (session.must_renew, session.is_dirty) = (true, true);
            }
        }
    }

    /// Tells every node what is new for it, as far as its queue has room.
    pub(super) fn dispatch(
        &mut self,
        state: &State,
        drain: &mut Drain,
        held_back: BTreeSet<TaskId>,
        now: Timestamp,
    ) {
        self.look_at(state);
        for task_id in held_back.symmetric_difference(&self.held_back).copied().collect::<Vec<_>>()
        {
            if let Some(node_id) = state.task(task_id).and_then(|task| task.node_id) {
                self.mark(node_id);
            }
        }
        self.held_back = held_back;
        let version = drain.version();
        let is_stale = |session: &Session| {
            session.told_table.as_ref().is_none_or(|(told, _)| *told != version)
        };
        if !self.open.values().any(|session| session.is_dirty || is_stale(session)) {
            return;
        }
        if std::mem::take(&mut self.are_duties_stale) {
            self.duties = assignments::copy_duties(state);
        }
        self.open.retain(|node_id, _| {
            let is_member = state.node(*node_id).is_some();
            if !is_member {
                drain.session_closed(*node_id); // Nobody waits for a node that was removed.
            }
            is_member
        });
        let for_all = ForAll { managers: manager_addresses(state), trust: Trust::of(state) };
        let mut gone = Vec::new();
        for (node_id, session) in &mut self.open {
            if !session.is_dirty && !is_stale(session) {
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
            let is_news = is_stale(session);
            let table = is_news.then(|| (version, drain.of_node(*node_id)));
            let message = news(session, state, *node_id, set, table, &for_all, now);
            if is_news {
                drain.sent(*node_id);
            }
            if let Some(assignments) = message {
                permit.send(Ok(DispatcherMessage {
                    message: Some(Message::Assignments(assignments)),
                }));
            }
        }
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
struct ForAll {
    managers: Vec<String>,
    trust: Trust,
}

fn news(
    session: &mut Session,
    state: &State,
    node_id: NodeId,
    set: assignments::AssignmentSet,
    table: Option<(u64, NodeTable)>,
    for_all: &ForAll,
    now: Timestamp,
) -> Option<Assignments> {
    let ForAll { managers, trust } = for_all;
    let told = session.told_table.as_ref().map(|(_, told)| told);
    let mesh = table.as_ref().map(|(version, table)| mesh_update(told, *version, table));
    let role = state.node(node_id).map(|node| role_of(node)).unwrap_or_default();
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
        None if mesh.is_some()
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
    if table.is_some() {
        session.told_table = table;
        message.mesh = mesh;
    }
    if is_management_new {
        session.told_managers.clone_from(managers);
        message.managers.clone_from(managers);
    }
    if is_role_new {
        session.told_role.clone_from(&role);
        message.role = role;
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

/// What makes the table that the node was told the newest one.
fn mesh_update(told: Option<&NodeTable>, version: u64, table: &NodeTable) -> MeshUpdate {
    let empty = NodeTable::default();
    let node_changes = told.unwrap_or(&empty).diff(table);
    let changes = &node_changes.table;
    let key = |(protocol, published): &PortKey| MeshPortKey {
        protocol: protocol.name().to_owned(),
        published: (*published).into(),
    };
    let peer = |(number, peer): (&u16, &Arc<endpoints::Peer>)| MeshPeer {
        number: (*number).into(),
        underlay: peer.underlay.to_string(),
        has_ipv6: peer.ipv6.is_some(),
        ipv6: peer.ipv6.iter().flatten().map(ToString::to_string).collect(),
        wireguard: peer.wireguard.as_ref().map(wireguard_keys),
        node_id: peer.node_id.to_string(),
        port: peer.port.into(),
        user_space: peer.is_in_user_space,
    };
    MeshUpdate {
        version,
        whole: told.is_none(),
        peers: changes.peers.iter().map(peer).collect(),
        removed_peers: changes.removed_peers.iter().map(|number| u32::from(*number)).collect(),
        ports: changes.ports.iter().map(mesh_port).collect(),
        removed_ports: changes.removed_ports.iter().map(key).collect(),
        networks: node_changes.networks.iter().map(network_update).collect(),
        removed_networks: node_changes.removed_networks.iter().map(ToString::to_string).collect(),
    }
}

fn wireguard_keys(keys: &WireguardKeys) -> skep_proto::WireguardKeys {
    let key = |key: &WireguardKey| skep_proto::WireguardKey {
        slot: key.slot.into(),
        public_key: key.public_key.0.to_vec().into(),
        port: key.port.into(),
    };
    skep_proto::WireguardKeys {
        current: keys.current.into(),
        keys: keys.keys.iter().map(key).collect(),
    }
}

fn mesh_port((id, port): (&PortKey, &Arc<endpoints::Port>)) -> MeshPort {
    let backend = |(task_id, address): (&TaskId, &std::net::Ipv4Addr)| MeshBackend {
        task_id: task_id.to_string(),
        address: address.to_string(),
        target_port: port.target_port.into(),
    };
    MeshPort {
        protocol: id.0.name().to_owned(),
        published: id.1.into(),
        service_id: port.service_id.to_string(),
        service: port.service.clone(),
        policy: port.policy.name().to_owned(),
        proxy_protocol: port
            .proxy_protocol
            .map(|version| version.name().to_owned())
            .unwrap_or_default(),
        backends: port.backends.iter().map(backend).collect(),
    }
}

fn network_update((network_id, changes): (&NetworkId, &NetworkChanges)) -> NetworkUpdate {
    NetworkUpdate {
        id: network_id.to_string(),
        whole: changes.is_whole,
        settings: changes.settings.as_ref().map(network_settings),
        endpoints: changes.endpoints.iter().map(|(id, place)| endpoint(*id, place)).collect(),
        removed_endpoints: changes.removed_endpoints.iter().map(ToString::to_string).collect(),
        services: changes.services.iter().map(|(id, entry)| network_service(*id, entry)).collect(),
        removed_services: changes.removed_services.iter().map(ToString::to_string).collect(),
    }
}

fn network_settings(settings: &Settings) -> NetworkSettings {
    NetworkSettings {
        name: settings.name.clone(),
        vni: settings.vni,
        subnets: settings.subnets.iter().map(ToString::to_string).collect(),
        mtu: settings.mtu,
        internal: settings.internal,
        encrypted: settings.encrypted,
    }
}

fn endpoint(task_id: TaskId, endpoint: &Endpoint) -> NetworkEndpoint {
    NetworkEndpoint {
        task_id: task_id.to_string(),
        service_id: endpoint.service_id.to_string(),
        name: endpoint.name.clone(),
        addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
        node_number: endpoint.node_number.into(),
        serving: endpoint.serving,
        hostname: endpoint.hostname.clone().unwrap_or_default(),
    }
}

fn network_service(service_id: ServiceId, entry: &NetworkService) -> skep_proto::NetworkService {
    skep_proto::NetworkService {
        service_id: service_id.to_string(),
        name: entry.name.clone(),
        aliases: entry.aliases.clone(),
        virtual_ips: entry.virtual_ips.iter().map(ToString::to_string).collect(),
        ports: entry.ports.iter().map(named_port).collect(),
    }
}

fn named_port(port: &NamedPort) -> skep_proto::NamedPort {
    skep_proto::NamedPort {
        name: port.name.clone(),
        protocol: port.protocol.name().to_owned(),
        target_port: port.target_port.into(),
    }
}

#[cfg(test)]
mod tests;
