//! What a test in virtual time puts in the place of the machine, on its own thread: clock, network and chance.

use std::cell::Cell;
use std::io;

use futures::Stream;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use skep_common::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::codegen::http::Uri;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};

use crate::TaskSet;
use crate::access::{AccessLayer, Caller};
use crate::gate::Gate;
use crate::transport::{Connection, ServeError, server};

/// What a connection is.
pub trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// An attempt to connect.
pub type Dialled = BoxFuture<'static, io::Result<Box<dyn Bytes>>>;

/// What the code finds instead of the machine.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Wall-clock time.
    pub now: fn() -> Timestamp,
    /// Connects to `ip:port`. Nothing is encrypted on such a connection.
    pub dial: fn(&str) -> Dialled,
    /// A seed for whoever draws lots.
    pub chance: fn() -> u64,
}

thread_local! {
    static MACHINE: Cell<Option<Machine>> = const { Cell::new(None) };
}

/// Has this thread run on `machine` from now on.
pub fn install(machine: Machine) {
    MACHINE.set(Some(machine));
}

pub(crate) fn machine() -> Option<Machine> {
    MACHINE.get()
}

/// A seed, where chance is simulated.
pub fn chance() -> Option<u64> {
    machine().map(|machine| (machine.chance)())
}

/// A channel over connections of the simulated network.
pub(crate) fn channel(endpoint: &Endpoint, machine: Machine, address: &str) -> Channel {
    let address = address.to_owned();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let dialled = (machine.dial)(&address);
        let deadline = skep_common::limits::CONNECT_DEADLINE;
        async move {
            match tokio::time::timeout(deadline, dialled).await {
                Ok(stream) => stream.map(TokioIo::new),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            }
        }
    }))
}

/// Serves `routes` to those connections, each with its caller, that `gate` lets in, until the task set is cancelled.
pub async fn serve(
    connections: impl Stream<Item = (Box<dyn Bytes>, Caller)>,
    gate: Gate,
    routes: Routes,
    tasks: &TaskSet,
) -> Result<(), ServeError> {
    use futures::StreamExt as _;
    let layer = AccessLayer::new(gate.clone());
    let connections = connections.map(|(stream, caller)| {
        Ok::<_, io::Error>(Connection {
            stream,
            caller,
            end: Box::pin(gate.clone().end_of(caller)),
        })
    });
    let shutdown = tasks.token().cancelled_owned();
    server(layer, routes).serve_with_incoming_shutdown(connections, shutdown).await?;
    Ok(())
}
