//! `skep.v1.Containers`: single containers of a node, for the node that asks. What is allowed is decided in
//! the core.

use skep_common::limits::CONTAINER_SPEC_BYTES_MAX;
use skep_common::{NodeId, Object, Task, TaskId};
use skep_manager_core::{Action, Refusal, State, container};
use skep_proto::containers_server::Containers;
use skep_proto::{
    ContainerRequest, ContainerResponse, ListContainersRequest, ListContainersResponse,
    RemoveContainerRequest, RunContainerRequest, RunContainerResponse, WatchEvent,
};
use skep_runtime::access::Caller;
use skep_runtime::clock;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::audit::audited;
use super::error::Error;
use super::{Answer, ControlService, parse_json, watch};

/// The service behind `skep.v1.Containers`: a node sees and changes its own containers, and no others.
#[derive(Debug, Clone)]
pub struct ContainersService {
    control: ControlService,
}

impl ContainersService {
    pub(crate) fn new(control: ControlService) -> Self {
        Self { control }
    }

    async fn start(&self, node_id: NodeId, request: RunContainerRequest) -> Result<TaskId, Error> {
        let id = request.id.parse::<TaskId>();
        let id = id.map_err(|error| Error::Invalid(error.to_string()))?;
        check_size(&request.spec_json)?;
        let asked = container::Request {
            name: request.name,
            spec: parse_json("task spec", &request.spec_json)?,
            auto_remove: request.auto_remove,
        };
        loop {
            let state = self.control.read().await?;
            if state.task(id).is_some_and(|task| is_own(task, node_id)) {
                return Ok(id); // Committed by a manager that could not say so.
            }
            let action = container::run(&state, id, node_id, asked.clone(), clock::now())?;
            match self.control.write(vec![action]).await {
                // Two writers were given one address or one name: the next view decides.
                Err(Error::Refused(
                    Refusal::AddressInUse { .. }
                    | Refusal::NameTaken { .. }
                    | Refusal::NetworkNotFound { .. },
                )) => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(id),
            }
        }
    }

    /// Changes one container of a node as the core decides.
    async fn change(
        &self,
        node_id: NodeId,
        reference: &str,
        decide: impl Fn(&Task) -> Result<Action, container::Error>,
    ) -> Answer<ContainerResponse> {
        let state: State = self.control.read().await?;
        let task = container::find(&state, node_id, reference).map_err(Error::Container)?;
        let action = decide(task).map_err(Error::Container)?;
        self.control.write(vec![action]).await?;
        Ok(Response::new(ContainerResponse { id: task.id.to_string() }))
    }
}

fn check_size(spec_json: &str) -> Result<(), Error> {
    if spec_json.len() <= CONTAINER_SPEC_BYTES_MAX {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the container's spec has {} bytes, and {CONTAINER_SPEC_BYTES_MAX} at most are taken: put data into a volume or its image",
        spec_json.len()
    )))
}

fn is_own(task: &Task, node_id: NodeId) -> bool {
    task.standalone.is_some() && task.node_id == Some(node_id)
}

#[tonic::async_trait]
impl Containers for ContainersService {
    type WatchStream = ReceiverStream<Result<WatchEvent, Status>>;

    async fn run(&self, request: Request<RunContainerRequest>) -> Answer<RunContainerResponse> {
        let node_id = Caller::node_id(&request)?;
        let (caller, asked) = (Caller::of(&request), request.into_inner());
        let object = format!("container/{}", asked.name);
        let answer = async {
            let id = self.start(node_id, asked).await?;
            Ok(Response::new(RunContainerResponse { id: id.to_string() }))
        };
        audited(caller, "RunContainer", &object, answer).await
    }

    async fn list(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        let node_id = Caller::node_id(&request)?;
        let state = self.control.read().await?;
        let mut tasks: Vec<_> = container::all_of_node(&state, node_id).cloned().collect();
        tasks.sort_by_key(|task| (task.meta.created_at, task.id));
        let json = |task: std::sync::Arc<Task>| {
            self.control.json(&state, Object::Task(Box::new((*task).clone())))
        };
        Ok(Response::new(ListContainersResponse { jsons: tasks.into_iter().map(json).collect() }))
    }

    async fn watch(&self, request: Request<ContainerRequest>) -> Answer<Self::WatchStream> {
        let node_id = Caller::node_id(&request)?;
        let state = self.control.read().await?;
        let reference = request.into_inner().reference;
        let task = container::find(&state, node_id, &reference).map_err(Error::Container)?;
        Ok(Response::new(watch::start_of_task(&self.control, task.id)))
    }

    async fn stop(&self, request: Request<ContainerRequest>) -> Answer<ContainerResponse> {
        let node_id = Caller::node_id(&request)?;
        let (caller, reference) = (Caller::of(&request), request.into_inner().reference);
        let answer = self.change(node_id, &reference, |task| Ok(container::stop(task)));
        audited(caller, "StopContainer", &format!("container/{reference}"), answer).await
    }

    async fn remove(&self, request: Request<RemoveContainerRequest>) -> Answer<ContainerResponse> {
        let node_id = Caller::node_id(&request)?;
        let caller = Caller::of(&request);
        let RemoveContainerRequest { reference, force } = request.into_inner();
        let answer = self.change(node_id, &reference, |task| container::remove(task, force));
        audited(caller, "RemoveContainer", &format!("container/{reference}"), answer).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_has_a_bounded_size() {
        assert!(check_size(&"x".repeat(CONTAINER_SPEC_BYTES_MAX)).is_ok());
        let error = check_size(&"x".repeat(CONTAINER_SPEC_BYTES_MAX + 1)).unwrap_err();
        assert!(error.to_string().starts_with("the container's spec has 262145 bytes"), "{error}");
    }
}
