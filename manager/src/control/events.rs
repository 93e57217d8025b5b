//! What happened, and what happens.

use skep_proto::{Event, EventsRequest};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::ControlService;
use super::error::not_supported;

pub(super) fn start(
    _control: &ControlService,
    _request: EventsRequest,
) -> Result<ReceiverStream<Result<Event, Status>>, Status> {
    Err(not_supported("events"))
}
