//! Who changed what, and when: a line for each write, in the log of the manager that was asked.
//!
//! Lines have the target `audit`: `SKEP_LOG=off,audit=info` leaves them alone. A write that is refused has one, too.
//! None has more of a request than the names and ids of objects.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Deserialize;
use skep_common::Version;
use skep_manager_core::Command;
use skep_manager_core::command::Actor;
use skep_proto::control_server::Control;
use skep_proto::*;
use skep_runtime::access::Caller;
use tonic::{Code, Request, Response, Status};

use super::{Answer, ControlService};

tokio::task_local! {
    static ASKED: Arc<Asked>;
}

/// A request that may write.
#[derive(Debug)]
struct Asked {
    caller: Caller,
    method: &'static str,
    /// Of what it wrote last; 0 for nothing.
    version: AtomicU64,
}

/// Puts down in a command who asked for it.
pub(crate) fn sign(command: &mut Command) {
    command.actor = ASKED.try_with(|asked| asked.actor()).ok();
}

/// Notes what a command became.
pub(crate) fn note(version: Version) {
    // A write that no request made has no line.
    let _ = ASKED.try_with(|asked| asked.version.store(version.index, Ordering::Relaxed));
}

impl Asked {
    fn actor(&self) -> Actor {
        let method = self.method.to_owned();
        match self.caller {
            Caller::Node(node_id, role) => Actor {
                node_id: Some(node_id),
                role: role.name().to_owned(),
                via: "tls".to_owned(),
                method,
            },
            Caller::Local { .. } => Actor { via: "socket".to_owned(), method, ..Actor::default() },
            Caller::Anonymous => Actor { via: "tls".to_owned(), method, ..Actor::default() },
        }
    }

    fn tell<T>(&self, object: &str, answer: &Answer<T>) {
        let (caller, method) = (self.caller.to_string(), self.method);
        let version = self.version.load(Ordering::Relaxed);
        match answer {
            Ok(_) => {
                tracing::info!(target: "audit", caller, method, object, version, outcome = "applied");
            }
            Err(status) => {
                // Why a request is invalid may quote it, and with it what is nobody's to read.
                let is_quoting = status.code() == Code::InvalidArgument;
                let (code, error) = (status.code(), if is_quoting { "" } else { status.message() });
                tracing::info!(target: "audit", caller, method, object, version, outcome = "refused", ?code, error);
            }
        }
    }
}

/// Waits for the answer to a request that may write, and notes what it wrote.
async fn asked<T>(
    caller: Caller,
    method: &'static str,
    answer: impl Future<Output = Answer<T>>,
) -> (Arc<Asked>, Answer<T>) {
    let asked = Arc::new(Asked { caller, method, version: AtomicU64::new(0) });
    let answer = ASKED.scope(Arc::clone(&asked), answer).await;
    (asked, answer)
}

/// Waits for the answer to a request that may write, and has a line for it.
pub(crate) async fn audited<T>(
    caller: Caller,
    method: &'static str,
    object: &str,
    answer: impl Future<Output = Answer<T>>,
) -> Answer<T> {
    let (asked, answer) = asked(caller, method, answer).await;
    asked.tell(object, &answer);
    answer
}

/// The same for what a node asks for, again and again by itself where there is no quorum: that has no line.
pub(crate) async fn audited_try<T>(
    caller: Caller,
    method: &'static str,
    object: &str,
    answer: impl Future<Output = Answer<T>>,
) -> Answer<T> {
    let (asked, answer) = asked(caller, method, answer).await;
    let is_no_answer =
        |status: &Status| matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded);
    if !answer.as_ref().is_err_and(is_no_answer) {
        asked.tell(object, &answer);
    }
    answer
}

/// What a request is about, in words; `None` where it only reads.
trait Subject {
    fn subject(&self) -> Option<String>;
}

