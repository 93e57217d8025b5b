//! Ports that tasks publish in host mode: on this node's own addresses, each to its one task.
//!
//! To the mesh such a port is one of this node with one backend. It is published while the container
//! runs, healthy or not, as Docker does, and withdrawn before the container is asked to end.
//!
//! A port without a number is given one of those that this node's kernel takes for connections
//! (`ip_local_port_range`), as Docker does. Managers number ports of the mesh from 30000 to 32767, so
//! that the two choose apart from each other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use skep_common::object::{PortStatus, TaskStatus};
use skep_common::spec::{PortConfig, PortProtocol, Predefined, predefined};
use skep_common::{Task, TaskId, TaskState};
use skep_worker_core::mesh::{Backend, PublishedPort};

use super::mesh::carried;

/// Says which port of the node is free.
pub(super) trait FreePorts {
    /// A port that no program of the node has; `None` where there is none.
    fn free_port(&mut self, protocol: PortProtocol) -> Option<u16>;
}

/// What the tasks of this node publish.
#[derive(Debug, Default)]
pub(super) struct HostPorts {
    tasks: BTreeMap<TaskId, Published>,
}

#[derive(Debug)]
struct Published {
    service_id: String,
    service: String,
    /// `None` on the node's own network: the container itself listens there.
    address: Option<Ipv4Addr>,
    ports: Vec<Port>,
}

/// A port as wanted, and its number on the node.
#[derive(Debug)]
struct Port {
    wanted: PortConfig,
    number: Option<u16>,
}

impl Port {
    fn protocol(&self) -> PortProtocol {
        self.wanted.protocol.unwrap_or_default()
    }

    /// Whether the node numbers it.
    fn is_dynamic(&self) -> bool {
        self.wanted.published_port.is_none()
    }
}

/// Whether a container of that status runs.
pub(super) fn runs(status: &TaskStatus) -> bool {
    let has_process = status.container_status.as_ref().is_some_and(|container| container.pid != 0);
    has_process && !status.state.is_terminal() && status.state >= TaskState::Starting
}

/// Whether a task has its node's own interfaces.
fn is_on_host(task: &Task) -> bool {
    let networks = task.spec.networks.as_deref().unwrap_or_default();
    predefined(networks).any(|one| one == Predefined::Host)
}

impl HostPorts {
    /// Publishes the ports of a task that runs; gives the tasks whose ports have other numbers since, or
    /// `None` where it publishes nothing new. Ports that it had before under an earlier daemon keep their
    /// numbers.
    pub(super) fn publish(
        &mut self,
        task: &Task,
        earlier: Option<&PortStatus>,
        free_ports: &mut impl FreePorts,
    ) -> Option<BTreeSet<TaskId>> {
        let address = task.ingress_address();
        if address.is_none() && !is_on_host(task) {
            return None;
        }
        if task.host_ports.is_empty() || self.tasks.contains_key(&task.id) {
            return None;
        }
        let had: Vec<&PortConfig> = earlier.iter().flat_map(|status| &status.ports).collect();
        let numbered = |wanted: &PortConfig| {
            let is_same = |had: &&&PortConfig| {
                had.target_port == wanted.target_port && had.protocol == wanted.protocol
            };
            let number = wanted.published_port;
            number.or_else(|| had.iter().find(is_same).and_then(|had| had.published_port))
        };
        let ports = task.host_ports.iter();
        let ports = ports.map(|wanted| Port { wanted: wanted.clone(), number: numbered(wanted) });
        let published = Published {
            service_id: task.service_id.to_string(),
            service: task.service_name.clone(),
            address,
            ports: ports.collect(),
        };
        self.tasks.insert(task.id, published);
        Some(self.settle(&BTreeSet::new(), free_ports))
    }

    /// Withdraws the ports of a task; whether there were any.
    pub(super) fn withdraw(&mut self, task_id: TaskId) -> bool {
        self.tasks.remove(&task_id).is_some()
    }

    /// Gives every port that the node numbers a number that is not in `taken`; returns the tasks that
    /// have another one since.
    pub(super) fn settle(
        &mut self,
        taken: &BTreeSet<(PortProtocol, u16)>,
        free_ports: &mut impl FreePorts,
    ) -> BTreeSet<TaskId> {
        let mut changed = BTreeSet::new();
        let all = self.tasks.values().flat_map(|published| &published.ports);
        let mut own: BTreeSet<(PortProtocol, u16)> =
            all.filter_map(|port| Some((port.protocol(), port.number?))).collect();
        for (task_id, published) in &mut self.tasks {
            for port in published.ports.iter_mut().filter(|port| port.is_dynamic()) {
                let protocol = port.protocol();
                if port.number.is_some_and(|number| !taken.contains(&(protocol, number))) {
                    continue;
                }
                let free = free_ports.free_port(protocol);
                let is_free = |number: &u16| own.insert((protocol, *number));
                let number = free.filter(is_free);
                if number.is_none() {
                    let target = port.wanted.target_port;
                    tracing::warn!(task.id = %task_id, target, "this node has no free port for a task");
                }
                if port.number != number {
                    port.number = number;
                    changed.insert(*task_id);
                }
            }
        }
        changed
    }

    /// The numbers that are given.
    pub(super) fn numbers(&self) -> impl Iterator<Item = (PortProtocol, u16)> {
        let ports = self.tasks.values().flat_map(|published| &published.ports);
        ports.filter_map(|port| Some((port.protocol(), port.number?)))
    }

    /// What a task's status says of its ports.
    pub(super) fn status(&self, task_id: TaskId) -> Option<PortStatus> {
        let published = self.tasks.get(&task_id)?;
        let ports = published
            .ports
            .iter()
            .map(|port| PortConfig { published_port: port.number, ..port.wanted.clone() });
        Some(PortStatus { ports: ports.collect() })
    }

