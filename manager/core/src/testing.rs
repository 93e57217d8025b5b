//! Clusters as words, and plans as words: what the tables of the tests are written in.
//!
//! A node is `NUMBER[:ATTRIBUTE]…` with attributes `down`, `disconnected`, `unknown`, `drain`, `pause`,
//! `user-space`,
//! `cpu=CORES`, `mem=MIB`, `has-KIND=VALUE` (a generic resource), `KEY=VALUE` (a label). A task is `SLOT@NODE:STATE[>DESIRED][~VERSION]`, `-`
//! for no node; the state `unhealthy` is `running` with a failing health check. Task ids count from
//! 1 in the order written. The slot `gNODE` is that of a global service's task on a node.
//!
//! Of a plan, `+SLOT@NODE` makes a task (`>ready` if it is to wait), `ID@NODE` places one, `ID?` says
//! why it waits, `!ID` shuts down, `-ID` asks for its deletion, `>ID` lets it run, `xID` erases it,
//! `ID:orphaned` gives it up, `web=STATE` is the state of an update and `xweb` erases the service.

use rand::SeedableRng;
use rand::rngs::StdRng;
use skep_common::object::{
    IngressBalancer, IngressDescription, NodeDescription, NodeState, Slot, TaskStatus,
};
use skep_common::spec::{Availability, Platform, Replicated, ServiceMode, ServiceSpec};
use skep_common::{
    Cluster, ClusterId, Kind, Meta, Node, NodeId, Object, Service, ServiceId, Task, TaskId,
    TaskState, Timestamp, Version,
};

use crate::command::{Action, Command, Expect, Outcome, TaskPatch};
use crate::plan::{Dirty, LeaderMemory, Plan, plan};
use crate::store::{Change, State};

/// The service of the tables.
pub const WEB: ServiceId = ServiceId(7);
/// When the tables play.
pub const NOW: Timestamp = Timestamp::from_secs(1_000_000);

/// A ready, active node with 4 cores and 8 GiB.
pub fn node(number: u16) -> Node {
    let mut description =
        NodeDescription { hostname: format!("n{number}"), ..NodeDescription::default() };
    description.platform = Platform { os: "linux".into(), architecture: "x86_64".into() };
    description.resources.nano_cpus = Some(4_000_000_000);
    description.resources.memory_bytes = Some(8 << 30);
    let mut node = Node {
        id: NodeId(number.into()),
        meta: Meta::default(),
        spec: skep_common::spec::NodeSpec::default(),
        description: Some(description),
        status: skep_common::object::NodeStatus::default(),
        manager_status: None,
        number,
        role: None,
    };
    node.status.state = NodeState::Ready;
    node.status.addr = format!("192.0.2.{}", number % 250 + 1);
    node
}

/// A swarm with nothing said about it.
pub fn cluster() -> Cluster {
    Cluster {
        id: ClusterId(1),
        meta: Meta::default(),
        spec: skep_common::spec::SwarmSpec::default(),
        join_tokens: skep_common::object::JoinTokens::default(),
        root_ca_cert: String::new(),
        root_ca_key: String::new(),
        ingress_pool: crate::allocator::DEFAULT_POOL,
        default_addr_pool: Vec::new(),
        subnet_size: 0,
        root_rotation: None,
        unlock_key: None,
        unlock_key_version: 0,
        blacklisted: Default::default(),
        longest_node_cert_expiry: None,
    }
}

/// A node from its word.
pub fn parse_node(word: &str) -> Node {
    let mut parts = word.split(':');
    let number =
        parts.next().and_then(|number| number.parse().ok()).expect("a word starts with a number");
    let mut node = node(number);
    for attribute in parts {
        let resources = &mut node.description.as_mut().expect("made above").resources;
        match attribute.split_once('=').unwrap_or((attribute, "")) {
            ("ready", _) => node.status.state = NodeState::Ready,
            ("down", _) => node.status.state = NodeState::Down,
            ("disconnected", _) => node.status.state = NodeState::Disconnected,
            ("unknown", _) => node.status.state = NodeState::Unknown,
            ("drain", _) => node.spec.availability = Availability::Drain,
            ("pause", _) => node.spec.availability = Availability::Pause,
            ("cpu", cores) => {
                resources.nano_cpus = cores.parse::<i64>().ok().map(|cores| cores * 1_000_000_000);
            }
            ("user-space", _) => {
                let ingress = IngressDescription {
                    balancer: IngressBalancer::UserSpace,
                    ..IngressDescription::default()
                };
                node.description.as_mut().expect("made above").ingress = Some(ingress);
            }
            ("mem", mib) => resources.memory_bytes = mib.parse::<i64>().ok().map(|mib| mib << 20),
            (key, value) if key.starts_with("has-") => {
                let text = format!("{}={value}", &key["has-".len()..]);
                let parsed = skep_common::spec::generic::parse_of_node(&[text]);
                let list = resources.generic_resources.get_or_insert_default();
                list.extend(parsed.expect("a generic resource is KIND=VALUE"));
            }
            (key, value) => {
                let labels = node.spec.labels.get_or_insert_default();
                labels.insert(key.to_owned(), value.to_owned());
            }
        }
    }
    node
}

