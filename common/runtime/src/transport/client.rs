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

/// How a channel connects, and how it is probed while it is open, so that calls to a machine that vanished fail soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How long a connect may take.
    pub connect: Duration,
    /// How long the TLS handshake that follows may take.
    pub handshake: Duration,
    /// Between what was heard last and a probe.
    pub probe_interval: Duration,
    /// How long the answer to a probe may take.
    pub probe_deadline: Duration,
    /// Whether the channel is probed also while no call is open.
    pub probes_idle: bool,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: CONNECT_DEADLINE,
            handshake: TLS_DEADLINE,
            probe_interval: Duration::from_secs(1),
            probe_deadline: Duration::from_secs(2),
            probes_idle: true,
        }
    }
}

impl Patience {
    /// Clients' connections outlive a stall of their node that calls between nodes need not.
    fn relaying() -> Self {
        let (probe_interval, probe_deadline) = (Duration::from_secs(2), Duration::from_secs(4));
        Self { probe_interval, probe_deadline, ..Self::default() }
    }
}

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
        let patience = if self.is_relaying { Patience::relaying() } else { Patience::default() };
        self.fresh_with(address, peer, patience)
    }

    /// The same with another patience.
    pub fn fresh_with(&self, address: &str, peer: Peer, patience: Patience) -> Channel {
        let endpoint = match self.is_relaying {
            false => endpoint(),
            true => endpoint()
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES),
        };
        let endpoint = endpoint
            .http2_keep_alive_interval(patience.probe_interval)
            .keep_alive_timeout(patience.probe_deadline)
            .keep_alive_while_idle(patience.probes_idle);
        #[cfg(feature = "simulation")]
        if let Some(machine) = crate::simulation::machine() {
            return crate::simulation::channel(&endpoint, machine, address);
        }
        // Asked at each connect: certificates and roots change while the channel lives.
        let tls = self.tls.clone();
        let config = move || tls.client();
        connect_lazily(&endpoint, address, config, peer.server_name(), patience)
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
    let patience = Patience {
        connect: JOIN_CONNECT_DEADLINE,
        handshake: JOIN_CONNECT_DEADLINE,
        ..Patience::default()
    };
    connect_lazily(&endpoint, address, config, name, patience)
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
    Patience { connect, handshake, .. }: Patience,
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
            let stream = tokio::time::timeout(connect, TcpStream::connect(&address)).await;
            let stream = stream.map_err(|_| late("connection to", connect))??;
            stream.set_nodelay(true)?;
            let greeting = TlsConnector::from(config).connect(name, stream);
            let stream = tokio::time::timeout(handshake, greeting).await;
            let stream = stream.map_err(|_| late("handshake with", handshake))??;
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
