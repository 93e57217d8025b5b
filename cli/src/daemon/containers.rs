//! `skep.v1.Containers` on the unix socket: this node asks a manager, as the node it is.

use skep_proto::containers_client::ContainersClient;
use skep_proto::containers_server::Containers;
use skep_proto::{
    ContainerRequest, ContainerResponse, ListContainersRequest, ListContainersResponse,
    RemoveContainerRequest, RunContainerRequest, RunContainerResponse, WatchEvent,
};
use skep_runtime::transport::Peer;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use super::machine::{Machine, Membership};

/// Asks for whatever this machine is at the moment.
#[derive(Clone)]
pub(super) struct LocalContainers {
    machine: Machine,
}

impl LocalContainers {
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine }
    }

    /// Asks one manager after the other until one answers; what is asked may be done twice without harm.
    async fn ask<T, F>(&self, ask: impl Fn(ContainersClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let node = match self.machine.membership() {
            Membership::Member(node) => match node.refusal() {
                Some(removed) => return Err(Status::failed_precondition(removed)),
                None => node,
            },
            Membership::Failed(obstacle) => return Err(obstacle.status()),
            Membership::Locked(_) => return Err(super::unlock::locked()),
            Membership::Outside => {
                return Err(Status::failed_precondition(
                    "This node is in no swarm: containers run on members. Use \"skep swarm init\" or \"skep swarm join\" and try again.",
                ));
            }
        };
        let mut last = Status::unavailable("no manager is known");
        for manager in node.managers.all() {
            let channel = node.pool.channel(&manager, Peer::Manager);
            match ask(ContainersClient::new(channel)).await {
                Err(status) if may_another_know(status.code()) => last = status,
                answer => return answer,
            }
        }
        Err(last)
    }
}

/// Whether it was that manager, and not the request: it is gone, hangs, or is of an earlier version.
fn may_another_know(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unimplemented
    )
}

fn with_deadline<T>(request: T) -> Request<T> {
    let mut request = Request::new(request);
    request.set_timeout(skep_common::limits::RPC_DEADLINE);
    request
}

#[tonic::async_trait]
impl Containers for LocalContainers {
    type WatchStream = Streaming<WatchEvent>;

    async fn run(
        &self,
        request: Request<RunContainerRequest>,
    ) -> Result<Response<RunContainerResponse>, Status> {
        let mut request = request.into_inner();
        request.id = skep_common::TaskId::random(&mut rand::rng()).to_string();
        self.ask(|mut client| {
            let request = with_deadline(request.clone());
            async move { client.run(request).await }
        })
        .await
    }

    async fn list(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        self.ask(
            |mut client| async move { client.list(with_deadline(ListContainersRequest {})).await },
        )
        .await
    }

    async fn watch(
        &self,
        request: Request<ContainerRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        self.ask(|mut client| {
            let request = request.clone();
            async move { client.watch(request).await }
        })
        .await
    }

    async fn stop(
        &self,
        request: Request<ContainerRequest>,
    ) -> Result<Response<ContainerResponse>, Status> {
        let request = request.into_inner();
        self.ask(|mut client| {
            let request = with_deadline(request.clone());
            async move { client.stop(request).await }
        })
        .await
    }

    async fn remove(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<ContainerResponse>, Status> {
        let request = request.into_inner();
        self.ask(|mut client| {
            let request = with_deadline(request.clone());
            async move { client.remove(request).await }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_that_hangs_or_is_of_before_is_not_the_last_one_asked() {
        // A request whose deadline ends at the client is cancelled there.
        let of_manager =
            [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Unimplemented];
        assert!(of_manager.into_iter().all(may_another_know));
        let of_request = [Code::NotFound, Code::AlreadyExists, Code::InvalidArgument];
        assert!(!of_request.into_iter().any(may_another_know));
    }
}
