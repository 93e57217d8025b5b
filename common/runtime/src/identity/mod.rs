//! Who a node is: certificates, join tokens, and the swarm's certificate authority.
//!
//! Managers are the authority: an ECDSA P-256 root of 20 years, node certificates of 90 days. A
//! certificate's CN is the node id, its OU the role, its O the cluster id. Source: SwarmKit `ca/`.

mod authority;
mod bundle;
mod files;
mod grant;
mod token;
mod unlock;

pub use authority::{Authority, Csr};
pub(crate) use bundle::certificates;
pub use bundle::{is_trusted_by, public_key_of, tls_info, vetted};
pub use files::{Files, Lock, RaftKey, Stored};
pub use grant::{GrantError, sign_grant, verify_grant};
pub use token::{JoinToken, TokenError, new_secret, root_digest};
pub use unlock::{UnlockKey, UnlockKeyError};

use skep_common::spec::NodeRole;
use skep_common::{ClusterId, NodeId, Timestamp};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Every node's certificate answers to this name, whatever its role.
pub const NODE_SERVER_NAME: &str = "swarm-node";

/// The name that one node's certificate alone answers to. An id of digits only would be no valid name.
pub fn node_server_name(node_id: NodeId) -> String {
    format!("node-{node_id}")
}

/// What went wrong with a certificate or key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the identity cannot be read or written.
    #[error("failed to {verb} {path}")]
    File {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A certificate, key or request is not what it should be.
    #[error("{what} is not valid: {why}")]
    Invalid {
        /// `certificate`, `key`, ….
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The library refused to make a certificate.
    #[error("failed to make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// TLS settings cannot be made of the certificates.
    #[error("failed to set up TLS")]
    Tls(#[from] rustls::Error),
}

impl Error {
    pub(crate) fn invalid(what: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Invalid { what, why: why.to_string() }
    }
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Credentials {
    /// The node's certificate.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
    /// The root that signed it.
    pub root_pem: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("certificate", &self.subject()).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Who the certificate says that this node is.
    pub fn subject(&self) -> Result<Subject, Error> {
        Subject::of_der(&pem_to_der("certificate", &self.certificate_pem)?)
    }
}

/// What a certificate says of its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// CN.
    pub node_id: NodeId,
    /// OU.
    pub role: NodeRole,
    /// O.
    pub cluster_id: ClusterId,
    /// Begin of its validity.
    pub not_before: Timestamp,
    /// End of its validity.
    pub not_after: Timestamp,
}

impl Subject {
    /// Reads a certificate.
    pub fn of_der(der: &[u8]) -> Result<Self, Error> {
        let invalid = |why: String| Error::Invalid { what: "certificate", why };
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|e| invalid(e.to_string()))?;
        let subject = certificate.subject();
        let text = |found: Option<&x509_parser::x509::AttributeTypeAndValue<'_>>, name: &str| {
            let value = found.and_then(|attribute| attribute.as_str().ok());
            value
                .map(ToOwned::to_owned)
                .ok_or_else(|| invalid(format!("its subject has no {name}")))
        };
        let node = text(subject.iter_common_name().next(), "CN")?;
        let unit = text(subject.iter_organizational_unit().next(), "OU")?;
        let cluster = text(subject.iter_organization().next(), "O")?;
        let role = [NodeRole::Worker, NodeRole::Manager];
        let role = role.into_iter().find(|role| role.organizational_unit() == unit);
        let validity = certificate.validity();
        Ok(Self {
            node_id: node.parse().map_err(|_| invalid(format!("CN {node:?} is no node id")))?,
            role: role.ok_or_else(|| invalid(format!("OU {unit:?} is no role")))?,
            cluster_id: cluster
                .parse()
                .map_err(|_| invalid(format!("O {cluster:?} is no cluster id")))?,
            not_before: Timestamp::from_secs(validity.not_before.timestamp()),
            not_after: Timestamp::from_secs(validity.not_after.timestamp()),
        })
    }
}

pub(crate) fn pem_to_der(what: &'static str, pem: &str) -> Result<Vec<u8>, Error> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;
    let der =
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| Error::invalid(what, e))?;
    Ok(der.to_vec())
}
