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
    PortCondition, REMOVED_METADATA, Welcome,
};
use skep_runtime::identity::sign_grant;
use tonic::Status;
use tonic::metadata::MetadataValue;

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
        let (Some(node), Some(cluster)) = (state.node(node_id), state.cluster()) else {
            let mut status =
                Status::permission_denied(format!("node {node_id} is no member of this swarm"));
            status.metadata_mut().insert(REMOVED_METADATA, MetadataValue::from_static("true"));
            return refuse(status);
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
mod tests {
    use skep_common::object::Image;
    use skep_common::spec::{NodeRole, NodeSpec};
    use skep_common::{ImageId, Meta};
    use skep_manager_core::{Command, TaskPatch};

    use super::*;

    /// A manager, whose daemon says which level it knows.
    fn manager(id: u16, format_level: u32) -> Action {
        let description = NodeDescription { format_level, ..NodeDescription::default() };
        let node = object::Node {
            id: NodeId(id.into()),
            meta: Meta::default(),
            spec: NodeSpec { role: NodeRole::Manager, ..NodeSpec::default() },
            description: Some(description),
            status: object::NodeStatus::default(),
            manager_status: None,
            number: id,
            role: None,
        };
        Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Absent }
    }

    /// A session of a node with that description.
    fn session(description: NodeDescription) -> Session {
        Session {
            id: 1,
            to_agent: tokio::sync::mpsc::channel(1).0,
            stream: Stream::default(),
            told_table: None,
            told_managers: Vec::new(),
            told_role: String::new(),
            told_trust: Trust::default(),
            must_renew: false,
            conditions: None,
            images: BTreeSet::new(),
            is_dirty: false,
            description,
            described_at: None,
            address: std::net::SocketAddr::from(([192, 0, 2, 1], 2377)),
        }
    }

    #[test]
    fn what_nodes_say_of_ports_waits_until_all_managers_keep_it() {
        let said = |port: u32| PortCondition {
            service_id: ServiceId(7).to_string(),
            protocol: "tcp".into(),
            port,
            message: "is held by nginx (pid 812)".into(),
        };
        for (other, expect) in [(0, 1), (3, 3)] {
            let mut state = State::default();
            let managers = vec![manager(1, 3), manager(2, other)];
            state.apply(1, &Command::new(Timestamp(1), managers));
            let mut sessions = Sessions::new(1);
            let description = NodeDescription { format_level: 3, ..NodeDescription::default() };
            sessions.open.insert(NodeId(1), session(description));
            sessions.note_conditions(NodeId(1), vec![said(80)]);
            let command =
                Command::new(Timestamp(2), sessions.descriptions(&state, Timestamp(2), 9));
            assert_eq!((command.actions.len(), command.level), (1, expect), "its address is new");
            state.apply(2, &command);
            assert_eq!(sessions.descriptions(&state, Timestamp(2), 9), [], "that is stored");
            sessions.note_description(NodeId(1), "{\"Hostname\": \"n1\"}");
            assert_eq!(sessions.descriptions(&state, Timestamp(2), 9), [], "that was just now");
            let later = Timestamp(2).after(DESCRIPTION_PERIOD);
            assert_eq!(sessions.descriptions(&state, later, 9).len(), 1);
        }
    }

    #[test]
    fn what_nodes_say_is_bounded_and_safe_for_terminals() {
        let mut sessions = Sessions::new(1);
        sessions.open.insert(NodeId(1), session(NodeDescription::default()));
        let said = |port: u32| PortCondition {
            service_id: ServiceId(7).to_string(),
            protocol: "tcp".into(),
            port,
            message: format!("is held by \u{1b}[2J\n{}", "x".repeat(5000)),
        };
        sessions.note_conditions(NodeId(1), (1..5000).map(said).collect());
        let known = sessions.open[&NodeId(1)].conditions.clone().unwrap();
        assert_eq!(known.len(), PORT_CONDITIONS_MAX);
        assert!(known[0].message.starts_with("is held by \u{fffd}[2J\u{fffd}xx"));
        assert_eq!(known[0].message.chars().count(), CONDITION_CHARS_MAX);
        let long = format!("{{\"Hostname\": {:?}}}", "x".repeat(DESCRIPTION_BYTES_MAX));
        sessions.note_description(NodeId(1), &long);
        assert_eq!(sessions.open[&NodeId(1)].description, NodeDescription::default());
    }

    #[test]
    fn a_node_that_lacks_an_image_corrects_a_store_that_says_it_holds_it() {
        for (name, holders, held, expect) in [
            ("a copy that arrived", &[][..], true, Some(true)),
            ("a copy that cannot be had", &[2], false, None),
            ("one that is not there", &[1, 2], false, Some(false)),
        ] {
            let image = Image {
                id: ImageId(1),
                meta: Meta::default(),
                name: "docker.io/library/i:latest".into(),
                digest: "sha256:1".into(),
                size: 1,
                created: None,
                holders: holders.iter().map(|id| NodeId(*id)).collect(),
            };
            let object = Object::Image(Box::new(image));
            let put = Action::Put { object, expect: Expect::Absent };
            let mut state = State::default();
            state.apply(1, &Command::new(Timestamp(1), vec![put]));
            let report = ImageReport { digest: "sha256:1".into(), held, error: String::new() };
            let actions = Sessions::new(1).note_image(&state, NodeId(1), report);
            let correction = |holds| {
                let digest = "sha256:1".to_owned();
                Action::ImageHolder { digest, node_id: NodeId(1), holds }
            };
            assert_eq!(actions, expect.map(correction).into_iter().collect::<Vec<_>>(), "{name}");
        }
    }

    #[test]
    fn nobody_waits_for_the_acknowledgement_of_a_node_that_was_removed() {
        let (service_id, task_id) = (ServiceId(7), TaskId(9));
        let service = serde_json::json!({
            "ID": service_id, "Spec": {"Name": "web"}, "SpecVersion": {"Index": 1},
            "Endpoint": {"Ports": [{"TargetPort": 80, "PublishedPort": 8080}]},
        });
        let task = serde_json::json!({
            "ID": task_id, "Spec": {}, "SpecVersion": {"Index": 1}, "ServiceID": service_id, "Slot": 1,
            "NodeID": NodeId(1), "Status": {"State": "running"}, "DesiredState": "running",
            "NetworksAttachments": [{"Ingress": true, "Address": "10.0.0.2", "Prefix": 24}],
            "ServiceName": "web",
        });
        let put = |object| Action::Put { object, expect: Expect::Absent };
        let objects = [
            Object::Service(Box::new(serde_json::from_value(service).unwrap())),
            Object::Task(Box::new(serde_json::from_value(task).unwrap())),
        ];
        let mut actions = vec![manager(1, 3), manager(2, 3)];
        actions.extend(objects.map(put));
        let (mut state, now) = (State::default(), Timestamp(1));
        state.apply(1, &Command::new(now, actions));
        let mut drain = Drain::new(&state, &BTreeSet::new(), now);
        let mut sessions = Sessions::new(1);
        for node_id in [NodeId(1), NodeId(2)] {
            sessions.open.insert(node_id, session(NodeDescription::default()));
            drain.session_opened(node_id);
        }
        let desired_state = Some(skep_common::TaskState::Shutdown);
        let stop = TaskPatch { desired_state, ..TaskPatch::of(task_id) };
        state.apply(2, &Command::new(now, vec![Action::PatchTask(stop)]));
        assert!(drain.update(&state, &BTreeSet::new(), now));
        drain.acknowledge(NodeId(1), drain.version());
        assert_eq!(drain.held_back(&state, now), [task_id].into(), "the other node has it still");

        let gone = Action::Delete { kind: skep_common::Kind::Node, id: 2 };
        state.apply(3, &Command::new(now, vec![gone]));
        drain.update(&state, &BTreeSet::new(), now);
        drain.acknowledge(NodeId(1), drain.version());
        sessions.dispatch(&state, &mut drain, BTreeSet::new(), now);
        assert_eq!(drain.held_back(&state, now), BTreeSet::new());
    }
}
