//! The agent against a dispatcher of the test's own and an executor that runs nothing.

mod attempts;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message as _;
use skep_common::object::{ContainerStatus, NetworkAttachment, NodeDescription, TaskStatus};
use skep_common::spec::{
    NodeRole, PortConfig, PortProtocol, PublishMode, RestartCondition, RestartPolicy, TaskSpec,
};
use skep_common::{ClusterId, Meta, NodeId, ServiceId, Task, TaskId, TaskState, Version};
use skep_proto::agent_message::Message as FromAgent;
use skep_proto::dispatcher_message::Message;
use skep_proto::dispatcher_server::{Dispatcher, DispatcherServer};
use skep_proto::{
    AgentMessage, Assignments, DispatcherMessage, HeartbeatRequest, HeartbeatResponse, Hello,
    MeshBackend, MeshPort, MeshUpdate, PortCondition, RegisterImageRequest, RegisterImageResponse,
    Welcome,
};
use skep_runtime::gate::Gate;
use skep_runtime::identity::{Authority, Credentials, Csr};
use skep_runtime::transport::{ChannelPool, Tls, serve_tls};
use skep_runtime::{TaskSet, clock};
use skep_worker_core::health::HealthCheck;
use skep_worker_core::mesh::MeshTable;
use skep_worker_core::network::NetworkTables;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use super::images::tests::{import, until_stored};
use super::{Agent, AgentOptions, Balancers, Beats, Images, Managers, Payloads, TermKeeper};
use crate::executor::{Error, Executor, Exit, Found, TaskPayloads};
use crate::images::ImageStore;

/// Nothing here takes longer on a machine that lives.
const PATIENCE: Duration = Duration::from_secs(30);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let result = tokio::time::timeout(PATIENCE, future).await;
    result.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// An executor whose containers end when the test, or a stop, says so.
#[derive(Debug, Default)]
struct Puppets {
    exits: Mutex<BTreeMap<TaskId, watch::Sender<Option<Exit>>>>,
    calls: Mutex<Vec<String>>,
    healthy: watch::Sender<bool>,
    has_check: bool,
    found: Vec<TaskId>,
}

impl Puppets {
    fn note(&self, call: &str, task_id: TaskId) {
        self.calls.lock().unwrap().push(format!("{call} {}", task_id.0));
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn exit_of(&self, task_id: TaskId) -> watch::Sender<Option<Exit>> {
        self.exits.lock().unwrap().entry(task_id).or_insert_with(|| watch::channel(None).0).clone()
    }

    fn end(&self, task_id: TaskId, code: i32) {
        let exit = Exit { code, oom_killed: false, error: None };
        self.exit_of(task_id).send_replace(Some(exit));
    }
}

#[tonic::async_trait]
impl Executor for Puppets {
    async fn prepare(&self, task: &Task, payloads: &TaskPayloads) -> Result<(), Error> {
        self.note("prepare", task.id);
        self.exit_of(task.id).send_replace(None);
        for payload in payloads.values() {
            self.calls.lock().unwrap().push(format!("{payload:?}"));
        }
        if task.service_name == "broken" { Err(Error("no such image".into())) } else { Ok(()) }
    }

    async fn start(&self, task: &Task) -> Result<ContainerStatus, Error> {
        self.note("start", task.id);
        Ok(ContainerStatus { pid: 7, ..ContainerStatus::default() })
    }

    async fn health_check(&self, _: &Task) -> Result<Option<HealthCheck>, Error> {
        Ok(self.has_check.then(|| HealthCheck {
            argv: vec!["check".into()],
            interval: Duration::from_millis(1),
            timeout: PATIENCE,
            start_period: Duration::ZERO,
            start_interval: Duration::from_millis(1),
            retries: 2,
        }))
    }

    async fn run_check(&self, _: TaskId, _: &[String], _: Duration) -> (bool, String) {
        (*self.healthy.borrow(), "output".into())
    }

    async fn wait(&self, task_id: TaskId) -> Exit {
        let mut exits = self.exit_of(task_id).subscribe();
        exits.wait_for(Option::is_some).await.unwrap().clone().unwrap()
    }

    async fn stop(&self, task: &Task) -> Result<(), Error> {
        self.note("stop", task.id);
        self.end(task.id, 143);
        Ok(())
    }

    async fn remove(&self, task_id: TaskId) -> Result<(), Error> {
        self.note("remove", task_id);
        Ok(())
    }

