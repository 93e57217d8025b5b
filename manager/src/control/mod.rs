//! The product's API, answered by every manager.
//!
//! A handler reads a linearizable snapshot, decides with the pure functions of the core, and proposes
//! one transaction whose preconditions make it safe on any manager: the leader need not run it.
//!
//! Reading order: [`error`], [`lookup`] (references and documents), `services`, `containers`, `networks`, `nodes`,
//! `stacks`, `audit`, `watch`, `logs`, `path`, `secrets`, `configs`, `swarm`, `history`, `plans`, `events`.

pub(crate) mod audit;
mod configs;
mod containers;
pub mod error;
mod events;
mod history;
mod logs;
pub mod lookup;
mod networks;
mod nodes;
mod path;
mod plans;
mod secrets;
mod services;
mod stacks;
mod swarm;
mod watch;

use std::collections::BTreeSet;
use std::sync::Arc;

use skep_common::{Kind, NodeId, Object, ServiceId, Version};
use skep_manager_core::{Action, Command, Outcome, State};
use skep_manager_core::{conditions, level};
use skep_proto::control_server::Control;
use skep_proto::*;
use skep_runtime::identity::JoinToken;
use skep_runtime::transport::ChannelPool;
use skep_runtime::{TaskSet, clock};
use tokio::sync::watch as tokio_watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::consensus::{Consensus, ReadError, View, propose};
use crate::reach::Reach;
use crate::space::Full;
pub use audit::Audited;
pub use containers::ContainersService;
use error::{Error, kind_of};
use lookup::{Facts, document};

/// The service behind `skep.v1.Control`; clones share everything.
#[derive(Debug, Clone)]
pub struct ControlService {
    pub(crate) inner: Arc<Inner>,
}

/// What the service has.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) consensus: Consensus,
    pub(crate) reach: Reach,
    pub(crate) node_id: NodeId,
    pub(crate) pool: ChannelPool,
    pub(crate) tasks: TaskSet,
    /// `ip:port` at which this manager is joined.
    pub(crate) address: String,
    /// Version of the unlock key that this manager's key file has.
    pub(crate) lock_version: tokio_watch::Receiver<u64>,
    /// Whether this manager's disk is full.
    pub(crate) space: tokio_watch::Receiver<Option<Full>>,
    /// Who has it may think about a question that looks at all tasks.
    pub(crate) questions: Arc<tokio::sync::Semaphore>,
}

/// How long a request waits for the key file of the manager that answers it; a disk that fails is in its log.
const LOCK_WAIT: std::time::Duration = std::time::Duration::from_secs(5);

/// How long a request waits for a manager that has not said yet what it knows: its first session tells.
const LEVEL_WAIT: std::time::Duration = std::time::Duration::from_secs(5);
/// How long a request is tried where too few managers were heard of before: one may have just come back.
const LOST_PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

type Answer<T> = Result<Response<T>, Status>;

impl ControlService {
    /// Serves the store behind `consensus`.
    pub(crate) fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    async fn read(&self) -> Result<State, Error> {
        let Inner { consensus, reach, .. } = &*self.inner;
        let read = match reach.is_quorum_lost() {
            false => consensus.read_state().await,
            true => consensus.read_state_within(LOST_PATIENCE).await,
        };
        read.map_err(|error| self.unread(error))
    }

    fn unread(&self, error: ReadError) -> Error {
        match error {
            ReadError::NoLeader { .. } => Error::NoQuorum(self.inner.reach.explain()),
            ReadError::Stopped => match self.inner.space.borrow().clone() {
                Some(full) => Error::DiskFull(full),
                None => Error::Read(error),
            },
        }
    }

    fn unwritten(&self, error: propose::Error) -> Error {
        let reach = &self.inner.reach;
        match error {
            propose::Error::NoLeader { .. } => Error::NoQuorum(reach.explain()),
            propose::Error::Timeout { .. } | propose::Error::Lost if reach.is_quorum_lost() => {
                Error::Unsure(reach.explain())
            }
            error => Error::Propose(error),
        }
    }

