//! The leader's word that a node may fetch an image, signed with the authority's key.
//!
//! A holder checks it by the roots that it trusts alone, without asking a manager.

use prost::Message as _;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, UnparsedPublicKey,
};
use rustls::pki_types::CertificateDer;
use skep_common::{NodeId, Timestamp};
use skep_proto::{ImageGrant, SignedImageGrant};
use std::time::Duration;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Error;

/// How long a grant is good. A node whose fetch is tried again for longer gets a new one with its next
/// session; one that lost its assignment keeps the right until then.
const GRANT_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Why a grant is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// Not bytes of a grant.
    #[error("the grant cannot be read")]
    Unreadable,
    /// Not signed by this swarm's authority.
    #[error("the grant is not signed by this swarm's authority")]
    Signature,
    /// Given to another node.
    #[error("the grant was given to node {0}")]
    OtherNode(String),
    /// Too old; the agent gets a new one with its next assignments.
    #[error("the grant has expired")]
    Expired,
}

/// Signs that `node_id` may fetch the image with this manifest digest.
pub fn sign_grant(
    ca_key_pem: &str,
    digest: &str,
    node_id: NodeId,
    now: Timestamp,
) -> Result<Vec<u8>, Error> {
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::pki_types::pem::PemObject as _;
    let invalid = |why: String| Error::invalid("authority's key", why);
    let key = PrivatePkcs8KeyDer::from_pem_slice(ca_key_pem.as_bytes())
        .map_err(|e| invalid(e.to_string()))?;
    let rng = ring::rand::SystemRandom::new();
    let pair =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.secret_pkcs8_der(), &rng)
            .map_err(|e| invalid(e.to_string()))?;
    let not_after = now.after(GRANT_LIFE).0 / 1_000_000_000;
    let grant = ImageGrant { digest: digest.to_owned(), node_id: node_id.to_string(), not_after };
    let grant = grant.encode_to_vec();
    let signature = pair.sign(&rng, &grant).map_err(|e| invalid(e.to_string()))?;
    let signed =
        SignedImageGrant { grant: grant.into(), signature: signature.as_ref().to_vec().into() };
    Ok(signed.encode_to_vec())
}

/// Checks a grant that `caller` shows, and returns the manifest digest it is for.
pub fn verify_grant(
    roots_pem: &str,
    bytes: &[u8],
    caller: NodeId,
    now: Timestamp,
) -> Result<String, GrantError> {
    let signed = SignedImageGrant::decode(bytes).map_err(|_| GrantError::Unreadable)?;
    let roots = super::certificates(roots_pem).map_err(|_| GrantError::Signature)?;
    let is_signed_by = |der: &CertificateDer<'_>| {
        X509Certificate::from_der(der).is_ok_and(|(_, root)| {
            let public_key = root.public_key().subject_public_key.data.as_ref();
            let public_key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public_key);
            public_key.verify(&signed.grant, &signed.signature).is_ok()
        })
    };
    if !roots.iter().any(is_signed_by) {
        return Err(GrantError::Signature);
    }
    let grant = ImageGrant::decode(signed.grant).map_err(|_| GrantError::Unreadable)?;
    if grant.node_id != caller.to_string() {
        return Err(GrantError::OtherNode(grant.node_id));
    }
    if grant.not_after < now.0 / 1_000_000_000 {
        return Err(GrantError::Expired);
    }
    Ok(grant.digest)
}

#[cfg(test)]
mod tests {
    use super::super::Authority;
    use super::*;

    #[test]
    fn a_grant_is_for_one_node_one_swarm_and_a_day() {
        let now = Timestamp::from_secs(1_800_000_000);
        let (ours, other) = (Authority::generate(now).unwrap(), Authority::generate(now).unwrap());
        let signed = sign_grant(ours.key_pem(), "sha256:aa", NodeId(7), now).unwrap();
        let verify = |root: &Authority, node, at| verify_grant(root.root_pem(), &signed, node, at);
        assert_eq!(verify(&ours, NodeId(7), now), Ok("sha256:aa".to_owned()));
        assert_eq!(verify(&other, NodeId(7), now), Err(GrantError::Signature));
        let both = format!("{}{}", other.root_pem(), ours.root_pem());
        assert!(verify_grant(&both, &signed, NodeId(7), now).is_ok(), "any root will do");
        assert!(matches!(verify(&ours, NodeId(8), now), Err(GrantError::OtherNode(_))));
        let late = now.after(GRANT_LIFE + Duration::from_secs(1));
        assert_eq!(verify(&ours, NodeId(7), late), Err(GrantError::Expired));
        assert_eq!(
            verify_grant(ours.root_pem(), b"x", NodeId(7), now),
            Err(GrantError::Unreadable)
        );
    }
}
