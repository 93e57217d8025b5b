//! `skep.v1.Control` on the unix socket: this node's own manager answers, or Docker's sentence does.

use skep_proto::control_server::Control;
use skep_proto::*;
use tonic::{Request, Response, Status};

use super::machine::{Machine, Membership};
use super::unlock;
use skep_manager::control::Audited;

/// Answers for whatever this machine is at the moment.
#[derive(Clone)]
pub(super) struct LocalControl {
    machine: Machine,
}

impl LocalControl {
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine }
    }

    fn manager(&self) -> Result<Audited, Status> {
        let why = match self.machine.membership() {
            Membership::Failed(obstacle) => return Err(obstacle.status()),
            Membership::Locked(_) => return Err(unlock::locked()),
            Membership::Member(node) => match (node.refusal(), node.control()) {
                (Some(removed), _) => removed,
                (None, Some(control)) => return Ok(control),
                (None, None) => {
                    "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node."
                }
            },
            Membership::Outside => {
                "This node is not a swarm manager. Use \"skep swarm init\" or \"skep swarm join\" to connect this node to swarm and try again."
            }
        };
        Err(Status::failed_precondition(why))
    }
}

macro_rules! delegate {
    ($($method:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl Control for LocalControl {
            type WatchStream = <Audited as Control>::WatchStream;
            type ServiceLogsStream = <Audited as Control>::ServiceLogsStream;
            type BackupStream = <Audited as Control>::BackupStream;
            type EventsStream = <Audited as Control>::EventsStream;
            $(async fn $method(&self, request: Request<$request>) -> Result<Response<$response>, Status> {
                Control::$method(&self.manager()?, request).await
            })*
        }
    };
}

delegate! {
    get(GetRequest) -> Document;
    list(ListRequest) -> ListResponse;
    watch(WatchRequest) -> Self::WatchStream;
    create_service(CreateServiceRequest) -> CreateServiceResponse;
    update_service(UpdateServiceRequest) -> UpdateServiceResponse;
    remove_service(RemoveServiceRequest) -> RemoveServiceResponse;
    service_logs(ServiceLogsRequest) -> Self::ServiceLogsStream;
    update_node(UpdateNodeRequest) -> UpdateNodeResponse;
    remove_node(RemoveNodeRequest) -> RemoveNodeResponse;
    join_token(JoinTokenRequest) -> JoinTokenResponse;
    create_network(CreateNetworkRequest) -> CreateNetworkResponse;
    remove_network(RemoveNetworkRequest) -> RemoveNetworkResponse;
    check_network(CheckNetworkRequest) -> CheckNetworkResponse;
    deploy_stack(DeployStackRequest) -> DeployStackResponse;
    remove_stack(RemoveStackRequest) -> RemoveStackResponse;
    digest(DigestRequest) -> DigestResponse;
    create_secret(CreateSecretRequest) -> CreateSecretResponse;
    update_secret(UpdateSecretRequest) -> UpdateSecretResponse;
    remove_secret(RemoveSecretRequest) -> RemoveSecretResponse;
    create_config(CreateConfigRequest) -> CreateConfigResponse;
    update_config(UpdateConfigRequest) -> UpdateConfigResponse;
    remove_config(RemoveConfigRequest) -> RemoveConfigResponse;
    update_swarm(UpdateSwarmRequest) -> UpdateSwarmResponse;
    rotate_ca(RotateCaRequest) -> RotateCaResponse;
    unlock_key(UnlockKeyRequest) -> UnlockKeyResponse;
    service_history(ServiceHistoryRequest) -> ServiceHistoryResponse;
    explain(ExplainRequest) -> ExplainResponse;
    plan(PlanRequest) -> PlanResponse;
    what_if(WhatIfRequest) -> PlanResponse;
    backup(BackupRequest) -> Self::BackupStream;
    events(EventsRequest) -> Self::EventsStream;
}