    /// The state of the swarm; where too few managers answer, or a full disk has ended this one's Raft, the one
    /// that this manager last knew, and why.
    async fn read_for_looking(&self) -> Result<(State, String), Error> {
        let why = match self.read().await {
            Ok(state) => return Ok((state, String::new())),
            Err(Error::NoQuorum(why)) => why,
            Err(Error::DiskFull(full)) => full.to_string(),
            Err(error) => return Err(error),
        };
        let stale = format!("this is what this manager last knew, and may be old: {why}");
        Ok((self.inner.consensus.state(), stale))
    }

    /// What a write may be decided on. To refuse it, or to do nothing, takes a [confirmed](Self::confirmed) one.
    async fn view(&self) -> Result<View, Error> {
        if self.inner.reach.is_quorum_lost() {
            return self.confirmed().await; // It says so soon.
        }
        let view = self.inner.consensus.view_to_write().await;
        view.map_err(|error| self.unread(error))
    }

    async fn confirmed(&self) -> Result<View, Error> {
        Ok(View::confirmed(self.read().await?))
    }

    /// Commits one transaction, or says why not.
    async fn write(&self, actions: Vec<Action>) -> Result<Version, Error> {
        if self.inner.reach.is_quorum_lost() {
            self.read().await?; // It says so at once, and after a wait that is worth it only otherwise.
        }
        let command = self.command(actions).await?;
        let written = self.inner.consensus.propose(&command).await;
        outcome(written.map_err(|error| self.unwritten(error))?)
    }

    /// The same for one that was decided on a view. With a view that was not confirmed
    /// [`propose::Error::NotLeader`] means that another view is to be taken.
    async fn write_on(&self, view: &View, actions: Vec<Action>) -> Result<Version, Error> {
        let command = self.command(actions).await?;
        let written = self.inner.consensus.propose_on(view, &command).await;
        outcome(written.map_err(|error| self.unwritten(error))?)
    }

    /// A signed transaction, if this manager has room for it and all managers understand it.
    async fn command(&self, actions: Vec<Action>) -> Result<Command, Error> {
        if let Some(full) = &*self.inner.space.borrow() {
            return Err(Error::DiskFull(full.clone()));
        }
        let mut command = Command::new(clock::now(), actions);
        self.check_level(command.level).await?;
        audit::sign(&mut command);
        Ok(command)
    }

    /// Refuses what a manager would stop at. One that has just joined says within moments what it knows.
    async fn check_level(&self, level: u32) -> Result<(), Error> {
        let consensus = &self.inner.consensus;
        let mut feed = consensus.subscribe();
        let check = || level::check(&consensus.state(), level, self.inner.node_id);
        let said = async {
            while let Err(level::Unmet::NotSaid { .. }) = check() {
                if feed.next().await.is_none() {
                    return Err(propose::Error::Stopped { may_still_commit: false });
                }
            }
            Ok(())
        };
        if let Ok(stopped) = tokio::time::timeout(LEVEL_WAIT, said).await {
            stopped?;
        }
        check().map_err(|unmet| Error::Precondition(unmet.to_string()))
    }

    /// Waits until this manager's own key file is sealed as asked: who restarts it then finds it so.
    pub(crate) async fn wait_locked(&self, version: u64) {
        let mut kept = self.inner.lock_version.clone();
        let is_kept = kept.wait_for(|kept| *kept >= version);
        if tokio::time::timeout(LOCK_WAIT, is_kept).await.is_err() {
            tracing::warn!("this manager's key file is not sealed as asked yet");
        }
    }

    fn facts(&self, state: &State) -> Facts {
        let Inner { consensus, reach, .. } = &*self.inner;
        let leader = consensus.leadership().borrow().leader.as_ref().map(|leader| leader.raft_id);
        let voters = reach.voters(state);
        let silent = voters.into_iter().filter(|(_, voter)| voter.is_silent());
        let silent: BTreeSet<u64> = silent.map(|(raft_id, _)| raft_id).collect();
        Facts { leader: leader.filter(|leader| !silent.contains(leader)), silent }
    }

    fn json(&self, state: &State, mut object: Object) -> String {
        let facts = match &mut object {
            Object::Service(service) => {
                service.conditions = conditions::of_service(state, service.id);
                Facts::default()
            }
            Object::Node(node) if node.manager_status.is_some() => self.facts(state),
            _ => Facts::default(),
        };
        document(object, state, &facts).to_string()
    }