/// The name in a spec.
fn named(kind: &str, spec_json: &str) -> Option<String> {
    #[derive(Default, Deserialize)]
    struct Named {
        #[serde(rename = "Name", default)]
        name: String,
    }
    let spec: Named = serde_json::from_str(spec_json).unwrap_or_default();
    Some(format!("{kind}/{}", spec.name))
}

macro_rules! subjects {
    ($($request:ident: |$one:ident| $subject:expr;)*) => {$(
        impl Subject for $request {
            fn subject(&self) -> Option<String> {
                let $one = self;
                $subject
            }
        }
    )*};
}

subjects! {
    CreateServiceRequest: |one| named("service", &one.spec_json);
    UpdateServiceRequest: |one| Some(format!("service/{}", one.id));
    RemoveServiceRequest: |one| Some(format!("service/{}", one.id));
    UpdateNodeRequest: |one| Some(format!("node/{}", one.id));
    RemoveNodeRequest: |one| Some(format!("node/{}", one.id));
    JoinTokenRequest: |one| one.rotate.then(|| format!("swarm/token of {}s", one.role));
    CreateNetworkRequest: |one| named("network", &one.spec_json);
    RemoveNetworkRequest: |one| Some(format!("network/{}", one.id));
    DeployStackRequest: |one| named("stack", &one.spec_json);
    RemoveStackRequest: |one| Some(format!("stack/{}", one.name));
    CreateSecretRequest: |one| named("secret", &one.spec_json);
    UpdateSecretRequest: |one| Some(format!("secret/{}", one.id));
    RemoveSecretRequest: |one| Some(format!("secret/{}", one.id));
    CreateConfigRequest: |one| named("config", &one.spec_json);
    UpdateConfigRequest: |one| Some(format!("config/{}", one.id));
    RemoveConfigRequest: |one| Some(format!("config/{}", one.id));
    UpdateSwarmRequest: |_one| Some("swarm".to_owned());
    RotateCaRequest: |_one| Some("swarm/root certificate".to_owned());
    // What is read of these is as good as a write.
    UnlockKeyRequest: |_one| Some("swarm/unlock key".to_owned());
    BackupRequest: |_one| Some("swarm/backup".to_owned());
}

/// The control service with a line for each write.
#[derive(Debug, Clone)]
pub struct Audited(ControlService);

impl Audited {
    /// Puts the audit before a service.
    pub fn new(control: ControlService) -> Self {
        Self(control)
    }
}

macro_rules! audited {
    (
        writes { $($write:ident($write_request:ty) -> $write_response:ty = $name:literal;)* }
        reads { $($read:ident($read_request:ty) -> $read_response:ty;)* }
    ) => {
        #[tonic::async_trait]
        impl Control for Audited {
            type WatchStream = <ControlService as Control>::WatchStream;
            type ServiceLogsStream = <ControlService as Control>::ServiceLogsStream;
            type BackupStream = <ControlService as Control>::BackupStream;
            type EventsStream = <ControlService as Control>::EventsStream;
            $(async fn $write(
                &self,
                request: Request<$write_request>,
            ) -> Result<Response<$write_response>, Status> {
                let Some(object) = request.get_ref().subject() else {
                    return Control::$write(&self.0, request).await;
                };
                let caller = Caller::of(&request);
                audited(caller, $name, &object, Control::$write(&self.0, request)).await
            })*
            $(async fn $read(
                &self,
                request: Request<$read_request>,
            ) -> Result<Response<$read_response>, Status> {
                Control::$read(&self.0, request).await
            })*
        }
    };
}

