//! A daemon that answers from a table and plays prepared changes to whoever watches.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt as _};
use serde_json::{Value, json};
use skep_proto::control_server::{Control, ControlServer};
use skep_proto::load_image_request::Part;
use skep_proto::machine_server::{Machine, MachineServer};
use skep_proto::watch_event::Action;
use skep_proto::*;
use skep_runtime::TaskSet;
use tokio::net::UnixListener;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// What the daemon holds and what it was asked.
#[derive(Debug, Default)]
pub(in super::super) struct Table {
    /// Objects by kind, in the order of lists.
    pub(in super::super) objects: BTreeMap<String, Vec<Value>>,
    /// Objects that a watcher is told of after the first set, in this order.
    pub(in super::super) changes: VecDeque<(String, Value)>,
    /// Answers to updates before they succeed.
    pub(in super::super) refusals: VecDeque<Status>,
    /// Output of tasks.
    pub(in super::super) logs: Vec<LogRecord>,
    /// Events, a stream each; all but the last break.
    pub(in super::super) events: VecDeque<Vec<skep_proto::Event>>,
    /// What a change would do.
    pub(in super::super) planned: PlanResponse,
    /// Why tasks wait.
    pub(in super::super) explained: ExplainResponse,
    /// Specs, requests and bytes as they arrived.
    pub(in super::super) asked: Vec<Value>,
    /// Why the machine takes no part in its swarm.
    pub(in super::super) fault: String,
    /// The archive that was sent.
    pub(in super::super) archive: Vec<u8>,
}

/// The daemon; it ends with the test.
#[derive(Debug)]
pub(in super::super) struct Daemon {
    directory: tempfile::TempDir,
    tasks: TaskSet,
    pub(in super::super) table: Arc<Mutex<Table>>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}

impl Daemon {
    pub(in super::super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("skep.sock")).unwrap();
        let table: Arc<Mutex<Table>> = Arc::default();
        let served = Served(Arc::clone(&table));
        let tasks = TaskSet::new();
        let server = tonic::transport::Server::builder()
            .add_service(ControlServer::new(served.clone()))
            .add_service(MachineServer::new(served))
            .serve_with_incoming(UnixListenerStream::new(listener));
        tasks.spawn("fake daemon", async move { server.await.unwrap() });
        Self { directory, tasks, table }
    }

    pub(in super::super) fn host(&self) -> String {
        format!("unix://{}", self.directory.path().join("skep.sock").display())
    }

    /// A directory for the test's files.
    pub(in super::super) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// Adds objects of a kind.
    pub(in super::super) fn hold(&self, kind: &str, objects: impl IntoIterator<Item = Value>) {
        self.table.lock().unwrap().objects.entry(kind.into()).or_default().extend(objects);
    }

    /// Adds changes for the watcher.
    pub(in super::super) fn play(&self, kind: &str, objects: impl IntoIterator<Item = Value>) {
        let changes = objects.into_iter().map(|object| (kind.to_owned(), object));
        self.table.lock().unwrap().changes.extend(changes);
    }

    /// What it was asked so far.
    pub(in super::super) fn asked(&self) -> Vec<Value> {
        self.table.lock().unwrap().asked.clone()
    }
}

#[derive(Debug, Clone)]
struct Served(Arc<Mutex<Table>>);

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Served {
    fn ask(&self, what: Value) {
        self.0.lock().unwrap().asked.push(what);
    }

    fn find(&self, kind: &str, reference: &str) -> Result<Value, Status> {
        let table = self.0.lock().unwrap();
        let objects = table.objects.get(kind).map(Vec::as_slice).unwrap_or_default();
        let is_meant = |object: &&Value| {
            let is = |value: &Value| value.as_str() == Some(reference);
            is(&object["ID"])
                || is(&object["Spec"]["Name"])
                || is(&object["Description"]["Hostname"])
                || (reference == "self" && object["Description"]["Hostname"] == "n1")
                || (reference.len() >= 4
                    && object["ID"].as_str().is_some_and(|id| id.starts_with(reference)))
        };
        let found = objects.iter().find(is_meant).cloned();
        found.ok_or_else(|| Status::not_found(format!("{kind} {reference} not found")))
    }
}

fn spec(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}

fn event(action: Action, kind: &str, object: &Value) -> WatchEvent {
    WatchEvent {
        action: action.into(),
        kind: kind.into(),
        id: object["ID"].as_str().unwrap_or_default().into(),
        json: if object.is_null() { String::new() } else { object.to_string() },
        version: 0,
    }
}

