//! Ways to tasks of nodes that no tunnel leads to: streams through the daemons of these nodes.

use std::fmt;
use std::io;

use futures::future::BoxFuture;
use skep_worker_core::mesh::Passage;
use tokio::io::{AsyncRead, AsyncWrite};

/// What carries one connection beyond the tunnel.
///
/// An end of one direction is passed on alone; what is dropped before its end breaks at the other one, too.
pub trait Carrier: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {
    /// Returns when it breaks at the other end, also while nobody reads or writes here.
    fn broken(&self) -> BoxFuture<'static, io::Error>;
}

/// Opens ways through the daemons of other nodes. [`crate::passage::Daemons`] has the one for real nodes.
#[tonic::async_trait]
pub trait Passages: fmt::Debug + Send + Sync + 'static {
    /// Returns when the task has accepted; an error means that it got nothing.
    async fn open(&self, passage: &Passage) -> io::Result<Box<dyn Carrier>>;
}