audited! {
    writes {
        create_service(CreateServiceRequest) -> CreateServiceResponse = "CreateService";
        update_service(UpdateServiceRequest) -> UpdateServiceResponse = "UpdateService";
        remove_service(RemoveServiceRequest) -> RemoveServiceResponse = "RemoveService";
        update_node(UpdateNodeRequest) -> UpdateNodeResponse = "UpdateNode";
        remove_node(RemoveNodeRequest) -> RemoveNodeResponse = "RemoveNode";
        join_token(JoinTokenRequest) -> JoinTokenResponse = "JoinToken";
        create_network(CreateNetworkRequest) -> CreateNetworkResponse = "CreateNetwork";
        remove_network(RemoveNetworkRequest) -> RemoveNetworkResponse = "RemoveNetwork";
        deploy_stack(DeployStackRequest) -> DeployStackResponse = "DeployStack";
        remove_stack(RemoveStackRequest) -> RemoveStackResponse = "RemoveStack";
        create_secret(CreateSecretRequest) -> CreateSecretResponse = "CreateSecret";
        update_secret(UpdateSecretRequest) -> UpdateSecretResponse = "UpdateSecret";
        remove_secret(RemoveSecretRequest) -> RemoveSecretResponse = "RemoveSecret";
        create_config(CreateConfigRequest) -> CreateConfigResponse = "CreateConfig";
        update_config(UpdateConfigRequest) -> UpdateConfigResponse = "UpdateConfig";
        remove_config(RemoveConfigRequest) -> RemoveConfigResponse = "RemoveConfig";
        update_swarm(UpdateSwarmRequest) -> UpdateSwarmResponse = "UpdateSwarm";
        rotate_ca(RotateCaRequest) -> RotateCaResponse = "RotateCa";
        unlock_key(UnlockKeyRequest) -> UnlockKeyResponse = "UnlockKey";
        backup(BackupRequest) -> Self::BackupStream = "Backup";
    }
    reads {
        get(GetRequest) -> Document;
        list(ListRequest) -> ListResponse;
        watch(WatchRequest) -> Self::WatchStream;
        service_logs(ServiceLogsRequest) -> Self::ServiceLogsStream;
        check_network(CheckNetworkRequest) -> CheckNetworkResponse;
        digest(DigestRequest) -> DigestResponse;
        service_history(ServiceHistoryRequest) -> ServiceHistoryResponse;
        explain(ExplainRequest) -> ExplainResponse;
        plan(PlanRequest) -> PlanResponse;
        what_if(WhatIfRequest) -> PlanResponse;
        events(EventsRequest) -> Self::EventsStream;
    }
}

#[cfg(test)]
mod tests {
    use skep_common::spec::NodeRole;
    use skep_common::{NodeId, Timestamp};

    use super::*;

    #[test]
    fn a_line_names_the_object_and_nothing_of_its_content() {
        let secret = r#"{"Name":"password","Data":"c2VjcmV0"}"#.to_owned();
        let subject = CreateSecretRequest { spec_json: secret }.subject();
        assert_eq!(subject.as_deref(), Some("secret/password"));
        let broken = CreateServiceRequest { spec_json: "{".into() }.subject();
        assert_eq!(broken.as_deref(), Some("service/"));
        let ask = |rotate| JoinTokenRequest { role: "worker".into(), rotate }.subject();
        assert_eq!([ask(false), ask(true)], [None, Some("swarm/token of workers".into())]);
    }

    #[tokio::test]
    async fn a_command_is_signed_by_the_request_that_it_is_made_for() {
        let command = || Command::new(Timestamp(0), Vec::new());
        let mut own = command();
        sign(&mut own);
        assert_eq!(own.actor, None, "no request asked for it");
        let caller = Caller::Node(NodeId(7), NodeRole::Manager);
        let asked = Arc::new(Asked { caller, method: "UpdateService", version: AtomicU64::new(0) });
        let write = async {
            let mut signed = command();
            sign(&mut signed);
            note(Version { index: 9 });
            signed.actor.unwrap()
        };
        let actor = ASKED.scope(Arc::clone(&asked), write).await;
        let seen = (actor.node_id, &*actor.role, &*actor.via, &*actor.method);
        assert_eq!(seen, (Some(NodeId(7)), "manager", "tls", "UpdateService"));
        assert_eq!(asked.version.load(Ordering::Relaxed), 9);
    }
}
