//! TLS settings that follow this node's certificate.

use std::sync::{Arc, RwLock};

use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme, version};

use crate::identity::{Credentials, Error, Subject};

/// This node's credentials and the TLS settings made of them; clones share them.
#[derive(Debug, Clone)]
pub struct Tls {
    current: Arc<Current>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// What changes when the certificate is renewed.
#[derive(Debug)]
struct Current {
    held: RwLock<(Arc<CertifiedKey>, Credentials, Subject)>,
}

impl Tls {
    /// TLS 1.3 alone, with the swarm's root as the only trust.
    pub fn new(credentials: Credentials) -> Result<Self, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(root_store(&credentials.root_pem)?);
        let current = Arc::new(Current { held: RwLock::new(certified(credentials)?) });
        // A peer without a certificate may join; one with a wrong certificate gets no connection.
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .allow_unauthenticated()
                .build()
                .map_err(|e| Error::invalid("root certificate", e))?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        server.alpn_protocols = vec![b"h2".to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesClientCert>);
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { current, server: Arc::new(server), client: Arc::new(client) })
    }

    /// Uses other credentials of the same swarm from the next connection on.
    pub fn replace(&self, credentials: Credentials) -> Result<(), Error> {
        *self.current.held.write().expect(NOT_POISONED) = certified(credentials)?;
        Ok(())
    }

    /// Who this node is.
    pub fn subject(&self) -> Subject {
        self.current.held.read().expect(NOT_POISONED).2.clone()
    }

    /// The credentials in use.
    pub fn credentials(&self) -> Credentials {
        self.current.held.read().expect(NOT_POISONED).1.clone()
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }
}

const NOT_POISONED: &str = "nothing panics while it holds the credentials";

impl Current {
    fn key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.held.read().expect(NOT_POISONED).0)
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

pub(super) fn root_store(root_pem: &str) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(root_pem.as_bytes());
    roots.add(root.map_err(|e| Error::invalid("root certificate", e))?)?;
    Ok(roots)
}

fn certified(credentials: Credentials) -> Result<(Arc<CertifiedKey>, Credentials, Subject), Error> {
    let certificate = CertificateDer::from_pem_slice(credentials.certificate_pem.as_bytes())
        .map_err(|e| Error::invalid("certificate", e))?;
    let key = PrivateKeyDer::from_pem_slice(credentials.key_pem.as_bytes())
        .map_err(|e| Error::invalid("key", e))?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
    let subject = credentials.subject()?;
    Ok((Arc::new(CertifiedKey::new(vec![certificate], key)), credentials, subject))
}
