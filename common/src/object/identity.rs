//! Whom nodes trust: what they say of it, and a change of the root on its way.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// The certificates that a node has, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TlsInfo {
    /// The roots that it trusts, PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub trust_root: String,
    /// Subject of its certificate's issuer, base64 of DER.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cert_issuer_subject: String,
    /// Public key of its certificate's issuer, base64 of DER.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cert_issuer_public_key: String,
}

/// A change of the root that has begun and not ended.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RootRotation {
    /// Certificate of the new root, PEM.
    pub ca_cert: String,
    /// Private key of the new root, PEM. Never leaves the managers.
    pub ca_key: String,
    /// The new root's key certified by the old root, PEM.
    pub cross_signed_cert: String,
    /// When it began, by the proposer's clock.
    pub started_at: Timestamp,
    /// Public key of the new root, base64 of DER: what nodes say of their certificates' issuer.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub public_key: String,
    /// Since when every node trusts the new root, so that it signs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted_at: Option<Timestamp>,
}

impl fmt::Debug for RootRotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootRotation").field("started_at", &self.started_at).finish_non_exhaustive()
    }
}
