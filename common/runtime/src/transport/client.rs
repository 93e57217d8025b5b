//! Channels to other nodes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, HandshakeKind, SignatureScheme, version};
use skep_common::NodeId;
use skep_common::limits::{CONNECT_DEADLINE, RPC_DEADLINE, TLS_DEADLINE};
use skep_common::spec::NodeRole;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use super::Tls;
use super::server::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};
use super::tls::{check_unexpired, root_store, subject_of};
use crate::clock;
use crate::identity::{Error, NODE_SERVER_NAME, node_server_name};

/// A join crosses whatever network there is: it may take longer than a call between members.
const JOIN_CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// An open channel is probed this often, so that calls to a machine that vanished fail soon.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEP_ALIVE_DEADLINE: Duration = Duration::from_secs(2);

/// Clients' connections outlive a stall of their node that calls between nodes need not.
const RELAYED_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const RELAYED_KEEP_ALIVE_DEADLINE: Duration = Duration::from_secs(4);

/// Whom a channel must reach: the certificate at the other end has to be of that role or node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// Any manager of this swarm.
    Manager,
    /// Any node of this swarm.
    AnyNode,
    /// That very node.
    Node(NodeId),
}

impl Peer {
    fn server_name(self) -> ServerName<'static> {
        let name = match self {
            Self::Manager => NodeRole::Manager.organizational_unit().to_owned(),
            Self::AnyNode => NODE_SERVER_NAME.to_owned(),
            Self::Node(node_id) => node_server_name(node_id),
        };
        ServerName::try_from(name).expect("roles and ids are valid names")
    }
}

/// One lazily connected channel for each address and peer; clones share them.
#[derive(Debug, Clone)]
pub struct ChannelPool {
    tls: Tls,
    /// Whether calls carry connections of clients.
    is_relaying: bool,
    channels: Arc<Mutex<BTreeMap<(String, Peer), Channel>>>,
}

impl ChannelPool {
    /// An empty pool that shows this node's certificate.
    pub fn new(tls: Tls) -> Self {
        Self { tls, is_relaying: false, channels: Arc::default() }
    }

    /// A pool with the same certificate and channels of its own: those of one tokio runtime must not be
    /// used by another, which may outlive it.
    pub fn separate(&self) -> Self {
        Self::new(self.tls.clone())
    }

    /// A pool with the same certificate, whose calls each carry a connection of a client: as many at once as there
    /// are, of which none waits for another one's reader.
    pub fn for_connections(&self) -> Self {
        Self { is_relaying: true, ..Self::new(self.tls.clone()) }
    }

    /// A channel to `address` (`ip:port`). It connects when first used and again whenever it was lost;
    /// a dead machine costs a call [`CONNECT_DEADLINE`].
    pub fn channel(&self, address: &str, peer: Peer) -> Channel {
        let mut channels = self.channels.lock().expect("nothing panics while it holds the pool");
        let key = (address.to_owned(), peer);
        channels.entry(key).or_insert_with(|| self.fresh(address, peer)).clone()
    }

    /// A channel that nobody else uses: its traffic never waits behind another's.
    pub fn fresh(&self, address: &str, peer: Peer) -> Channel {
        let endpoint = match self.is_relaying {
            false => endpoint()
                .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_DEADLINE),
            true => endpoint()
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .http2_keep_alive_interval(RELAYED_KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(RELAYED_KEEP_ALIVE_DEADLINE),
        };
        let endpoint = endpoint.keep_alive_while_idle(true);
        #[cfg(feature = "simulation")]
        if let Some(machine) = crate::simulation::machine() {
            return crate::simulation::channel(&endpoint, machine, address);
        }
        // Asked at each connect: certificates and roots change while the channel lives.
        let tls = self.tls.clone();
        let config = move || tls.client();
        connect_lazily(&endpoint, address, config, peer.server_name(), CONNECT_DEADLINE)
    }

    /// Forgets the channels to an address: the next call dials anew.
    pub fn forget(&self, address: &str) {
        let mut channels = self.channels.lock().expect("nothing panics while it holds the pool");
        channels.retain(|(known, _), _| known != address);
    }
}

/// Opens a connection to a machine and closes it again: its kernel answers for it, whether its daemon does or not.
pub async fn knock(address: &str) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(machine) = crate::simulation::machine() {
        return (machine.dial)(address).await.map(drop);
    }
    TcpStream::connect(address).await.map(drop)
}

/// A channel for a node without a certificate that knows the root: to hand in its join token.
pub fn connect_with_root(address: &str, root_pem: &str) -> Result<Channel, Error> {
    let config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])?
            .with_root_certificates(root_store(root_pem)?)
            .with_no_client_auth();
    Ok(joining_channel(address, config))
}

/// A channel that trusts whoever answers: only to fetch the root certificate, which is then compared
/// with the digest in the join token.
pub fn connect_unverified(address: &str) -> Result<Channel, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAnyone(provider)))
        .with_no_client_auth();
    Ok(joining_channel(address, config))
}

fn joining_channel(address: &str, mut config: ClientConfig) -> Channel {
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = Peer::Manager.server_name();
    let endpoint = endpoint().timeout(RPC_DEADLINE);
    let config = Arc::new(config);
    let config = move || Arc::clone(&config);
    connect_lazily(&endpoint, address, config, name, JOIN_CONNECT_DEADLINE)
}

fn endpoint() -> Endpoint {
    // The URI only fills the `:authority`; the connector knows the address.
    Endpoint::from_static("http://skep")
        .tcp_nodelay(true)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
}

fn connect_lazily(
    endpoint: &Endpoint,
    address: &str,
    config: impl Fn() -> Arc<ClientConfig> + Send + Sync + 'static,
    name: ServerName<'static>,
    deadline: Duration,
) -> Channel {
    let address = address.to_owned();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let (address, config, name) = (address.clone(), config(), name.clone());
        async move {
            let late = |what: &str, deadline: Duration| {
                let within = deadline.as_millis();
                let message = format!("no {what} {address} within {within} ms");
                io::Error::new(io::ErrorKind::TimedOut, message)
            };
            let connect = TcpStream::connect(&address);
            let stream = tokio::time::timeout(deadline, connect).await;
            let stream = stream.map_err(|_| late("connection to", deadline))??;
            stream.set_nodelay(true)?;
            let handshake = TlsConnector::from(config).connect(name, stream);
            let stream = tokio::time::timeout(deadline.max(TLS_DEADLINE), handshake).await;
            let stream =
                stream.map_err(|_| late("handshake with", deadline.max(TLS_DEADLINE)))??;
            let session = stream.get_ref().1;
            // Resuming one does not look at the peer's certificate again, which was looked at when it began.
            if session.handshake_kind() == Some(HandshakeKind::Resumed)
                && let Some(peer) = subject_of(session.peer_certificates())?
            {
                check_unexpired(&peer, clock::now())?;
            }
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    }))
}

/// Accepts any certificate, and still checks that the peer has its key.
#[derive(Debug)]
struct TrustAnyone(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for TrustAnyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