    /// The ports, to be served by the mesh.
    pub(super) fn published(&self) -> impl Iterator<Item = PublishedPort> {
        self.tasks.iter().flat_map(|(task_id, published)| {
            published.ports.iter().filter_map(|port| {
                let address = published.address?;
                Some(PublishedPort {
                    published: port.number?,
                    protocol: carried(port.protocol()),
                    service_id: published.service_id.clone(),
                    service: published.service.clone(),
                    proxy_protocol: port.wanted.proxy_protocol,
                    backends: vec![Backend {
                        task_id: task_id.to_string(),
                        address,
                        target_port: port.wanted.target_port,
                    }],
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use skep_common::object::NetworkAttachment;
    use skep_common::spec::PublishMode;

    use super::*;

    /// Free ports in a row.
    struct Row(u16);

    impl FreePorts for Row {
        fn free_port(&mut self, _: PortProtocol) -> Option<u16> {
            self.0 += 1;
            Some(self.0)
        }
    }

    fn task(id: u128, ports: &[(Option<u16>, u16)]) -> Task {
        let mut task = super::super::tests::task(id, "web", TaskState::Running);
        let address = Ipv4Addr::new(10, 192, 4, u8::try_from(id).unwrap());
        task.networks_attachments = vec![NetworkAttachment::uplink(address, 22)];
        let port = |(published_port, target_port): &(Option<u16>, u16)| PortConfig {
            protocol: Some(PortProtocol::Tcp),
            target_port: *target_port,
            published_port: *published_port,
            publish_mode: Some(PublishMode::Host),
            proxy_protocol: None,
            name: None,
        };
        task.host_ports = ports.iter().map(port).collect();
        task
    }

    fn shown(ports: &HostPorts) -> Vec<String> {
        let text = |port: PublishedPort| {
            let backend = &port.backends[0];
            format!("{} {}:{}", port.published, backend.address, backend.target_port)
        };
        ports.published().map(text).collect()
    }

    #[test]
    fn each_port_leads_to_its_task_while_that_runs() {
        let (mut ports, mut row) = (HostPorts::default(), Row(40000));
        let two = task(1, &[(Some(8080), 80), (None, 81)]);
        assert_eq!(ports.publish(&two, None, &mut row), Some([TaskId(1)].into()));
        assert_eq!(ports.publish(&two, None, &mut row), None);
        assert!(ports.publish(&task(2, &[(None, 81)]), None, &mut row).is_some());
        assert_eq!(ports.publish(&task(3, &[]), None, &mut row), None, "it publishes nothing");
        let expect = ["8080 10.192.4.1:80", "40001 10.192.4.1:81", "40002 10.192.4.2:81"];
        assert_eq!(shown(&ports), expect);
        let status = ports.status(TaskId(1)).unwrap();
        let numbers: Vec<_> = status.ports.iter().map(|port| port.published_port).collect();
        assert_eq!(numbers, [Some(8080), Some(40001)]);
        assert!(ports.withdraw(TaskId(1)));
        assert!(!ports.withdraw(TaskId(1)));
        assert_eq!(ports.status(TaskId(1)), None);
        assert_eq!(shown(&ports), ["40002 10.192.4.2:81"]);
    }

    #[test]
    fn on_the_nodes_network_a_port_is_named_and_not_balanced() {
        let (mut ports, mut row) = (HostPorts::default(), Row(40000));
        let mut agent = task(1, &[(Some(80), 80)]);
        agent.networks_attachments.clear();
        assert_eq!(ports.publish(&agent, None, &mut row), None, "nothing reaches it");
        let on_host = skep_common::spec::NetworkAttachmentConfig {
            target: "host".into(),
            ..Default::default()
        };
        std::sync::Arc::make_mut(&mut agent.spec).networks = Some(vec![on_host]);
        assert!(ports.publish(&agent, None, &mut row).is_some());
        let status = ports.status(TaskId(1)).unwrap();
        assert_eq!(status.ports[0].published_port, Some(80));
        assert_eq!(shown(&ports), Vec::<String>::new());
    }

    #[test]
    fn a_task_that_found_no_free_port_is_named_when_it_gets_one() {
        struct Full;
        impl FreePorts for Full {
            fn free_port(&mut self, _: PortProtocol) -> Option<u16> {
                None
            }
        }
        let mut ports = HostPorts::default();
        assert_eq!(ports.publish(&task(1, &[(None, 81)]), None, &mut Full), Some([].into()));
        let changed = ports.publish(&task(2, &[(Some(8080), 80)]), None, &mut Row(40000));
        assert_eq!(changed, Some([TaskId(1)].into()));
        assert_eq!(ports.status(TaskId(1)).unwrap().ports[0].published_port, Some(40001));
    }

    #[test]
    fn a_number_is_kept_over_a_restart_and_given_up_where_it_is_taken() {
        let (mut ports, mut row) = (HostPorts::default(), Row(40000));
        let both = task(1, &[(Some(8080), 80), (None, 81)]);
        ports.publish(&both, None, &mut row);
        let status = ports.status(TaskId(1));
        let mut again = HostPorts::default();
        again.publish(&both, status.as_ref(), &mut row);
        assert_eq!(again.status(TaskId(1)), status);
        let taken = |numbers: &[u16]| {
            numbers.iter().map(|number| (PortProtocol::Tcp, *number)).collect::<BTreeSet<_>>()
        };
        assert!(again.settle(&taken(&[8080, 9000]), &mut row).is_empty(), "users chose that one");
        assert_eq!(again.settle(&taken(&[40001]), &mut row), [TaskId(1)].into());
        assert_eq!(shown(&again), ["8080 10.192.4.1:80", "40002 10.192.4.1:81"]);
    }
}
