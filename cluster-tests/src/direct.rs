//! The control API of a node's daemon, asked over its client socket by the test itself, once for each question.
//!
//! The client's commands take a tenth of a second to start and try some things again; what is recorded of a
//! swarm under faults must do neither.

use std::path::PathBuf;
use std::time::Duration;

use skep_common::{Node as NodeObject, Service};
use skep_proto::control_client::ControlClient;
use skep_proto::{CreateServiceRequest, GetRequest, ListRequest, UpdateServiceRequest};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::lab::Lab;

/// A socket on the same machine.
const CONNECT_DEADLINE: Duration = Duration::from_millis(500);
/// Longer than an election, shorter than a test has patience for one client of a manager that is cut off.
const ANSWER_DEADLINE: Duration = Duration::from_secs(3);
/// A manager that knows who leads says so within this.
const AT_ONCE: Duration = Duration::from_millis(300);

/// A client of one daemon, whichever process that is at the moment.
#[derive(Debug)]
pub struct Direct {
    node: String,
    socket: PathBuf,
    control: Option<ControlClient<Channel>>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The daemon is not there: nothing was asked.
    NotConnected,
    /// It was asked, and said this, or nothing in time.
    Status(Status),
}

impl NoAnswer {
    /// The code, where something was asked.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::NotConnected => None,
            Self::Status(status) => Some(status.code()),
        }
    }
}

impl Lab {
    /// The node that leads, as the first of these managers says that knows it at once; nobody may.
    pub fn leader_now(&self, managers: &[&str]) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a test can have a runtime").block_on(async {
            for node in managers {
                let mut direct = self.direct(node);
                let asking = tokio::time::timeout(AT_ONCE, direct.leader());
                if let Ok(Ok(Some(leader))) = asking.await {
                    return Some(leader);
                }
            }
            None
        })
    }

    /// A client of a node's daemon that does not try anything twice.
    pub fn direct(&self, node: &str) -> Direct {
        let socket = format!("/run/skep-lab/{}/{node}/run/skep.sock", self.name());
        Direct { node: node.to_owned(), socket: socket.into(), control: None }
    }
}

impl Direct {
    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Makes a service; gives its id and its version.
    pub async fn create(&mut self, spec_json: String) -> Result<(String, u64), NoAnswer> {
        let answer = self
            .ask(|mut control| async move {
                control.create_service(CreateServiceRequest { spec_json }).await
            })
            .await?;
        Ok((answer.id, answer.version))
    }

    /// Changes the service that is at a version; gives its next one.
    pub async fn update(
        &mut self,
        id: &str,
        version: u64,
        spec_json: String,
    ) -> Result<u64, NoAnswer> {
        let id = id.to_owned();
        let request =
            UpdateServiceRequest { id, version, spec_json, rollback: false, rollback_to: 0 };
        let answer =
            self.ask(|mut control| async move { control.update_service(request).await }).await?;
        Ok(answer.version)
    }

    /// Reads a service.
    pub async fn service(&mut self, name: &str) -> Result<Service, NoAnswer> {
        let request = GetRequest { kind: "service".into(), reference: name.to_owned() };
        let answer = self.ask(|mut control| async move { control.get(request).await }).await?;
        if !answer.stale.is_empty() {
            return Err(NoAnswer::Status(Status::unavailable(answer.stale)));
        }
        Ok(serde_json::from_str(&answer.json).expect("a daemon sends whole services"))
    }

    /// The name of the node that leads.
    pub async fn leader(&mut self) -> Result<Option<String>, NoAnswer> {
        let request = ListRequest { kind: "node".into(), ..ListRequest::default() };
        let answer = self.ask(|mut control| async move { control.list(request).await }).await?;
        let nodes = answer.json.iter().map(|json| -> NodeObject {
            serde_json::from_str(json).expect("a daemon sends whole nodes")
        });
        let is_leader =
            |node: &NodeObject| node.manager_status.as_ref().is_some_and(|status| status.leader);
        Ok(nodes.filter(is_leader).map(|node| node.hostname().to_owned()).next())
    }

    async fn ask<T, F>(
        &mut self,
        call: impl FnOnce(ControlClient<Channel>) -> F,
    ) -> Result<T, NoAnswer>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let control = match self.control.take() {
            Some(control) => control,
            None => self.connect().await?,
        };
        let answer = tokio::time::timeout(ANSWER_DEADLINE, call(control.clone())).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        match answer {
            Ok(answer) => {
                self.control = Some(control);
                Ok(answer.into_inner())
            }
            Err(status) => {
                let is_refusal =
                    matches!(status.code(), Code::Aborted | Code::AlreadyExists | Code::NotFound);
                // Otherwise the next question goes to whoever listens then.
                self.control = is_refusal.then_some(control);
                Err(NoAnswer::Status(status))
            }
        }
    }

    async fn connect(&self) -> Result<ControlClient<Channel>, NoAnswer> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket.display()))
            .expect("a path of a lab is plain");
        let connecting = tokio::time::timeout(CONNECT_DEADLINE, endpoint.connect()).await;
        let channel = connecting.ok().and_then(Result::ok).ok_or(NoAnswer::NotConnected)?;
        Ok(ControlClient::new(channel))
    }
}
