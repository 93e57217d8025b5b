//! The certificate authority of a swarm, and requests to it.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType, SubjectPublicKeyInfo,
};
use skep_common::spec::NodeRole;
use skep_common::{ClusterId, NodeId, Timestamp};
use std::time::Duration;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Error, NODE_SERVER_NAME};

/// Life of the root. SwarmKit's `RootCAExpiration`, 20 years.
const ROOT_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Certificates begin this much earlier, for peers whose clocks are behind. SwarmKit's value.
const BACKDATE: Duration = Duration::from_secs(3600);

/// The root certificate and its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
    key_pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority(…)")
    }
}

impl Authority {
    /// Makes a new root.
    pub fn generate(now: Timestamp) -> Result<Self, Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "swarm-ca");
        // One more, for a certificate of the root that takes this one's place.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = moment(now)? - BACKDATE;
        params.not_after = moment(now.after(ROOT_LIFE))?;
        let root_pem = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self { issuer: Issuer::new(params, key), root_pem, key_pem })
    }

    /// Takes up a root from the store.
    pub fn from_pem(root_pem: &str, key_pem: &str) -> Result<Self, Error> {
        let key = KeyPair::from_pem(key_pem)?;
        let issuer = Issuer::from_ca_cert_pem(root_pem, key)?;
        Ok(Self { issuer, root_pem: root_pem.to_owned(), key_pem: key_pem.to_owned() })
    }

    /// Takes up a root that a user brings: it must be able to sign for a swarm.
    pub fn from_user(root_pem: &str, key_pem: &str, now: Timestamp) -> Result<Self, Error> {
        let invalid = |why: &str| Error::invalid("root certificate", why);
        let der = super::pem_to_der("root certificate", root_pem)?;
        let (_, root) = X509Certificate::from_der(&der)
            .map_err(|error| Error::invalid("root certificate", error))?;
        if !root.is_ca() {
            return Err(invalid("it is no certificate of an authority"));
        }
        let validity = root.validity();
        let seconds = now.0 / 1_000_000_000;
        if seconds < validity.not_before.timestamp() || seconds > validity.not_after.timestamp() {
            return Err(invalid("it is not valid now"));
        }
        let key = KeyPair::from_pem(key_pem)?;
        if !key.is_compatible(&PKCS_ECDSA_P256_SHA256) {
            return Err(invalid("its key must be an ECDSA key of P-256, in PKCS 8"));
        }
        if key.subject_public_key_info() != root.public_key().raw {
            return Err(invalid("the key is of another certificate"));
        }
        Self::from_pem(root_pem, key_pem)
    }

    /// Certifies that this root's swarm may trust another root: a certificate of that one's key.
    pub fn certify(&self, other_root_pem: &str) -> Result<String, Error> {
        let der = super::pem_to_der("root certificate", other_root_pem)?;
        let (_, other) = X509Certificate::from_der(&der)
            .map_err(|error| Error::invalid("root certificate", error))?;
        let key = SubjectPublicKeyInfo::from_der(other.public_key().raw)?;
        let moment = |time: i64| {
            OffsetDateTime::from_unix_timestamp(time).map_err(|e| Error::invalid("time", e))
        };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "swarm-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = moment(other.validity().not_before.timestamp())?;
        params.not_after = moment(other.validity().not_after.timestamp())?;
        Ok(params.signed_by(&key, &self.issuer)?.pem())
    }

    /// The root certificate.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// The root's private key.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Signs a request. Of the request only the public key counts: subject, names and validity are the
    /// authority's.
    pub fn sign(
        &self,
        csr_pem: &str,
        node_id: NodeId,
        role: NodeRole,
        cluster_id: ClusterId,
        now: Timestamp,
        life: Duration,
    ) -> Result<String, Error> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem)?;
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, node_id.to_string());
        name.push(DnType::OrganizationalUnitName, role.organizational_unit());
        name.push(DnType::OrganizationName, cluster_id.to_string());
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        params.is_ca = IsCa::NoCa;
        params.subject_alt_names = vec![
            SanType::DnsName(role.organizational_unit().try_into()?),
            SanType::DnsName(NODE_SERVER_NAME.try_into()?),
            SanType::DnsName(super::node_server_name(node_id).try_into()?),
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = moment(now)? - BACKDATE;
        params.not_after = moment(now.after(life))?;
        request.params = params;
        Ok(request.signed_by(&self.issuer)?.pem())
    }
}

/// A key pair and the request for its certificate.
pub struct Csr {
    /// The request, for the authority.
    pub csr_pem: String,
    /// The private key; it never leaves this node.
    pub key_pem: String,
}

impl std::fmt::Debug for Csr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Csr(…)")
    }
}

impl Csr {
    /// Makes a new P-256 key and a request for it.
    pub fn generate() -> Result<Self, Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let request = CertificateParams::default().serialize_request(&key)?;
        Ok(Self { csr_pem: request.pem()?, key_pem: key.serialize_pem() })
    }
}

fn moment(timestamp: Timestamp) -> Result<OffsetDateTime, Error> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(timestamp.0))
        .map_err(|e| Error::invalid("time", e))
}
