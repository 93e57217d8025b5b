//! The one port, the unix socket, and channels to other nodes.
//!
//! [`Tls`] holds this node's credentials; replacing them ([`Tls::replace`]) changes every new
//! connection and disturbs no open one. A connection knows its [`Caller`](crate::access::Caller) from
//! the handshake on.

mod client;
mod server;
#[cfg(test)]
mod tests;
mod tls;

pub use client::{ChannelPool, Patience, Peer, connect_unverified, connect_with_root, knock};
#[cfg(feature = "simulation")]
pub(crate) use server::{Connection, server};
pub use server::{ServeError, bind_unix, serve_tls, serve_unix};
pub use tls::Tls;
