//! A task on another node, reached directly over the tunnel, through the mesh and by relays.
//!
//! The client is in the network of n1, the tasks are on n2; see [`super::requests`].

use super::place::Place;
use super::{requests, start_lab};

const MESH: &str = "mesh";
const PORT: u16 = 8080;

pub(crate) fn run(is_quick: bool) {
    if !requests::can_send() {
        return;
    }
    let lab = start_lab(1, 1);
    lab.import_whoami();
    let published = format!("{PORT}:{}", requests::TASK_PORT);
    let not_published = requests::TASK_PORT.to_string();
    let services = requests::services(MESH);
    for service in &services {
        let target = if *service == MESH { &published } else { &not_published };
        let flags = ["--constraint", "node.hostname==n2", "--publish", target];
        lab.node("n1").create_whoami(service, &flags);
    }
    for service in &services {
        lab.wait_until_settled("n1", service, 1);
    }
    for node in ["n1", "n2"] {
        Place::on(&lab, node).forget_connections_soon();
    }
    let own = lab.node("n1").address();
    let ours = (MESH, format!("http://{own}:{PORT}/"));
    let task_of = |service: &str| Place::of_service(&lab, service).address();
    requests::compare(&Place::on(&lab, "n1"), own, ours, task_of, is_quick);
    lab.down();
}
