//! The document of `network inspect`: the network in the shape of Docker's Engine, with who is where.
//!
//! Source: Docker Engine API v1.47, `Network`; moby `daemon/network.go`, `buildServiceAttachments`.
//! `State` and `Withheld` (why a task gets no connections; empty where it does) are skep's own.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Map, Value, json};
use skep_common::object::NetworkAttachment;
use skep_common::serving::withheld;
use skep_common::spec::PublishMode;
use skep_common::{Network, Node, NodeId, Service, ServiceId, Task};

use super::network::scope;
use crate::client::Client;

/// What a document is made of beside the network itself.
#[derive(Debug)]
pub(super) struct Facts {
    nodes: BTreeMap<NodeId, Node>,
    services: BTreeMap<ServiceId, Service>,
    tasks: Vec<Task>,
}

impl Facts {
    pub(super) async fn read(client: &Client) -> Result<Self> {
        let nodes: Vec<Node> = client.list_all("node").await?;
        let services: Vec<Service> = client.list_all("service").await?;
        let mut tasks: Vec<Task> = client.list_all("task").await?;
        tasks.retain(|task| !task.status.state.is_terminal());
        Ok(Self {
            nodes: nodes.into_iter().map(|node| (node.id, node)).collect(),
            services: services.into_iter().map(|service| (service.id, service)).collect(),
            tasks,
        })
    }

    /// The living tasks that are on a network; on the ingress network, those with an uplink.
    fn on<'a>(
        &'a self,
        network: &'a Network,
    ) -> impl Iterator<Item = (&'a Task, &'a NetworkAttachment)> {
        self.tasks.iter().filter_map(|task| {
            let mut attachments = task.networks_attachments.iter();
            let is_meant = |found: &&NetworkAttachment| match is_ingress(network) {
                true => found.ingress,
                false => found.network_id == Some(network.id),
            };
            Some((task, attachments.find(is_meant)?))
        })
    }

    /// Name and address of the node that has a task.
    fn host(&self, task: &Task) -> (String, String) {
        let node = task.node_id.and_then(|node_id| self.nodes.get(&node_id));
        node.map(|node| (node.hostname().to_owned(), node.status.addr.clone())).unwrap_or_default()
    }
}

fn is_ingress(network: &Network) -> bool {
    network.spec.ingress.unwrap_or_default()
}

/// `service.slot.task`, as the container is known on the network.
fn container_name(task: &Task) -> String {
    task.container_name()
}

fn cidr(attachment: &NetworkAttachment) -> String {
    format!("{}/{}", attachment.address, attachment.prefix)
}

/// A network as Docker's Engine shows it.
pub(super) fn document(network: &Network, facts: &Facts, is_verbose: bool) -> Value {
    let spec = &network.spec;
    let mut options: BTreeMap<String, String> = spec.options.clone().unwrap_or_default();
    if network.vni != 0 {
        let key = "com.docker.network.driver.overlay.vxlanid_list";
        options.insert(key.to_owned(), network.vni.to_string());
    }
    let subnets = network.subnets.iter().map(|subnet| {
        let mut config = json!({"Subnet": subnet.subnet, "Gateway": subnet.gateway});
        if let Some(range) = subnet.ip_range {
            config["IPRange"] = json!(range);
        }
        config
    });
    let mut document = json!({
        "Name": spec.name,
        "Id": network.id,
        "Created": network.meta.created_at,
        "Scope": scope(network),
        "Driver": spec.driver.as_deref().unwrap_or("overlay"),
        "EnableIPv6": spec.enable_ipv6.unwrap_or_default(),
        "IPAM": {"Driver": "default", "Options": null, "Config": subnets.collect::<Vec<_>>()},
        "Internal": spec.internal.unwrap_or_default(),
        "Attachable": spec.attachable.unwrap_or_default(),
        "Ingress": spec.ingress.unwrap_or_default(),
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": false,
        "Containers": containers(network, facts),
        "Options": options,
        "Labels": spec.labels.clone().unwrap_or_default(),
    });
    if is_verbose {
        document["Peers"] = peers(network, facts);
        document["Services"] = services(network, facts);
    }
    document
}