    async fn find(&self) -> Result<Vec<(TaskId, Found)>, Error> {
        let found = |id: &TaskId| {
            (*id, Found::Started(ContainerStatus { pid: 7, ..ContainerStatus::default() }))
        };
        Ok(self.found.iter().map(found).collect())
    }
}

/// Both ends of a session that an agent opened.
type Opened = (mpsc::Sender<Result<DispatcherMessage, Status>>, Streaming<AgentMessage>);

/// One session, from the leader's side.
struct Session {
    to_agent: mpsc::Sender<Result<DispatcherMessage, Status>>,
    from_agent: Streaming<AgentMessage>,
}

impl Session {
    async fn welcome(&self, term: u64) {
        let welcome = Welcome {
            heartbeat_millis: 1000,
            term,
            node_number: 1,
            ingress_pool: "10.192.0.0/10".into(),
            ..Welcome::default()
        };
        self.send(Message::Welcome(welcome)).await;
    }

    async fn send(&self, message: Message) {
        let sent = self.to_agent.send(Ok(DispatcherMessage { message: Some(message) })).await;
        assert!(sent.is_ok(), "the agent ended the session");
    }

    async fn assign(&self, applies_to: u64, tasks: &[Task], removed: &[TaskId]) {
        let assignments = Assignments {
            applies_to,
            results_in: applies_to + 1,
            task_jsons: tasks.iter().map(|task| serde_json::to_string(task).unwrap()).collect(),
            removed_tasks: removed.iter().map(ToString::to_string).collect(),
            ..Assignments::default()
        };
        self.send(Message::Assignments(assignments)).await;
    }

    async fn tell_table(&self, applies_to: u64, update: &MeshUpdate) {
        let (results_in, mesh) = (applies_to + 1, update.encode_to_vec().into());
        let assignments = Assignments { applies_to, results_in, mesh, ..Assignments::default() };
        self.send(Message::Assignments(assignments)).await;
    }

    /// Reads messages until that table is in force.
    async fn until_applied(&mut self, version: u64) {
        soon("the acknowledgement of a table", async {
            loop {
                let message = self.from_agent.next().await.expect("the session is open").unwrap();
                if let Some(FromAgent::MeshApplied(applied)) = message.message
                    && applied.version == version
                {
                    return;
                }
            }
        })
        .await;
    }

    /// Reads reports until a task has reached `state`, and returns that status. States never fall.
    async fn until(&mut self, task_id: TaskId, wanted: impl Fn(&TaskStatus) -> bool) -> TaskStatus {
        let mut last = TaskState::New;
        soon("a report", async {
            loop {
                let message = self.from_agent.next().await.expect("the session is open").unwrap();
                let Some(FromAgent::Report(report)) = message.message else { continue };
                for report in
                    report.tasks.iter().filter(|report| report.task_id == task_id.to_string())
                {
                    let status: TaskStatus = serde_json::from_str(&report.status_json).unwrap();
                    assert!(status.state >= last, "{} after {last}", status.state);
                    last = status.state;
                    if wanted(&status) {
                        return status;
                    }
                }
            }
        })
        .await
    }
}

#[derive(Debug)]
struct FakeLeader {
    sessions: mpsc::Sender<Opened>,
    n_beats: watch::Sender<u64>,
}

#[tonic::async_trait]
impl Dispatcher for FakeLeader {
    type SessionStream = ReceiverStream<Result<DispatcherMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (to_agent, stream) = mpsc::channel(16);
        self.sessions
            .send((to_agent, request.into_inner()))
            .await
            .map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn heartbeat(
        &self,
        _: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        self.n_beats.send_modify(|n_beats| *n_beats += 1);
        Ok(Response::new(HeartbeatResponse { heartbeat_millis: 1000, nodes: 0 }))
    }