    async fn join_token(&self, request: JoinTokenRequest) -> Result<JoinTokenResponse, Error> {
        let state = self.read().await?;
        let cluster = state
            .cluster()
            .ok_or_else(|| Error::NotFound { kind: "cluster", reference: "default".into() })?;
        let mut cluster = (**cluster).clone();
        let secret = match request.role.as_str() {
            "worker" => &mut cluster.join_tokens.worker,
            "manager" => &mut cluster.join_tokens.manager,
            other => {
                return Err(Error::Invalid(format!(
                    "there is no role {other:?}: ask for worker or manager"
                )));
            }
        };
        if request.rotate {
            *secret = skep_runtime::identity::new_secret();
        }
        let secret = secret.clone();
        let root_digest = skep_runtime::identity::root_digest(&cluster.root_ca_cert)
            .map_err(|error| Error::Precondition(error.to_string()))?;
        if request.rotate {
            let expect = skep_manager_core::Expect::Version(cluster.meta.version);
            self.write(vec![Action::Put { object: Object::Cluster(Box::new(cluster)), expect }])
                .await?;
        }
        let token = JoinToken { root_digest, secret }.to_string();
        Ok(JoinTokenResponse { token, address: self.inner.address.clone() })
    }

    async fn list(&self, request: ListRequest) -> Result<ListResponse, Error> {
        let (state, stale) = self.read_for_looking().await?;
        let kind = kind_of(&request.kind)?;
        let mut objects: Vec<(String, Object)> = Vec::new();
        let stack_label = |labels: Option<&skep_common::spec::Labels>| {
            let label = labels.and_then(|labels| labels.get("com.docker.stack.namespace"));
            request.stack.is_empty() || label.is_some_and(|label| *label == request.stack)
        };
        let stored = state.objects();
        let visible =
            stored.chain(lookup::predefined()).filter(|object| !lookup::is_hidden(object));
        for object in visible.filter(|object| object.kind() == kind) {
            let (wanted, key) = match &object {
                Object::Node(node) => (true, format!("{} {}", node.hostname(), node.id)),
                Object::Service(service) => {
                    (stack_label(service.spec.labels.as_ref()), service.spec.name.clone())
                }
                Object::Task(task) => {
                    let service = state.service(task.service_id);
                    let labels = service.and_then(|service| service.spec.labels.as_ref());
                    let of_service = request.service_ids.is_empty()
                        || request.service_ids.contains(&task.service_id.to_string());
                    let node = task.node_id.map(|id| id.to_string()).unwrap_or_default();
                    let on_node = request.node_ids.is_empty() || request.node_ids.contains(&node);
                    let newest_first = u64::MAX - task.meta.created_at.0.unsigned_abs();
                    let key = format!("{} {:020} {newest_first:020}", task.service_name, task.slot);
                    (of_service && on_node && stack_label(labels), key)
                }
                Object::Stack(stack) => (true, stack.spec.name.clone()),
                Object::Image(image) => (true, image.name.clone()),
                Object::Network(network) => (true, network.spec.name.clone()),
                Object::Secret(secret) => (true, secret.spec.name.clone()),
                Object::Config(config) => (true, config.spec.name.clone()),
                Object::Cluster(_) | Object::Revision(_) => (true, String::new()),
            };
            if wanted {
                objects.push((key, object));
            }
        }
        objects.sort_by(|(left, _), (right, _)| left.cmp(right));
        let json = objects.into_iter().map(|(_, object)| self.json(&state, object)).collect();
        Ok(ListResponse { json, stale })
    }

    async fn digests(&self) -> Result<Vec<ManagerDigest>, Error> {
        let state = self.read().await?;
        let managers = state.nodes().values().filter_map(|node| {
            let status = node.manager_status.as_ref()?;
            Some((node.id, node.hostname().to_owned(), status.addr.clone()))
        });
        let asked = managers.map(|(node_id, hostname, addr)| async move {
            let answer = if node_id == self.inner.node_id {
                let status = self.inner.consensus.status().await;
                Ok((status.version, status.digest))
            } else {
                self.remote_digest(node_id, &addr).await
            };
            let (version, digest, error) = match answer {
                Ok((version, digest)) => (version, digest, String::new()),
                Err(status) => (0, String::new(), status.message().to_owned()),
            };
            ManagerDigest { node_id: node_id.to_string(), hostname, version, digest, error }
        });
        Ok(futures::future::join_all(asked).await)
    }

