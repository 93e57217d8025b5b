//! TLS settings that follow this node's certificate and the roots that it trusts.
//!
//! Connections that are open go on with what they began with; each new one takes what is current.
//!
//! A node's next connection to the peer that it connected to last, by the same name, resumes that session, as the one of
//! an agent's heartbeats does, and signs and verifies nothing. Both ends look at the other's certificate all the same:
//! whose it is, and whether it has expired. Sessions are resumed among connections with the same settings alone: other
//! credentials or roots, at either end, begin with a whole handshake. The ticket carries the peer's certificate, sealed
//! by whom it is for, so that callers of resumed connections are checked as all others are.

use std::io;
use std::sync::{Arc, RwLock};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};
use skep_common::Timestamp;
use tokio::sync::watch;

use crate::identity::{Credentials, Error, Subject, certificates};

/// Tickets that a peer gets with each connection. It takes one for the next connection, which brings another one.
const TICKETS: usize = 1;

/// This node's credentials and the TLS settings made of them; clones share them.
#[derive(Debug, Clone)]
pub struct Tls {
    current: Arc<RwLock<Held>>,
    changes: Arc<watch::Sender<()>>,
}

/// What changes when the certificate is renewed, or other roots are trusted.
#[derive(Debug)]
struct Held {
    credentials: Credentials,
    subject: Subject,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// TLS 1.3 alone, with the swarm's roots as the only trust.
    pub fn new(credentials: Credentials) -> Result<Self, Error> {
        let (changes, _) = watch::channel(());
        let current = Arc::new(RwLock::new(held(credentials)?));
        Ok(Self { current, changes: Arc::new(changes) })
    }

    /// Uses other credentials of the same swarm from the next connection on.
    pub fn replace(&self, credentials: Credentials) -> Result<(), Error> {
        let made = held(credentials)?;
        *self.current.write().expect(NOT_POISONED) = made;
        self.changes.send_replace(());
        Ok(())
    }

    /// Wakes when other credentials are in use.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Who this node is.
    pub fn subject(&self) -> Subject {
        self.current.read().expect(NOT_POISONED).subject.clone()
    }

    /// The credentials in use.
    pub fn credentials(&self) -> Credentials {
        self.current.read().expect(NOT_POISONED).credentials.clone()
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().expect(NOT_POISONED).server)
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.current.read().expect(NOT_POISONED).client)
    }
}

const NOT_POISONED: &str = "nothing panics while it holds the credentials";

fn held(credentials: Credentials) -> Result<Held, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(root_store(&credentials.root_pem)?);
    let key = PrivateKeyDer::from_pem_slice(credentials.key_pem.as_bytes())
        .map_err(|e| Error::invalid("key", e))?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
    let chain = certificates(&credentials.certificate_pem)?;
    let own = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
    let subject = credentials.subject()?;
    // A peer without a certificate may join; one with a wrong certificate gets no connection.
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|e| Error::invalid("root certificate", e))?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::clone(&own) as Arc<_>);
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.ticketer = rustls::crypto::ring::Ticketer::new()?;
    server.send_tls13_tickets = TICKETS;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_root_certificates(roots)
        .with_client_cert_resolver(own);
    client.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Held { credentials, subject, server: Arc::new(server), client: Arc::new(client) })
}

/// Whose certificate a peer has shown; none where it has shown none.
pub(super) fn subject_of(shown: Option<&[CertificateDer<'_>]>) -> io::Result<Option<Subject>> {
    let certificate = shown.and_then(|chain| chain.first());
    certificate.map(|der| Subject::of_der(der)).transpose().map_err(io::Error::other)
}

/// Refuses a certificate that has ended. Of a resumed session nobody else looks.
pub(super) fn check_unexpired(subject: &Subject, now: Timestamp) -> io::Result<()> {
    match subject.not_after < now {
        true => Err(io::Error::other("the certificate has expired")),
        false => Ok(()),
    }
}

pub(super) fn root_store(roots_pem: &str) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for root in certificates(roots_pem)? {
        roots.add(root)?;
    }
    Ok(roots)
}