#[tonic::async_trait]
impl Control for Served {
    type WatchStream = Messages<WatchEvent>;
    type ServiceLogsStream = Messages<LogRecord>;
    type BackupStream = Messages<skep_proto::BackupChunk>;
    type EventsStream = Messages<skep_proto::Event>;

    async fn get(&self, request: Request<GetRequest>) -> Answer<Document> {
        let GetRequest { kind, reference } = request.into_inner();
        let json = self.find(&kind, &reference)?.to_string();
        Ok(Response::new(Document { kind, json, ..Document::default() }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Answer<ListResponse> {
        let request = request.into_inner();
        let table = self.0.lock().unwrap();
        let objects = table.objects.get(&request.kind).map(Vec::as_slice).unwrap_or_default();
        let is_one = |ids: &[String], id: &Value| {
            ids.is_empty() || ids.iter().any(|known| id.as_str() == Some(known.as_str()))
        };
        let label = |object: &Value| {
            let labels = match request.kind.as_str() {
                "task" => &object["Spec"]["ContainerSpec"]["Labels"],
                _ => &object["Spec"]["Labels"],
            };
            labels["com.docker.stack.namespace"].as_str().unwrap_or_default().to_owned()
        };
        let selected = objects.iter().filter(|object| {
            is_one(&request.service_ids, &object["ServiceID"])
                && is_one(&request.node_ids, &object["NodeID"])
                && (request.stack.is_empty() || request.stack == label(object))
        });
        Ok(Response::new(ListResponse {
            json: selected.map(Value::to_string).collect(),
            ..ListResponse::default()
        }))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        let request = request.into_inner();
        let mut table = self.0.lock().unwrap();
        let mut events = Vec::new();
        for (kind, objects) in &table.objects {
            if request.kinds.contains(kind) {
                events.extend(objects.iter().map(|object| event(Action::Initial, kind, object)));
            }
        }
        events.push(event(Action::Synced, "", &Value::Null));
        let changes = std::mem::take(&mut table.changes);
        events.extend(changes.iter().map(|(kind, object)| {
            let action =
                if object.get("removed").is_some() { Action::Removed } else { Action::Changed };
            event(action, kind, object)
        }));
        let stream = futures::stream::iter(events.into_iter().map(Ok));
        Ok(Response::new(Box::pin(stream.chain(futures::stream::pending()))))
    }

    async fn create_service(
        &self,
        request: Request<CreateServiceRequest>,
    ) -> Answer<CreateServiceResponse> {
        self.ask(json!({"create": spec(&request.into_inner().spec_json)}));
        let id = "asv0000000000000000000000".to_owned();
        Ok(Response::new(CreateServiceResponse { id, ..CreateServiceResponse::default() }))
    }

    async fn update_service(
        &self,
        request: Request<UpdateServiceRequest>,
    ) -> Answer<UpdateServiceResponse> {
        let request = request.into_inner();
        if let Some(refusal) = self.0.lock().unwrap().refusals.pop_front() {
            return Err(refusal);
        }
        let spec = if request.rollback { Value::Null } else { spec(&request.spec_json) };
        for service in self.0.lock().unwrap().objects.entry("service".into()).or_default() {
            // As the real one: what changes nothing is not written.
            if service["ID"] == request.id.as_str() && service["Spec"] != spec {
                service["Version"]["Index"] = (request.version + 1).into();
            }
        }
        let mut asked = json!({"update": request.id, "version": request.version, "spec": spec});
        if request.rollback_to > 0 {
            asked["rollback_to"] = request.rollback_to.into();
        }
        self.ask(asked);
        Ok(Response::new(UpdateServiceResponse {
            warnings: vec!["watch out".into()],
            ..UpdateServiceResponse::default()
        }))
    }

    async fn remove_service(
        &self,
        request: Request<RemoveServiceRequest>,
    ) -> Answer<RemoveServiceResponse> {
        self.ask(json!({"remove": request.into_inner().id}));
        Ok(Response::new(RemoveServiceResponse {}))
    }

    async fn service_logs(
        &self,
        request: Request<ServiceLogsRequest>,
    ) -> Answer<Self::ServiceLogsStream> {
        let request = request.into_inner();
        self.ask(
            json!({"tail": request.tail, "since": request.since_nanos, "follow": request.follow}),
        );
        let logs = self.0.lock().unwrap().logs.clone();
        Ok(Response::new(Box::pin(futures::stream::iter(logs.into_iter().map(Ok)))))
    }

    async fn update_node(&self, request: Request<UpdateNodeRequest>) -> Answer<UpdateNodeResponse> {
        let request = request.into_inner();
        self.ask(json!({"update": request.id, "spec": spec(&request.spec_json)}));
        Ok(Response::new(UpdateNodeResponse {}))
    }

    async fn remove_node(&self, request: Request<RemoveNodeRequest>) -> Answer<RemoveNodeResponse> {
        match request.into_inner().force {
            true => Ok(Response::new(RemoveNodeResponse {})),
            false => Err(Status::failed_precondition("node n2 is not down and can't be removed")),
        }
    }

    async fn join_token(&self, request: Request<JoinTokenRequest>) -> Answer<JoinTokenResponse> {
        let token = format!("SWMTKN-1-{}", request.into_inner().role);
        Ok(Response::new(JoinTokenResponse { token, address: "10.0.0.1:2377".into() }))
    }

    async fn create_network(
        &self,
        request: Request<skep_proto::CreateNetworkRequest>,
    ) -> Answer<skep_proto::CreateNetworkResponse> {
        self.ask(json!({"network": spec(&request.into_inner().spec_json)}));
        Ok(Response::new(skep_proto::CreateNetworkResponse {
            id: "network-id".into(),
            ..skep_proto::CreateNetworkResponse::default()
        }))
    }

    async fn remove_network(
        &self,
        request: Request<skep_proto::RemoveNetworkRequest>,
    ) -> Answer<skep_proto::RemoveNetworkResponse> {
        self.ask(json!({"remove network": request.into_inner().id}));
        Ok(Response::new(skep_proto::RemoveNetworkResponse {}))
    }

    async fn deploy_stack(
        &self,
        request: Request<DeployStackRequest>,
    ) -> Answer<DeployStackResponse> {
        let request = request.into_inner();
        self.ask(json!({"deploy": spec(&request.spec_json), "prune": request.prune}));
        let names = |name: &str| vec![name.to_owned()];
        Ok(Response::new(DeployStackResponse {
            created: names("shop_new"),
            updated: names("shop_web"),
            unchanged: names("shop_db"),
            removed: names("shop_old"),
            warnings: names("image web:1 is on one node only"),
            ..DeployStackResponse::default()
        }))
    }

    async fn remove_stack(
        &self,
        request: Request<RemoveStackRequest>,
    ) -> Answer<RemoveStackResponse> {
        match request.into_inner().name.as_str() {
            "shop" => Ok(Response::new(RemoveStackResponse {
                removed: vec!["shop_web".into()],
                ..RemoveStackResponse::default()
            })),
            name => Err(Status::not_found(format!("stack {name} not found"))),
        }
    }

    async fn check_network(
        &self,
        request: Request<CheckNetworkRequest>,
    ) -> Answer<CheckNetworkResponse> {
        let CheckNetworkRequest { from, to } = request.into_inner();
        self.ask(json!({"check": [from, to]}));
        let check = |name: &str, ok: bool, remedy: &str| NetworkCheck {
            name: name.into(),
            from: "n1".into(),
            to: "n2".into(),
            ok,
            detail: "as seen".into(),
            remedy: remedy.into(),
        };
        let mut checks = vec![check("vxlan", true, "")];
        if !self.0.lock().unwrap().fault.is_empty() {
            checks.push(check("mtu", false, "raise it"));
        }
        Ok(Response::new(CheckNetworkResponse { checks }))
    }

    async fn digest(&self, _: Request<DigestRequest>) -> Answer<DigestResponse> {
        let manager = |hostname: &str, digest: &str| ManagerDigest {
            node_id: format!("id-{hostname}"),
            hostname: hostname.into(),
            version: 7,
            digest: digest.into(),
            error: String::new(),
        };
        Ok(Response::new(DigestResponse {
            managers: vec![manager("n1", "aa"), manager("n2", "aa")],
        }))
    }

    async fn create_secret(
        &self,
        request: Request<skep_proto::CreateSecretRequest>,
    ) -> Answer<skep_proto::CreateSecretResponse> {
        self.ask(json!({"secret": spec(&request.into_inner().spec_json)}));
        let id = "secret-id".to_owned();
        Ok(Response::new(skep_proto::CreateSecretResponse { id, warnings: Vec::new() }))
    }

    async fn update_secret(
        &self,
        request: Request<skep_proto::UpdateSecretRequest>,
    ) -> Answer<skep_proto::UpdateSecretResponse> {
        let request = request.into_inner();
        if let Some(refusal) = self.0.lock().unwrap().refusals.pop_front() {
            return Err(refusal);
        }
        self.ask(json!({"update secret": spec(&request.spec_json), "data": request.data_changes}));
        let services = vec!["web".to_owned()];
        Ok(Response::new(skep_proto::UpdateSecretResponse { data_version: 2, services }))
    }

    async fn remove_secret(
        &self,
        request: Request<skep_proto::RemoveSecretRequest>,
    ) -> Answer<skep_proto::RemoveSecretResponse> {
        self.ask(json!({"remove secret": request.into_inner().id}));
        Ok(Response::new(skep_proto::RemoveSecretResponse {}))
    }

    async fn create_config(
        &self,
        request: Request<skep_proto::CreateConfigRequest>,
    ) -> Answer<skep_proto::CreateConfigResponse> {
        self.ask(json!({"config": spec(&request.into_inner().spec_json)}));
        let id = "config-id".to_owned();
        Ok(Response::new(skep_proto::CreateConfigResponse { id, warnings: Vec::new() }))
    }

    async fn update_config(
        &self,
        request: Request<skep_proto::UpdateConfigRequest>,
    ) -> Answer<skep_proto::UpdateConfigResponse> {
        let request = request.into_inner();
        if let Some(refusal) = self.0.lock().unwrap().refusals.pop_front() {
            return Err(refusal);
        }
        self.ask(json!({"update config": spec(&request.spec_json), "data": request.data_changes}));
        let services = vec!["web".to_owned()];
        Ok(Response::new(skep_proto::UpdateConfigResponse { data_version: 2, services }))
    }

    async fn remove_config(
        &self,
        request: Request<skep_proto::RemoveConfigRequest>,
    ) -> Answer<skep_proto::RemoveConfigResponse> {
        self.ask(json!({"remove config": request.into_inner().id}));
        Ok(Response::new(skep_proto::RemoveConfigResponse {}))
    }

    async fn update_swarm(
        &self,
        request: Request<skep_proto::UpdateSwarmRequest>,
    ) -> Answer<skep_proto::UpdateSwarmResponse> {
        let request = request.into_inner();
        let mut asked = json!({"version": request.version, "spec": request.spec_json});
        if request.rotate_unlock_key {
            asked["rotate"] = true.into();
        }
        self.ask(asked);
        if let Some(status) = self.0.lock().unwrap().refusals.pop_front() {
            return Err(status);
        }
        Ok(Response::new(skep_proto::UpdateSwarmResponse { version: request.version + 1 }))
    }

    async fn rotate_ca(
        &self,
        request: Request<skep_proto::RotateCaRequest>,
    ) -> Answer<skep_proto::RotateCaResponse> {
        let request = request.into_inner();
        self.ask(json!({"rotate": request.ca_cert_pem, "key": request.ca_key_pem}));
        Ok(Response::new(skep_proto::RotateCaResponse {}))
    }

    async fn unlock_key(
        &self,
        _: Request<skep_proto::UnlockKeyRequest>,
    ) -> Answer<skep_proto::UnlockKeyResponse> {
        Ok(Response::new(skep_proto::UnlockKeyResponse { key: "SWMKEY-1-k".into() }))
    }

    async fn service_history(
        &self,
        _: Request<skep_proto::ServiceHistoryRequest>,
    ) -> Answer<skep_proto::ServiceHistoryResponse> {
        let table = self.0.lock().unwrap();
        let revisions = table.objects.get("revision").map(Vec::as_slice).unwrap_or_default();
        let revisions_json = revisions.iter().map(Value::to_string).collect();
        Ok(Response::new(skep_proto::ServiceHistoryResponse { revisions_json }))
    }

    async fn explain(
        &self,
        request: Request<skep_proto::ExplainRequest>,
    ) -> Answer<skep_proto::ExplainResponse> {
        let request = request.into_inner();
        self.ask(json!({"explain": [request.service_id, request.task_id]}));
        Ok(Response::new(self.0.lock().unwrap().explained.clone()))
    }

    async fn plan(
        &self,
        request: Request<skep_proto::PlanRequest>,
    ) -> Answer<skep_proto::PlanResponse> {
        let PlanRequest { spec_json, id, version, stack } = request.into_inner();
        if let Some(refusal) = self.0.lock().unwrap().refusals.pop_front() {
            return Err(refusal);
        }
        self.ask(match stack {
            Some(deploy) => json!({"plan": spec(&deploy.spec_json)["Name"], "prune": deploy.prune}),
            None => json!({"plan": spec(&spec_json)["Name"], "id": id, "version": version}),
        });
        Ok(Response::new(self.0.lock().unwrap().planned.clone()))
    }

    async fn what_if(
        &self,
        request: Request<skep_proto::WhatIfRequest>,
    ) -> Answer<skep_proto::PlanResponse> {
        self.ask(json!({"down": request.into_inner().down_node_ids}));
        Ok(Response::new(self.0.lock().unwrap().planned.clone()))
    }

    async fn backup(&self, _: Request<skep_proto::BackupRequest>) -> Answer<Self::BackupStream> {
        Err(Status::unimplemented("swarm backup"))
    }

    async fn events(
        &self,
        request: Request<skep_proto::EventsRequest>,
    ) -> Answer<Self::EventsStream> {
        let request = request.into_inner();
        let filters = request.filters.iter();
        let filters: Vec<String> =
            filters.map(|filter| format!("{}={}", filter.key, filter.value)).collect();
        self.ask(json!({
            "since": request.since_nanos,
            "until": request.until_nanos,
            "follow": request.follow,
            "behind": request.from_version,
            "filters": filters,
        }));
        let mut table = self.0.lock().unwrap();
        let events = table.events.pop_front().unwrap_or_default();
        let mut answers: Vec<_> = events.into_iter().map(Ok).collect();
        if !table.events.is_empty() {
            answers.push(Err(Status::unavailable("this manager is stopping")));
        }
        Ok(Response::new(Box::pin(futures::stream::iter(answers))))
    }
}

#[tonic::async_trait]
impl Machine for Served {
    type ContainerLogsStream = ReceiverStream<Result<LogRecord, Status>>;

    async fn container_logs(
        &self,
        request: Request<TaskLogsRequest>,
    ) -> Answer<Self::ContainerLogsStream> {
        let task_id = request.into_inner().task_id;
        Err(Status::not_found(format!("container {task_id} has no log")))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Answer<InfoResponse> {
        Ok(Response::new(InfoResponse {
            version: "9.9.9".into(),
            hostname: "n1".into(),
            node_id: "node1".into(),
            cluster_id: "cluster1".into(),
            role: "manager".into(),
            advertise_addr: "10.0.0.1:2377".into(),
            data_dir: "/var/lib/skep".into(),
            managers: vec!["10.0.0.1:2377".into()],
            warnings: vec!["no IPv6".into()],
            error: self.0.lock().unwrap().fault.clone(),
            ..InfoResponse::default()
        }))
    }

    async fn init_swarm(&self, request: Request<InitSwarmRequest>) -> Answer<InitSwarmResponse> {
        let request = request.into_inner();
        self.ask(json!({
            "advertise": request.advertise_addr, "listen": request.listen_addr,
            "availability": request.availability, "spec": request.spec_json, "pool": request.ingress_pool,
            "pools": request.default_addr_pool, "subnet_size": request.subnet_size,
        }));
        Ok(Response::new(InitSwarmResponse {
            node_id: "node1".into(),
            worker_token: "SWMTKN-1-w".into(),
            address: "10.0.0.1:2377".into(),
            ..InitSwarmResponse::default()
        }))
    }

    async fn join_swarm(&self, request: Request<JoinSwarmRequest>) -> Answer<JoinSwarmResponse> {
        let request = request.into_inner();
        self.ask(json!({"token": request.token, "remotes": request.remotes}));
        Ok(Response::new(JoinSwarmResponse { node_id: "node2".into(), role: "worker".into() }))
    }

    async fn leave_swarm(&self, request: Request<LeaveSwarmRequest>) -> Answer<LeaveSwarmResponse> {
        match request.into_inner().force {
            true => Ok(Response::new(LeaveSwarmResponse {})),
            false => Err(Status::failed_precondition(
                "You are attempting to leave the swarm on a manager.",
            )),
        }
    }

    async fn load_image(
        &self,
        request: Request<Streaming<LoadImageRequest>>,
    ) -> Answer<LoadImageResponse> {
        let mut stream = request.into_inner();
        let mut image = LoadedImage { names: Vec::new(), digest: "sha256:abc".into() };
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(Part::Header(header)) => {
                    self.ask(json!({"import": header.import, "name": header.name, "changes": header.changes}));
                    if !header.import {
                        image.names.push("docker.io/library/web:1".into());
                    }
                }
                Some(Part::Data(data)) => self.0.lock().unwrap().archive.extend_from_slice(&data),
                None => return Err(Status::invalid_argument("empty message")),
            }
        }
        Ok(Response::new(LoadImageResponse { images: vec![image] }))
    }

    async fn unlock(
        &self,
        _: Request<skep_proto::UnlockRequest>,
    ) -> Answer<skep_proto::UnlockResponse> {
        Err(Status::unimplemented("swarm unlock"))
    }

    async fn restore(
        &self,
        _: Request<Streaming<skep_proto::RestoreRequest>>,
    ) -> Answer<InitSwarmResponse> {
        Err(Status::unimplemented("swarm restore"))
    }
}
