//! `NetworkSpec`, and how services ask to be on a network.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Extra, Labels};
use crate::NetworkId;

/// What users want of a network: the fields of Docker's network documents.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkSpec {
    /// Unique name.
    pub name: String,
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// Whether it is the routing mesh's network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<bool>,
    /// `overlay`; absent is `overlay` as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// No way out: tasks that are on such networks only have no uplink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internal: Option<bool>,
    /// Whether single containers may join it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attachable: Option<bool>,
    /// Whether its endpoints have an IPv6 address beside the IPv4 one.
    #[serde(rename = "EnableIPv6", skip_serializing_if = "Option::is_none")]
    pub enable_ipv6: Option<bool>,
    /// Its subnets; absent ones are chosen from the swarm's pool.
    #[serde(rename = "IPAM", skip_serializing_if = "Option::is_none")]
    pub ipam: Option<Ipam>,
    /// Options of the driver: [`MTU_OPTION`], [`ENCRYPTED_OPTION`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<BTreeMap<String, String>>,
    /// Kept whole: Scope, ConfigFrom, ConfigOnly, ….
    #[serde(flatten)]
    pub extra: Extra,
}

/// The option that sets the MTU of a network's interfaces, in bytes.
pub const MTU_OPTION: &str = "com.docker.network.driver.mtu";
/// The option, with any value, that has a network's traffic encrypted between nodes.
pub const ENCRYPTED_OPTION: &str = "encrypted";

/// How a network's addresses are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Ipam {
    /// `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Subnets: at most one IPv4 and one IPv6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<Vec<IpamConfig>>,
    /// Kept whole: Options.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One subnet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct IpamConfig {
    /// CIDR; absent is one of the swarm's pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// CIDR inside of the subnet: only its addresses are granted.
    #[serde(rename = "IPRange", skip_serializing_if = "Option::is_none")]
    pub ip_range: Option<String>,
    /// Address of the gateway, which no endpoint gets; absent is the first of the subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Addresses that no endpoint gets, by a name for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auxiliary_addresses: Option<BTreeMap<String, String>>,
}

/// A network that a service's tasks are on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkAttachmentConfig {
    /// Id or name; stored as the id.
    pub target: String,
    /// More names of the service on this network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aliases: Option<Vec<String>>,
    /// Kept and not acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_opts: Option<BTreeMap<String, String>>,
}

/// A network that is on every node without being made: what a container has of its node's own network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Predefined {
    /// An uplink, which every container has that is on no other network.
    Bridge,
    /// The node's own interfaces.
    Host,
    /// Nothing but a loopback.
    None,
}

impl Predefined {
    /// All of them, by name.
    pub const ALL: [Self; 3] = [Self::Bridge, Self::Host, Self::None];

    /// Its name, by which attachments name it as well.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Host => "host",
            Self::None => "none",
        }
    }

    /// Its driver, in Docker's words.
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Host => "host",
            Self::None => "null",
        }
    }

    /// Its id, the same in every swarm.
    pub fn id(self) -> NetworkId {
        let mut bytes = [0; 16];
        bytes[..self.name().len()].copy_from_slice(self.name().as_bytes());
        NetworkId(u128::from_be_bytes(bytes))
    }

    /// The one with this name or id.
    pub fn find(target: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == target || one.id().to_string() == target)
    }
}

/// Those of the predefined networks that attachments name.
pub fn predefined(configs: &[NetworkAttachmentConfig]) -> impl Iterator<Item = Predefined> {
    configs.iter().filter_map(|config| Predefined::find(&config.target))
}

/// Whether a container with these attachments has no way out of its own: its node's interfaces are its
/// own, or it has none.
pub fn is_without_uplink(configs: &[NetworkAttachmentConfig]) -> bool {
    predefined(configs).any(|one| matches!(one, Predefined::Host | Predefined::None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predefined_networks_are_found_by_name_and_by_id() {
        for one in Predefined::ALL {
            assert_eq!(Predefined::find(one.name()), Some(one));
            assert_eq!(Predefined::find(&one.id().to_string()), Some(one));
            assert!(one.name().parse::<NetworkId>().is_err(), "a name is no id");
        }
        assert_eq!(Predefined::find("ingress"), None);
        let shorts = Predefined::ALL.map(|one| one.id().to_string()[..12].to_owned());
        assert!(shorts[0] != shorts[1] && shorts[1] != shorts[2], "lists can tell them apart");
    }
}