    async fn register_image(
        &self,
        _: Request<RegisterImageRequest>,
    ) -> Result<Response<RegisterImageResponse>, Status> {
        Err(Status::unimplemented("not in these tests"))
    }
}

/// A leader on a real port, and an agent that looks for it.
struct Stage {
    sessions: mpsc::Receiver<Opened>,
    n_beats: watch::Receiver<u64>,
    beats: Beats,
    puppets: Arc<Puppets>,
    tasks: TaskSet,
    pool: ChannelPool,
    address: String,
    directory: tempfile::TempDir,
    images: Option<Images>,
    payloads: Payloads,
    has_mesh: bool,
    terms: Arc<Terms>,
}

/// Balancers that note which ports lead where, beside the calls of the executor.
#[derive(Debug)]
struct NotedTables(Arc<Puppets>);

#[tonic::async_trait]
impl Balancers for NotedTables {
    async fn apply(
        &mut self,
        table: &MeshTable,
        _: &Arc<NetworkTables>,
    ) -> Result<Vec<PortCondition>, Box<dyn std::error::Error + Send + Sync>> {
        let ports = table.ports.iter().map(|port| {
            let backend = &port.backends[0];
            format!("{}->{}:{}", port.published, backend.address, backend.target_port)
        });
        let text = format!("table {}", ports.collect::<Vec<_>>().join(" "));
        let mut calls = self.0.calls.lock().unwrap();
        if calls.iter().rev().find(|call| call.starts_with("table")) != Some(&text) {
            calls.push(text);
        }
        Ok(Vec::new())
    }
}

/// A disk for the highest term.
#[derive(Debug, Default)]
struct Terms(Mutex<u64>);

impl TermKeeper for Terms {
    fn keep(&self, term: u64) -> Result<(), String> {
        *self.0.lock().unwrap() = term;
        Ok(())
    }
}

impl Stage {
    async fn set(puppets: Puppets) -> Self {
        let stage = Self::without_agent(puppets).await;
        stage.start_agent(&stage.tasks, Arc::clone(&stage.puppets) as Arc<dyn Executor>).await;
        stage
    }

