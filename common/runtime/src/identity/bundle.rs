//! Roots that a swarm trusts: one, and two while one takes the other's place.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use skep_common::object::TlsInfo;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Credentials, Error};

/// The certificates of a text, in its order.
pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match read {
        Ok(found) if found.is_empty() => Err(Error::invalid("certificate", "it is no PEM block")),
        Ok(found) => Ok(found),
        Err(error) => Err(Error::invalid("certificate", error)),
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, Error> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|error| Error::invalid("certificate", error))?;
    Ok(certificate)
}

/// Whether the key of `root` signed `certificate`.
fn is_signed_by(certificate: &X509Certificate<'_>, root: &X509Certificate<'_>) -> bool {
    let key = root.public_key().subject_public_key.data.as_ref();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
        .verify(certificate.tbs_certificate.as_ref(), &certificate.signature_value.data)
        .is_ok()
}

/// The public key of a certificate as Docker's `TLSInfo` has it: base64 of DER.
pub fn public_key_of(certificate_pem: &str) -> Result<String, Error> {
    let der = super::pem_to_der("certificate", certificate_pem)?;
    Ok(STANDARD.encode(parse(&der)?.public_key().raw))
}

/// Whether one of these roots signed this node's certificate.
pub fn is_trusted_by(certificate_pem: &str, roots_pem: &str) -> Result<bool, Error> {
    let leaf = super::pem_to_der("certificate", certificate_pem)?;
    let leaf = parse(&leaf)?;
    let roots = certificates(roots_pem)?;
    let mut is_trusted = false;
    for root in &roots {
        is_trusted |= is_signed_by(&leaf, &parse(root)?);
    }
    Ok(is_trusted)
}

/// What a node says of its own certificates.
pub fn tls_info(credentials: &Credentials) -> Result<TlsInfo, Error> {
    let leaf = super::pem_to_der("certificate", &credentials.certificate_pem)?;
    let leaf = parse(&leaf)?;
    for root in certificates(&credentials.root_pem)? {
        let root = parse(&root)?;
        if is_signed_by(&leaf, &root) {
            return Ok(TlsInfo {
                trust_root: credentials.root_pem.clone(),
                cert_issuer_subject: STANDARD.encode(root.subject().as_raw()),
                cert_issuer_public_key: STANDARD.encode(root.public_key().raw),
            });
        }
    }
    Err(Error::invalid("certificate", "none of the roots that this node trusts signed it"))
}

/// The roots that a joiner may trust, of what a manager answered: the first one, which its token names, and
/// those whose key the first one certifies.
pub fn vetted(answer_pem: &str) -> Result<String, Error> {
    let answered = certificates(answer_pem)?;
    let parsed: Vec<X509Certificate<'_>> =
        answered.iter().map(|der| parse(der)).collect::<Result<_, _>>()?;
    let (first, others) = parsed.split_first().expect("a text without certificates is refused");
    let is_certified = |root: &X509Certificate<'_>| {
        let is_same_key = |cross: &&X509Certificate<'_>| cross.public_key() == root.public_key();
        others.iter().filter(is_same_key).any(|cross| is_signed_by(cross, first))
    };
    let mut roots = vec![to_pem(&answered[0])];
    for (der, certificate) in answered.iter().zip(&parsed).skip(1) {
        // A certificate that is its own issuer is a root; the others certify one.
        if is_signed_by(certificate, certificate) && is_certified(certificate) {
            roots.push(to_pem(der));
        }
    }
    Ok(roots.concat())
}

fn to_pem(der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in encoded.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use skep_common::spec::NodeRole;
    use skep_common::{ClusterId, NodeId, Timestamp};

    use super::super::{Authority, Csr};
    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

    fn credentials(authority: &Authority, root_pem: String) -> Credentials {
        let csr = Csr::generate().unwrap();
        let (node, cluster, life) = (NodeId(7), ClusterId(8), Duration::from_secs(3600));
        let role = NodeRole::Worker;
        Credentials {
            certificate_pem: authority.sign(&csr.csr_pem, node, role, cluster, NOW, life).unwrap(),
            key_pem: csr.key_pem,
            root_pem,
        }
    }

    #[test]
    fn a_joiner_trusts_a_second_root_only_where_the_first_one_certifies_it() {
        let [old, new, foreign] = [(); 3].map(|()| Authority::generate(NOW).unwrap());
        let roots = |answer: &[&str]| {
            let vetted = vetted(&answer.concat()).unwrap();
            certificates(&vetted).unwrap().len()
        };
        let (old_pem, new_pem) = (old.root_pem(), new.root_pem());
        let cross = old.certify(new_pem).unwrap();
        let forged = foreign.certify(new_pem).unwrap();
        assert_eq!(roots(&[old_pem]), 1);
        assert_eq!(roots(&[old_pem, new_pem, &cross]), 2);
        assert_eq!(roots(&[old_pem, new_pem]), 1, "nobody certifies it");
        assert_eq!(roots(&[old_pem, new_pem, &forged]), 1, "a stranger certifies it");
        assert_eq!(roots(&[old_pem, foreign.root_pem(), &cross]), 1, "another one is certified");
        assert!(vetted("nothing").is_err());
    }

    #[test]
    fn a_node_says_which_of_its_roots_signed_it() {
        let [old, new] = [(); 2].map(|()| Authority::generate(NOW).unwrap());
        let bundle = format!("{}{}", old.root_pem(), new.root_pem());
        for authority in [&old, &new] {
            let info = tls_info(&credentials(authority, bundle.clone())).unwrap();
            let key = public_key_of(authority.root_pem()).unwrap();
            assert_eq!((info.cert_issuer_public_key, &info.trust_root), (key, &bundle));
        }
        let stranger = credentials(&new, old.root_pem().to_owned());
        assert!(tls_info(&stranger).is_err());
        assert!(!is_trusted_by(&stranger.certificate_pem, old.root_pem()).unwrap());
        assert!(is_trusted_by(&stranger.certificate_pem, &bundle).unwrap());
    }

    #[test]
    fn a_root_that_cannot_sign_for_the_swarm_is_refused() {
        let [one, other] = [(); 2].map(|()| Authority::generate(NOW).unwrap());
        let check = |root: &str, key: &str| {
            Authority::from_user(root, key, NOW).map(drop).map_err(|error| error.to_string())
        };
        check(one.root_pem(), one.key_pem()).unwrap();
        let error = check(one.root_pem(), other.key_pem()).unwrap_err();
        assert!(error.contains("the key is of another certificate"), "{error}");
        let leaf = credentials(&one, String::new());
        let error = check(&leaf.certificate_pem, &leaf.key_pem).unwrap_err();
        assert!(error.contains("no certificate of an authority"), "{error}");
        let late = Timestamp::from_secs(1_800_000_000 + 21 * 365 * 24 * 3600);
        let error =
            Authority::from_user(one.root_pem(), one.key_pem(), late).map(drop).unwrap_err();
        assert!(error.to_string().contains("it is not valid now"), "{error}");
        assert!(check("x", "y").is_err());
    }
}