/// Every container on the network, on whichever node.
fn containers(network: &Network, facts: &Facts) -> Value {
    let entries = facts.on(network).map(|(task, attachment)| {
        let (host, _) = facts.host(task);
        let container = json!({
            "Name": container_name(task),
            "Node": host,
            "IPv4Address": cidr(attachment),
            "IPv6Address": attachment.ipv6.map(|net| net.to_string()).unwrap_or_default(),
        });
        (task.id.to_string(), container)
    });
    Value::Object(entries.collect::<Map<_, _>>())
}

/// The nodes that have the network: every node has the ingress network.
fn peers(network: &Network, facts: &Facts) -> Value {
    let mut nodes: BTreeMap<NodeId, &Node> = BTreeMap::new();
    if is_ingress(network) {
        nodes.extend(facts.nodes.iter().map(|(id, node)| (*id, node)));
    }
    let places = facts.on(network).filter_map(|(task, _)| task.node_id);
    nodes.extend(places.filter_map(|id| Some((id, facts.nodes.get(&id)?))));
    let mut peers: Vec<(&str, &str)> =
        nodes.values().map(|node| (node.hostname(), node.status.addr.as_str())).collect();
    peers.sort_unstable();
    peers.into_iter().map(|(name, address)| json!({"Name": name, "IP": address})).collect()
}

/// Whether a service is on a network: by its spec, or on the ingress network by a published port.
fn is_on(service: &Service, network: &Network) -> bool {
    if is_ingress(network) {
        let mut ports = service.endpoint.ports.iter();
        return ports.any(|port| port.publish_mode.unwrap_or_default() == PublishMode::Ingress);
    }
    let target = network.id.to_string();
    service.spec.networks().iter().any(|config| config.target == target)
}

/// The services on the network by name, each with its address and its tasks.
fn services(network: &Network, facts: &Facts) -> Value {
    let mut by_service: BTreeMap<ServiceId, Vec<(&Task, &NetworkAttachment)>> = BTreeMap::new();
    for (task, attachment) in facts.on(network) {
        by_service.entry(task.service_id).or_default().push((task, attachment));
    }
    let mut services = Map::new();
    for service in facts.services.values() {
        let mut tasks = by_service.remove(&service.id).unwrap_or_default();
        if !is_on(service, network) && tasks.is_empty() {
            continue;
        }
        tasks.sort_by_key(|(task, _)| (task.slot, task.id));
        let of_network = |vip: &&skep_common::object::VirtualIp| vip.network_id == network.id;
        let vip = service.endpoint.virtual_ips.iter().find(of_network);
        let ports = service.endpoint.ports.iter().map(|port| {
            let published = port.published_port.unwrap_or_default();
            format!("Target: {}, Publish: {published}", port.target_port)
        });
        let tasks = tasks.into_iter().map(|(task, attachment)| {
            let node = task.node_id.and_then(|node_id| facts.nodes.get(&node_id));
            let withheld = withheld(task, node).map(|why| why.to_string());
            json!({
                "Name": container_name(task),
                "EndpointID": task.id,
                "EndpointIP": attachment.address,
                "State": task.status.state.to_string(),
                "Withheld": withheld.unwrap_or_default(),
                "Info": {"Host IP": facts.host(task).1},
            })
        });
        let entry = json!({
            "VIP": vip.map(|vip| vip.addr.addr().to_string()).unwrap_or_default(),
            "Ports": ports.collect::<Vec<_>>(),
            "Tasks": tasks.collect::<Vec<_>>(),
        });
        services.insert(service.spec.name.clone(), entry);
    }
    Value::Object(services)
}