/// The service `web` with a number of replicas.
pub fn service(replicas: u64) -> Service {
    let replicated = Some(Replicated { replicas: Some(replicas) });
    let mode = Some(ServiceMode { replicated, ..ServiceMode::default() });
    Service {
        id: WEB,
        meta: Meta::default(),
        spec: ServiceSpec { name: "web".to_owned(), mode, ..ServiceSpec::default() },
        previous_spec: None,
        spec_version: Version::default(),
        update_status: None,
        endpoint: skep_common::object::Endpoint::default(),
        pending_delete: false,
        conditions: Vec::new(),
        job_status: None,
        revision: 0,
    }
}

/// A task of `service` from its word.
pub fn parse_task(service: &Service, id: u128, word: &str) -> Task {
    let (word, version) = word.split_once('~').unwrap_or((word, ""));
    let (word, desired) = word.split_once('>').unwrap_or((word, ""));
    let (slot, rest) = word.split_once('@').expect("a task is SLOT@NODE:STATE");
    let (node, state_name) = rest.split_once(':').expect("a task is SLOT@NODE:STATE");
    let preset = slot.strip_prefix('g').and_then(|node| node.parse().ok()).map(NodeId);
    let by_name = |name: &str| TaskState::ALL.into_iter().find(|state| state.name() == name);
    let is_unhealthy = state_name == "unhealthy";
    let state = if is_unhealthy { Some(TaskState::Running) } else { by_name(state_name) };
    let state = state.expect("a task has a known state");
    let is_job = service.job_status.is_some();
    let default = match state {
        TaskState::Shutdown => TaskState::Shutdown,
        _ if is_job => TaskState::Complete,
        _ => TaskState::Running,
    };
    let index = version.parse().unwrap_or(service.spec_version.index);
    let mut task = Task {
        id: TaskId(id),
        meta: Meta::default(),
        spec: service.spec.task_template.clone().into(),
        spec_version: Version { index },
        service_id: service.id,
        slot: if preset.is_some() { 0 } else { slot.parse().expect("a slot is a number") },
        node_id: node.parse().ok().map(NodeId),
        status: TaskStatus {
            timestamp: NOW,
            state,
            unhealthy: is_unhealthy,
            ..TaskStatus::default()
        },
        desired_state: by_name(desired).unwrap_or(default),
        networks_attachments: Vec::new(),
        service_name: service.spec.name.clone(),
        start_after: None,
        host_ports: crate::ports::host_mode(&service.endpoint.ports),
        standalone: None,
        job_iteration: is_job.then_some(Version { index }),
        preset_node: preset,
        assigned_generic_resources: Vec::new(),
        service_labels: None,
    };
    task.status.applied_at = Some(NOW);
    if index != service.spec_version.index {
        std::sync::Arc::make_mut(&mut task.spec).force_update = Some(1); // What makes it differ from the service's template.
    }
    task
}

/// A store with a leader, and the clock and random numbers that it is given.
#[derive(Debug)]
pub struct World {
    /// The store.
    pub state: State,
    /// The leader's memory.
    pub memory: LeaderMemory,
    /// The clock.
    pub now: Timestamp,
    /// Random numbers.
    pub rng: StdRng,
    /// What the leader has not looked at yet.
    pub dirty: Dirty,
}

impl World {
    /// A swarm with these nodes and the service `web` with these tasks.
    pub fn new(nodes: &str, service: Service, tasks: &str) -> Self {
        let mut world = Self {
            state: State::default(),
            memory: LeaderMemory::default(),
            now: NOW,
            rng: StdRng::seed_from_u64(1),
            dirty: Dirty::all(),
        };
        let nodes = nodes.split_whitespace().map(|word| Object::Node(Box::new(parse_node(word))));
        let mut objects: Vec<Object> = nodes.collect();
        let service_id = service.id;
        objects.push(Object::Service(Box::new(service)));
        world.put(objects);
        let service = world.state.service(service_id).cloned().expect("it was just made");
        let tasks = (1..).zip(tasks.split_whitespace());
        let tasks = tasks.map(|(id, word)| Object::Task(Box::new(parse_task(&service, id, word))));
        let tasks: Vec<Object> = tasks.collect();
        world.put(tasks);
        world
    }

    /// The service of the tables.
    pub fn web(&self) -> Service {
        (**self.state.service(WEB).expect("the tables have this service")).clone()
    }