    async fn without_agent(puppets: Puppets) -> Self {
        let authority = Authority::generate(clock::now()).unwrap();
        let credentials = |node, role| {
            let csr = Csr::generate().unwrap();
            let life = Duration::from_secs(3600);
            let signed = authority.sign(&csr.csr_pem, node, role, ClusterId(1), clock::now(), life);
            let root_pem = authority.root_pem().to_owned();
            Credentials { certificate_pem: signed.unwrap(), key_pem: csr.key_pem, root_pem }
        };
        let tasks = TaskSet::new();
        let (sender, sessions) = mpsc::channel(16);
        let (beats, n_beats) = watch::channel(0);
        let leader = FakeLeader { sessions: sender, n_beats: beats };
        let routes = Routes::new(DispatcherServer::new(leader));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (tls, serving) =
            (Tls::new(credentials(NodeId(1), NodeRole::Manager)).unwrap(), tasks.clone());
        tasks.spawn("leader", async move {
            serve_tls(listener, tls, Gate::default(), routes, &serving).await.unwrap()
        });
        let pool = ChannelPool::new(Tls::new(credentials(NodeId(2), NodeRole::Worker)).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let puppets = Arc::new(puppets);
        let (beats, terms) = (Beats::default(), Arc::default());
        let (images, payloads, has_mesh) = (None, Payloads::default(), false);
        Self {
            sessions,
            n_beats,
            beats,
            puppets,
            tasks,
            pool,
            address,
            directory,
            images,
            payloads,
            has_mesh,
            terms,
        }
    }

    async fn start_agent(&self, tasks: &TaskSet, executor: Arc<dyn Executor>) {
        let options = AgentOptions {
            description: tokio::sync::watch::channel(NodeDescription::default()).1,
            addr: "127.0.0.1:1".into(),
            tasks_dir: self.directory.path().join("tasks"),
            executor,
            images: self.images.clone(),
            payloads: self.payloads.clone(),
            balancers: self.has_mesh.then(|| Box::new(NotedTables(self.puppets.clone())) as _),
            managers: Managers::new(vec![self.address.clone()])
                .obeying(*self.terms.0.lock().unwrap(), Arc::clone(&self.terms) as _),
            pool: self.pool.clone(),
            beats: self.beats,
            tasks: tasks.clone(),
        };
        Agent::start(options).await.unwrap();
    }

    /// The next session, after its hello.
    async fn session(&mut self) -> Session {
        self.session_and_hello().await.0
    }

    async fn session_and_hello(&mut self) -> (Session, Hello) {
        let (to_agent, mut from_agent) = soon("a session", self.sessions.recv()).await.unwrap();
        let first = soon("a hello", from_agent.next()).await.unwrap().unwrap();
        let Some(FromAgent::Hello(hello)) = first.message else { panic!("{first:?}") };
        (Session { to_agent, from_agent }, hello)
    }
}

#[tokio::test]
async fn a_task_is_made_once_its_secrets_are_here_and_they_go_with_it() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    let secret_id = skep_common::SecretId(5);
    let mut user = task(1, "api", TaskState::Running);
    let container = serde_json::json!({"Image": "i", "Secrets": [
        {"File": {"Name": "key"}, "SecretID": secret_id, "SecretName": "key", "Version": 2},
    ]});
    Arc::make_mut(&mut user.spec).container_spec = serde_json::from_value(container).unwrap();
    session.assign(0, std::slice::from_ref(&user), &[]).await;
    session.until(user.id, |status| status.state == TaskState::Preparing).await;
    assert_eq!(stage.puppets.calls(), [""; 0], "it waits for its secret");
    let secret = skep_proto::SecretAssignment {
        id: secret_id.to_string(),
        version: 2,
        kind: "secret".into(),
        name: "key".into(),
        data: b"hidden".to_vec().into(),
        templating: String::new(),
    };
    let given = Assignments {
        applies_to: 1,
        results_in: 2,
        secrets: vec![secret],
        ..Assignments::default()
    };
    session.send(Message::Assignments(given)).await;
    session.until(user.id, |status| status.state == TaskState::Running).await;
    assert_eq!(stage.puppets.calls(), ["prepare 1", "secret key@2 (6 bytes)", "start 1"]);
    assert_eq!(stage.payloads.names(), ["secret key@2"]);
    let records = stage.directory.path().join("tasks");
    for record in std::fs::read_dir(records).unwrap() {
        let text = std::fs::read_to_string(record.unwrap().path()).unwrap();
        assert!(text.contains("key") && !text.contains("hidden") && !text.contains("aGlkZGVu"));
    }
    let gone = Assignments {
        applies_to: 2,
        results_in: 3,
        removed_tasks: vec![user.id.to_string()],
        removed_secrets: vec![format!("{secret_id}@2")],
        ..Assignments::default()
    };
    session.send(Message::Assignments(gone)).await;
    soon("the removal", async {
        while stage.puppets.calls().last().is_none_or(|call| call != "remove 1") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(stage.payloads.names(), [""; 0]);
}

pub(super) fn task(id: u128, service_name: &str, desired_state: TaskState) -> Task {
    Task {
        id: TaskId(id),
        meta: Meta::default(),
        spec: TaskSpec::default().into(),
        spec_version: Version::default(),
        service_id: ServiceId(1),
        slot: 1,
        node_id: Some(NodeId(2)),
        status: TaskStatus { state: TaskState::Assigned, ..TaskStatus::default() },
        desired_state,
        networks_attachments: Vec::new(),
        service_name: service_name.into(),
        start_after: None,
        host_ports: Vec::new(),
        standalone: None,
        job_iteration: None,
        preset_node: None,
        assigned_generic_resources: Vec::new(),
        service_labels: None,
    }
}

fn reached(state: TaskState) -> impl Fn(&TaskStatus) -> bool {
    move |status| status.state == state
}

#[tokio::test]
async fn heartbeats_arrive_whatever_sends_them() {
    for beats in [Beats::OnThread, Beats::AsTask] {
        let mut stage = Stage { beats, ..Stage::without_agent(Puppets::default()).await };
        stage.start_agent(&stage.tasks, Arc::clone(&stage.puppets) as Arc<dyn Executor>).await;
        let session = stage.session().await;
        session.welcome(1).await;
        soon("a heartbeat", stage.n_beats.wait_for(|n_beats| *n_beats > 0)).await.unwrap();
    }
}

#[tokio::test]
async fn a_task_lives_from_assignment_to_erasure() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    session.assign(0, &[task(1, "web", TaskState::Ready)], &[]).await;
    session.until(TaskId(1), reached(TaskState::Ready)).await;
    assert_eq!(stage.puppets.calls(), ["prepare 1"], "it waits until it may run");
    session.assign(1, &[task(1, "web", TaskState::Running)], &[]).await;
    let running = session.until(TaskId(1), reached(TaskState::Running)).await;
    assert_eq!(running.container_status.unwrap().pid, 7);
    session.assign(2, &[task(1, "web", TaskState::Shutdown)], &[]).await;
    let ended = session.until(TaskId(1), reached(TaskState::Shutdown)).await;
    assert_eq!(ended.container_status.unwrap().exit_code, 143);
    session.assign(3, &[], &[TaskId(1)]).await;
    let erased = async {
        while stage.puppets.calls().last().is_none_or(|call| call != "remove 1") {
            tokio::task::yield_now().await;
        }
    };
    soon("the erasure", erased).await;
    assert_eq!(stage.puppets.calls(), ["prepare 1", "start 1", "stop 1", "remove 1"]);
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn ends_are_reported_with_their_reason() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    let tasks = [
        task(1, "web", TaskState::Running),
        task(2, "web", TaskState::Running),
        task(3, "broken", TaskState::Running),
    ];
    session.assign(0, &tasks, &[]).await;
    let rejected = session.until(TaskId(3), reached(TaskState::Rejected)).await;
    assert_eq!(rejected.err, "no such image");
    stage.puppets.end(TaskId(1), 0);
    session.until(TaskId(1), reached(TaskState::Complete)).await;
    stage.puppets.end(TaskId(2), 3);
    let failed = session.until(TaskId(2), reached(TaskState::Failed)).await;
    assert_eq!(failed.err, "task: non-zero exit (3)");
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn an_unhealthy_task_runs_on_until_managers_want_it_ended() {
    let puppets = Puppets { has_check: true, ..Puppets::default() };
    puppets.healthy.send_replace(true);
    let mut stage = Stage::set(puppets).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    session.assign(0, &[task(1, "web", TaskState::Running)], &[]).await;
    session.until(TaskId(1), reached(TaskState::Running)).await;
    stage.puppets.healthy.send_replace(false);
    session.until(TaskId(1), |status| status.unhealthy).await;
    assert!(!stage.puppets.calls().contains(&"stop 1".to_owned()), "connections are drained first");
    session.assign(1, &[task(1, "web", TaskState::Shutdown)], &[]).await;
    let ended = session.until(TaskId(1), reached(TaskState::Failed)).await;
    assert_eq!(ended.err, "unhealthy container");
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn a_new_session_hears_everything_again() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut first = stage.session().await;
    first.welcome(1).await;
    first.assign(0, &[task(1, "web", TaskState::Running)], &[]).await;
    first.until(TaskId(1), reached(TaskState::Running)).await;
    drop(first);
    let mut second = stage.session().await;
    second.welcome(2).await;
    second.until(TaskId(1), reached(TaskState::Running)).await;
    assert_eq!(stage.puppets.calls(), ["prepare 1", "start 1"], "it goes on as it was");
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn a_deposed_leader_and_a_gap_in_the_sequence_end_the_session() {
    let mut stage = Stage::set(Puppets::default()).await;
    let first = stage.session().await;
    first.welcome(5).await;
    first.assign(0, &[], &[]).await;
    first.assign(7, &[task(1, "web", TaskState::Running)], &[]).await; // There is no set 7.
    let deposed = stage.session().await;
    deposed.welcome(4).await;
    let next = stage.session().await;
    // What it says comes too late: the agent is gone from this session.
    let _ = deposed.to_agent.send(Err(Status::aborted("over"))).await;
    next.welcome(5).await;
    assert_eq!(stage.puppets.calls(), Vec::<String>::new());
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn a_leader_that_was_deposed_before_a_restart_is_not_obeyed_after_it() {
    let mut stage = Stage::without_agent(Puppets::default()).await;
    let executor = || Arc::clone(&stage.puppets) as Arc<dyn Executor>;
    let (before, after) = ((TaskSet::new(), executor()), (TaskSet::new(), executor()));
    stage.start_agent(&before.0, before.1).await;
    let mut session = stage.session().await;
    session.welcome(5).await;
    session.assign(0, &[task(1, "web", TaskState::Running)], &[]).await;
    session.until(TaskId(1), reached(TaskState::Running)).await;
    assert_eq!(*stage.terms.0.lock().unwrap(), 5, "it is kept before anything is done");
    before.0.shutdown().await;

    stage.start_agent(&after.0, after.1).await;
    let deposed = stage.session().await;
    deposed.welcome(4).await;
    let mut next = stage.session().await;
    next.welcome(6).await;
    next.assign(0, &[task(2, "web", TaskState::Running)], &[]).await;
    next.until(TaskId(2), reached(TaskState::Running)).await;
    assert_eq!(*stage.terms.0.lock().unwrap(), 6);
    after.0.shutdown().await;
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn a_node_that_was_removed_stops_its_tasks() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    session.assign(0, &[task(1, "web", TaskState::Running)], &[]).await;
    session.until(TaskId(1), reached(TaskState::Running)).await;
    drop(session);
    let refused = stage.session().await;
    let mut status = Status::permission_denied("no member");
    let mark = tonic::metadata::MetadataValue::from_static("true");
    status.metadata_mut().insert(skep_proto::REMOVED_METADATA, mark);
    refused.to_agent.send(Err(status)).await.unwrap();
    drop(refused);
    let erased = async {
        while !stage.puppets.calls().contains(&"remove 1".to_owned()) {
            tokio::task::yield_now().await;
        }
    };
    soon("the erasure", erased).await;
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn a_restarted_agent_goes_on_with_the_containers_it_finds() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    let mut tasks = [task(1, "web", TaskState::Running), task(2, "web", TaskState::Running)];
    Arc::make_mut(&mut tasks[0].spec).restart_policy = Some(RestartPolicy {
        condition: Some(RestartCondition::None), // Nobody leads when it ends.
        ..RestartPolicy::default()
    });
    session.assign(0, &tasks, &[]).await;
    session.until(TaskId(1), reached(TaskState::Running)).await;
    stage.tasks.shutdown().await;

    let mut again = Stage::set(Puppets::default()).await;
    again.tasks.shutdown().await;
    again.tasks = TaskSet::new();
    let puppets = Arc::new(Puppets { found: vec![TaskId(1), TaskId(9)], ..Puppets::default() });
    std::fs::remove_dir_all(again.directory.path().join("tasks")).unwrap();
    std::fs::rename(stage.directory.path().join("tasks"), again.directory.path().join("tasks"))
        .unwrap();
    again.start_agent(&again.tasks, Arc::clone(&puppets) as Arc<dyn Executor>).await;
    let erased = async {
        while !puppets.calls().contains(&"remove 9".to_owned()) {
            tokio::task::yield_now().await;
        }
    };
    soon("the stranger's erasure", erased).await;
    puppets.end(TaskId(1), 0);
    let record = again.directory.path().join("tasks").join(format!("{}.json", TaskId(1)));
    let recorded = async {
        loop {
            let text = std::fs::read_to_string(&record).unwrap_or_default();
            if text.contains(r#""State":"complete""#) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    soon("the record of the end", recorded).await;
    assert!(!puppets.calls().contains(&"start 1".to_owned()), "{:?}", puppets.calls());
    again.tasks.shutdown().await;
}

#[tokio::test]
async fn a_restarted_agent_prepares_again_and_reports_no_state_that_falls() {
    let mut stage = Stage::set(Puppets::default()).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    session.assign(0, &[task(1, "web", TaskState::Ready)], &[]).await;
    session.until(TaskId(1), reached(TaskState::Ready)).await;
    stage.tasks.shutdown().await;

    let tasks = TaskSet::new();
    let puppets = Arc::new(Puppets::default());
    stage.start_agent(&tasks, Arc::clone(&puppets) as Arc<dyn Executor>).await;
    let prepared = async {
        while !puppets.calls().contains(&"prepare 1".to_owned()) {
            tokio::task::yield_now().await;
        }
    };
    soon("the second preparation", prepared).await;
    let record = stage.directory.path().join("tasks").join(format!("{}.json", TaskId(1)));
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains(r#""State":"ready""#), "{text}");
    tasks.shutdown().await;
}

#[tokio::test]
async fn a_tasks_image_is_kept_until_its_container_is_erased() {
    let mut stage = Stage::without_agent(Puppets::default()).await;
    let store = ImageStore::open(stage.directory.path().join("images")).await.unwrap();
    let (used, other) = (import(&store, "used").await.digest, import(&store, "other").await.digest);
    let images = Images::new(store.clone(), stage.pool.clone(), stage.tasks.clone()).await;
    stage.images = Some(images.unwrap());
    stage.start_agent(&stage.tasks, Arc::clone(&stage.puppets) as Arc<dyn Executor>).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    until_stored(&store, &[used, other]).await;

    let mut web = task(1, "web", TaskState::Running);
    let container = skep_common::spec::ContainerSpec {
        image: format!("used:latest@{used}"),
        ..Default::default()
    };
    Arc::make_mut(&mut web.spec).container_spec = Some(container);
    session.assign(0, &[web], &[]).await;
    session.until(TaskId(1), reached(TaskState::Running)).await;
    until_stored(&store, &[used]).await;
    session.assign(1, &[], &[TaskId(1)]).await;
    until_stored(&store, &[]).await;
    assert_eq!(stage.puppets.calls().last().unwrap(), "remove 1");
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn host_mode_ports_lead_to_a_task_from_its_start_until_before_its_stop() {
    let mut stage = Stage::without_agent(Puppets { has_check: true, ..Puppets::default() }).await;
    stage.has_mesh = true;
    stage.start_agent(&stage.tasks, Arc::clone(&stage.puppets) as Arc<dyn Executor>).await;
    let mut session = stage.session().await;
    session.welcome(1).await;
    let mesh = MeshUpdate { version: 1, whole: true, ..MeshUpdate::default() };
    session.tell_table(0, &mesh).await;

    let mut web = task(1, "web", TaskState::Running);
    web.networks_attachments = vec![NetworkAttachment::uplink([10, 192, 4, 1].into(), 22)];
    let port = |published_port, target_port| PortConfig {
        protocol: Some(PortProtocol::Tcp),
        target_port,
        published_port,
        publish_mode: Some(PublishMode::Host),
        proxy_protocol: None,
        name: None,
    };
    web.host_ports = vec![port(Some(8080), 80), port(None, 81)];
    session.assign(1, &[web.clone()], &[]).await;
    let has_ports = |status: &TaskStatus| status.port_status.is_some();
    let status = session.until(TaskId(1), has_ports).await;
    assert_eq!(status.state, TaskState::Starting, "its check has not passed");
    let ports = status.port_status.unwrap().ports;
    let chosen = ports[1].published_port.unwrap();
    assert_eq!((ports[0].published_port, ports[1].target_port), (Some(8080), 81));
    stage.puppets.healthy.send_replace(true);
    let running = session.until(TaskId(1), reached(TaskState::Running)).await;
    assert_eq!(running.port_status.unwrap().ports, ports);

    let stopped = Task { desired_state: TaskState::Shutdown, ..web };
    session.assign(2, &[stopped], &[]).await;
    let ended = session.until(TaskId(1), |status| status.state.is_terminal()).await;
    assert_eq!(ended.port_status, None);
    let table = format!("table 8080->10.192.4.1:80 {chosen}->10.192.4.1:81");
    let made = stage.puppets.calls();
    let made: Vec<&str> = made.iter().map(String::as_str).collect();
    assert!(made.ends_with(&["start 1", &table, "table ", "stop 1"]), "{made:?}");
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn a_table_that_the_next_leader_keeps_stays_in_force_and_another_is_asked_for_whole() {
    let mut stage = Stage::without_agent(Puppets::default()).await;
    stage.has_mesh = true;
    stage.start_agent(&stage.tasks, Arc::clone(&stage.puppets) as Arc<dyn Executor>).await;
    let backend = MeshBackend {
        task_id: TaskId(9).to_string(),
        address: "10.192.8.9".into(),
        target_port: 80,
    };
    let port = MeshPort {
        protocol: "tcp".into(),
        published: 8080,
        backends: vec![backend],
        ..MeshPort::default()
    };
    let (mut session, hello) = stage.session_and_hello().await;
    assert_eq!(hello.table_digest, "", "it has none yet");
    session.welcome(1).await;
    let (digest, ports) = ("of that table".into(), vec![port]);
    let whole = MeshUpdate { version: 7, whole: true, ports, digest, ..MeshUpdate::default() };
    session.tell_table(0, &whole).await;
    session.until_applied(7).await;
    drop(session);

    let (mut session, hello) = stage.session_and_hello().await;
    assert_eq!(hello.table_digest, whole.digest);
    session.welcome(2).await;
    let kept = MeshUpdate { version: 9, kept: true, digest: whole.digest, ..MeshUpdate::default() };
    session.tell_table(0, &kept).await;
    session.until_applied(9).await;
    assert_eq!(stage.puppets.calls(), ["table 8080->10.192.8.9:80"]);

    let other = MeshUpdate { digest: "of another".into(), ..kept };
    session.tell_table(1, &other).await;
    let (session, hello) = stage.session_and_hello().await;
    assert_eq!(hello.table_digest, "", "it asks for everything");
    session.welcome(2).await;
    stage.tasks.shutdown().await;
}