    async fn remote_digest(&self, node_id: NodeId, addr: &str) -> Result<(u64, String), Status> {
        let channel = self.inner.pool.channel(addr, skep_runtime::transport::Peer::Node(node_id));
        let mut request = Request::new(RaftStatusRequest::default());
        request.set_timeout(skep_common::limits::RPC_DEADLINE);
        let answer = raft_client::RaftClient::new(channel).status(request).await?.into_inner();
        Ok((answer.version, answer.digest))
    }
}

fn parse_id(kind: Kind, text: &str) -> Result<u128, Error> {
    let not_found = || Error::NotFound { kind: kind.name(), reference: text.to_owned() };
    text.parse::<ServiceId>().map(|id| id.0).map_err(|_| not_found())
}

fn parse_json<'a, T: serde::Deserialize<'a>>(what: &str, json: &'a str) -> Result<T, Error> {
    serde_json::from_str(json)
        .map_err(|error| Error::Invalid(format!("the {what} is not valid: {error}")))
}

fn outcome(outcome: Outcome) -> Result<Version, Error> {
    match outcome {
        Outcome::Applied(version) => {
            audit::note(version);
            Ok(version)
        }
        Outcome::Refused(refusal) => Err(Error::Refused(refusal)),
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    type WatchStream = ReceiverStream<Result<WatchEvent, Status>>;
    type ServiceLogsStream = ReceiverStream<Result<LogRecord, Status>>;
    type BackupStream = ReceiverStream<Result<BackupChunk, Status>>;
    type EventsStream = ReceiverStream<Result<Event, Status>>;

    async fn get(&self, request: Request<GetRequest>) -> Answer<Document> {
        let request = request.into_inner();
        let kind = kind_of(&request.kind)?;
        let (state, stale) = self.read_for_looking().await?;
        let found = lookup::find(&state, kind, &request.reference, self.inner.node_id);
        let mut object = found.map_err(|error| match stale.is_empty() {
            true => error,
            false => Error::Unconfirmed { missing: error.to_string(), stale: stale.clone() },
        })?;
        if let Object::Config(config) = &mut object {
            // Anybody may read it, as in Docker. Lists are without: a config may be large.
            let newest = config.versions.values().next_back();
            config.spec.data = newest.and_then(|version| version.data.clone());
        }
        let json = self.json(&state, object);
        Ok(Response::new(Document { kind: request.kind, json, stale }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Answer<ListResponse> {
        Ok(Response::new(Self::list(self, request.into_inner()).await?))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        Ok(Response::new(watch::start(self, request.into_inner())?))
    }

    async fn create_service(
        &self,
        request: Request<CreateServiceRequest>,
    ) -> Answer<CreateServiceResponse> {
        let spec = parse_json("service spec", &request.into_inner().spec_json)?;
        Ok(Response::new(services::create(self, spec).await?))
    }

    async fn update_service(
        &self,
        request: Request<UpdateServiceRequest>,
    ) -> Answer<UpdateServiceResponse> {
        let request = request.into_inner();
        Ok(Response::new(services::update(self, request).await?))
    }

    async fn remove_service(
        &self,
        request: Request<RemoveServiceRequest>,
    ) -> Answer<RemoveServiceResponse> {
        services::remove(self, &request.into_inner().id).await?;
        Ok(Response::new(RemoveServiceResponse {}))
    }

    async fn service_logs(
        &self,
        request: Request<ServiceLogsRequest>,
    ) -> Answer<Self::ServiceLogsStream> {
        Ok(Response::new(logs::start(self, request.into_inner())?))
    }

    async fn update_node(&self, request: Request<UpdateNodeRequest>) -> Answer<UpdateNodeResponse> {
        nodes::update(self, request.into_inner()).await?;
        Ok(Response::new(UpdateNodeResponse {}))
    }

    async fn remove_node(&self, request: Request<RemoveNodeRequest>) -> Answer<RemoveNodeResponse> {
        nodes::remove(self, request.into_inner()).await?;
        Ok(Response::new(RemoveNodeResponse {}))
    }

    async fn join_token(&self, request: Request<JoinTokenRequest>) -> Answer<JoinTokenResponse> {
        Ok(Response::new(Self::join_token(self, request.into_inner()).await?))
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Answer<CreateNetworkResponse> {
        let spec = parse_json("network spec", &request.into_inner().spec_json)?;
        Ok(Response::new(networks::create(self, spec).await?))
    }

    async fn remove_network(
        &self,
        request: Request<RemoveNetworkRequest>,
    ) -> Answer<RemoveNetworkResponse> {
        networks::remove(self, &request.into_inner().id).await?;
        Ok(Response::new(RemoveNetworkResponse {}))
    }

    async fn deploy_stack(
        &self,
        request: Request<DeployStackRequest>,
    ) -> Answer<DeployStackResponse> {
        Ok(Response::new(stacks::deploy(self, request.into_inner()).await?))
    }

    async fn remove_stack(
        &self,
        request: Request<RemoveStackRequest>,
    ) -> Answer<RemoveStackResponse> {
        Ok(Response::new(stacks::remove(self, &request.into_inner().name).await?))
    }

    async fn check_network(
        &self,
        request: Request<CheckNetworkRequest>,
    ) -> Answer<CheckNetworkResponse> {
        let checks = path::check(self, &request.into_inner()).await?;
        Ok(Response::new(CheckNetworkResponse { checks }))
    }

    async fn digest(&self, _: Request<DigestRequest>) -> Answer<DigestResponse> {
        Ok(Response::new(DigestResponse { managers: self.digests().await? }))
    }

    async fn create_secret(
        &self,
        request: Request<CreateSecretRequest>,
    ) -> Answer<CreateSecretResponse> {
        Ok(Response::new(secrets::create(self, request.into_inner()).await?))
    }

    async fn update_secret(
        &self,
        request: Request<UpdateSecretRequest>,
    ) -> Answer<UpdateSecretResponse> {
        Ok(Response::new(secrets::update(self, request.into_inner()).await?))
    }

    async fn remove_secret(
        &self,
        request: Request<RemoveSecretRequest>,
    ) -> Answer<RemoveSecretResponse> {
        Ok(Response::new(secrets::remove(self, request.into_inner()).await?))
    }

    async fn create_config(
        &self,
        request: Request<CreateConfigRequest>,
    ) -> Answer<CreateConfigResponse> {
        Ok(Response::new(configs::create(self, request.into_inner()).await?))
    }

    async fn update_config(
        &self,
        request: Request<UpdateConfigRequest>,
    ) -> Answer<UpdateConfigResponse> {
        Ok(Response::new(configs::update(self, request.into_inner()).await?))
    }

    async fn remove_config(
        &self,
        request: Request<RemoveConfigRequest>,
    ) -> Answer<RemoveConfigResponse> {
        Ok(Response::new(configs::remove(self, request.into_inner()).await?))
    }

    async fn update_swarm(
        &self,
        request: Request<UpdateSwarmRequest>,
    ) -> Answer<UpdateSwarmResponse> {
        Ok(Response::new(swarm::update(self, request.into_inner()).await?))
    }

    async fn rotate_ca(&self, request: Request<RotateCaRequest>) -> Answer<RotateCaResponse> {
        Ok(Response::new(swarm::rotate_ca(self, request.into_inner()).await?))
    }

    async fn unlock_key(&self, request: Request<UnlockKeyRequest>) -> Answer<UnlockKeyResponse> {
        Ok(Response::new(swarm::unlock_key(self, request.into_inner()).await?))
    }

    async fn service_history(
        &self,
        request: Request<ServiceHistoryRequest>,
    ) -> Answer<ServiceHistoryResponse> {
        Ok(Response::new(history::of_service(self, request.into_inner()).await?))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Answer<ExplainResponse> {
        Ok(Response::new(plans::explain(self, request.into_inner()).await?))
    }

    async fn plan(&self, request: Request<PlanRequest>) -> Answer<PlanResponse> {
        Ok(Response::new(plans::plan(self, request.into_inner()).await?))
    }

    async fn what_if(&self, request: Request<WhatIfRequest>) -> Answer<PlanResponse> {
        Ok(Response::new(plans::what_if(self, request.into_inner()).await?))
    }

    async fn backup(&self, request: Request<BackupRequest>) -> Answer<Self::BackupStream> {
        Ok(Response::new(swarm::backup(self, request.into_inner()).await?))
    }

    async fn events(&self, request: Request<EventsRequest>) -> Answer<Self::EventsStream> {
        Ok(Response::new(events::start(self, request.into_inner())?))
    }
}