    /// Creates objects.
    pub fn put(&mut self, objects: Vec<Object>) {
        let put = |object| Action::Put { object, expect: Expect::Absent };
        self.apply(objects.into_iter().map(put).collect());
    }

    /// Replaces an object.
    pub fn replace(&mut self, object: Object) {
        self.apply(vec![Action::Put { object, expect: Expect::Present }]);
    }

    /// Commits actions, which must not be refused.
    pub fn apply(&mut self, actions: Vec<Action>) -> Vec<Change> {
        if actions.is_empty() {
            return Vec::new();
        }
        let index = self.state.version().index + 1;
        let (outcome, changes) = self.state.apply(index, &Command::new(self.now, actions));
        assert!(matches!(outcome, Outcome::Applied(_)), "{outcome:?}");
        self.dirty.extend(&changes);
        changes
    }

    /// A worker's report of a task's state.
    pub fn report(&mut self, task_id: TaskId, state: TaskState) {
        let status = TaskStatus { timestamp: self.now, state, ..TaskStatus::default() };
        self.apply(vec![Action::PatchTask(TaskPatch {
            status: Some(status),
            ..TaskPatch::of(task_id)
        })]);
    }

    /// One pass, not committed.
    pub fn plan(&mut self) -> Plan {
        let dirty = std::mem::take(&mut self.dirty);
        plan(&self.state, &mut self.memory, &dirty, self.now, &mut self.rng)
    }

    /// One pass, committed; its words.
    pub fn step(&mut self) -> String {
        let plan = self.plan();
        let words = render(&self.state, &plan.actions);
        self.apply(plan.actions);
        words
    }

    /// Checks one pass, and that it leaves nothing to do for the same leader or for a new one.
    #[track_caller]
    pub fn expect_step(&mut self, name: &str, expect: &str) {
        assert_eq!(self.step(), expect, "{name}");
        self.expect_settled(name);
    }

    /// Checks that neither this leader nor a new one has anything to do.
    #[track_caller]
    pub fn expect_settled(&mut self, name: &str) {
        assert_eq!(self.step(), "", "{name}: the same leader plans again");
        let memory = std::mem::take(&mut self.memory);
        self.dirty = Dirty::all();
        assert_eq!(self.step(), "", "{name}: a new leader plans again");
        self.memory = memory;
    }
}

/// The words of actions, sorted.
pub fn render(state: &State, actions: &[Action]) -> String {
    let mut words: Vec<String> =
        actions.iter().map(|action| render_action(state, action)).collect();
    words.sort();
    words.join(" ")
}

fn render_action(state: &State, action: &Action) -> String {
    let at = |node_id: Option<NodeId>| node_id.map_or("-".to_owned(), |id| id.0.to_string());
    match action {
        Action::Put { object: Object::Task(task), expect: Expect::Absent } => {
            let waits = if task.desired_state == TaskState::Ready { ">ready" } else { "" };
            let slot = match task.slot_key() {
                Slot::Replica(number) => number.to_string(),
                Slot::Node(node_id) => format!("g{}", node_id.0),
            };
            format!("+{slot}@{}{waits}", at(task.node_id))
        }
        Action::Put { object: Object::Task(task), .. } => {
            format!("{}@{}", task.id.0, at(task.node_id))
        }
        Action::Put { object: Object::Service(service), .. } => {
            let status = service.update_status.as_ref().map_or("", |status| status.state.as_str());
            format!("{}={status}", service.spec.name)
        }
        Action::Put { object, .. } => format!("{:?}", object.kind()),
        Action::Delete { kind: Kind::Task, id } => format!("x{id}"),
        Action::Delete { kind: Kind::Service, id } => {
            let name = state.service(ServiceId(*id)).map(|service| service.spec.name.as_str());
            format!("x{}", name.unwrap_or("?"))
        }
        Action::Delete { kind, id } => format!("x{kind:?}{id}"),
        Action::ImageHolder { digest, node_id, holds } => format!("{digest}@{}={holds}", node_id.0),
        Action::PatchTask(patch) => render_patch(patch),
    }
}

fn render_patch(patch: &TaskPatch) -> String {
    let id = patch.task_id.map_or(0, |task_id| task_id.0);
    match (patch.desired_state, &patch.status, patch.node_id) {
        (Some(TaskState::Shutdown), ..) => format!("!{id}"),
        (Some(TaskState::Remove), ..) => format!("-{id}"),
        (Some(TaskState::Running | TaskState::Complete), _, None) => format!(">{id}"),
        (_, _, Some(node_id)) => format!("{id}@{}", node_id.0),
        (_, Some(status), _) if status.state == TaskState::Orphaned => format!("{id}:orphaned"),
        (_, Some(_), _) => format!("{id}?"),
        _ => format!("{id}*"),
    }
}
