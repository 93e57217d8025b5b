//! The public half of encrypted networks: which keys a node has, and where it listens for each.
//!
//! A node has one key pair, and two while it changes to a new one: each is in a *slot*, and has an
//! interface, a UDP port and an address within the tunnels of its own. Of the two slots one is current:
//! others send there.
//!
//! # Sources
//!
//! WireGuard whitepaper, section 2 (a peer is its public key); `wg(8)` (keys are written in Base64).

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How many slots a node has.
pub const SLOTS: u8 = 2;

/// The UDP port of slot 0; each further slot has the next one.
pub const PORT: u16 = 4790;

/// The port of slot `slot`.
pub fn port(slot: u8) -> u16 {
    PORT + u16::from(slot)
}

/// The address of a node within the tunnels of one of its slots.
///
/// Of 198.18.0.0/15, which is reserved for measurements (RFC 2544) and leads nowhere on the internet; the
/// addresses are never seen outside of tunnels.
pub fn tunnel_address(number: u16, slot: u8) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(198, 18 + slot % SLOTS, high, low)
}

/// A public key: Curve25519, written in Base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

/// A text that is no public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a public key: 32 bytes in Base64")]
pub struct NotAKey(String);

impl FromStr for PublicKey {
    type Err = NotAKey;

    fn from_str(text: &str) -> Result<Self, NotAKey> {
        let bytes = STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| NotAKey(text.to_owned()))
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One key of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WireguardKey {
    /// Its slot: below [`SLOTS`].
    pub slot: u8,
    /// The key.
    pub public_key: PublicKey,
    /// The UDP port on which the node listens for it.
    pub port: u16,
}

/// The keys of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct WireguardKeys {
    /// The slot that others send to.
    pub current: u8,
    /// One key, or two while the node changes from one to the other.
    pub keys: Vec<WireguardKey>,
}

impl WireguardKeys {
    /// The address within tunnels that others send to; `None` for a node without a key.
    pub fn current_address(&self, number: u16) -> Option<Ipv4Addr> {
        let is_there = self.keys.iter().any(|key| key.slot == self.current);
        is_there.then(|| tunnel_address(number, self.current))
    }
}

/// What a node says of its part in encrypted networks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct WireguardDescription {
    /// What carries the tunnels: `kernel` or `user space (boringtun)`; or why the node has none.
    pub implementation: String,
    /// Its public keys; none where it can have no tunnels.
    #[serde(flatten)]
    pub public: WireguardKeys,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_written_as_wireguard_writes_them() {
        let key = PublicKey([0xff; 32]);
        let text = "//////////////////////////////////////////8=";
        assert_eq!(key.to_string(), text);
        assert_eq!(text.parse(), Ok(key));
        assert!("AAAA".parse::<PublicKey>().is_err());
        let keys = WireguardKeys {
            current: 1,
            keys: vec![WireguardKey { slot: 1, public_key: key, port: port(1) }],
        };
        let description = WireguardDescription { implementation: "kernel".into(), public: keys };
        let json = serde_json::to_value(&description).unwrap();
        let expect = serde_json::json!({"Implementation": "kernel", "Current": 1,
            "Keys": [{"Slot": 1, "PublicKey": text, "Port": 4791}]});
        assert_eq!(json, expect);
        assert_eq!(serde_json::from_value::<WireguardDescription>(json).unwrap(), description);
    }

    #[test]
    fn each_slot_of_each_node_has_an_address_of_its_own() {
        let addresses: std::collections::BTreeSet<Ipv4Addr> =
            (1..=4094).flat_map(|n| (0..SLOTS).map(move |slot| tunnel_address(n, slot))).collect();
        assert_eq!(addresses.len(), 2 * 4094);
        assert_eq!(tunnel_address(258, 1), Ipv4Addr::new(198, 19, 1, 2));
        let none = WireguardKeys::default();
        assert_eq!(none.current_address(3), None);
    }
}
