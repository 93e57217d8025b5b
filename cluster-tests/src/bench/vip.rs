//! A task of an overlay network on another node, reached directly, by its service's virtual address and
//! by relays.
//!
//! The client is in the network of a container on n1, the tasks are on n2. Relays run beside the client, in
//! the same container's network, which is the shortest way that they can have; see [`super::requests`].

use super::place::Place;
use super::{requests, start_lab};

const VIP: &str = "vip";
const CLIENT: &str = "client";
const NETWORK: &str = "bench";

pub(crate) fn run(is_quick: bool) {
    if !requests::can_send() {
        return;
    }
    let lab = start_lab(1, 1);
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.skep(&["network", "create", NETWORK]).ok();
    let services = requests::services(VIP);
    let all: Vec<&str> = services.iter().copied().chain([CLIENT]).collect();
    for service in &all {
        let node = if *service == CLIENT { "n1" } else { "n2" };
        let constraint = format!("node.hostname=={node}");
        n1.create_whoami(service, &["--network", NETWORK, "--constraint", &constraint]);
    }
    for service in &all {
        lab.wait_until_settled("n1", service, 1);
    }
    for service in &all {
        Place::of_service(&lab, service).forget_connections_soon();
    }
    let client = Place::of_service(&lab, CLIENT);
    let inspected = n1.skep(&["service", "inspect", VIP]).ok().json();
    let address = inspected[0]["Endpoint"]["VirtualIPs"][0]["Addr"].as_str();
    let address = address.and_then(|cidr| cidr.split('/').next());
    let address = address.expect("a service on a network has a virtual address");
    let ours = (VIP, format!("http://{address}:{}/", requests::TASK_PORT));
    let task_of = |service: &str| Place::of_service(&lab, service).address();
    requests::compare(&client, client.address(), ours, task_of, is_quick);
    lab.down();
}
