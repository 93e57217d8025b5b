//! Whose connections were counted, and what is said of them to whoever collects metrics.
//!
//! The kernel counts by what a connection is: who answers, and which published port it came to
//! ([`Key`]). [`Owners`] knows which task that is. Both forget: an address that goes to another task
//! must not bring its counts along, and a task that is gone is told of for [`RETENTION`] more.
//!
//! A connection by IPv6 is to the twin of a task's address ([`twin`]), and counts with it.
//!
//! Units: connections, refused connections, and bytes of IP packets. Format: Prometheus' text
//! exposition format 0.0.4.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use skep_common::Timestamp;

use crate::mesh::{MeshTable, Protocol, of_twin, twin};

/// How long a task that left the table is told of: its last connections end meanwhile, and collectors come
/// once a minute.
pub const RETENTION: Duration = Duration::from_secs(600);

/// What the kernel counts by: `answers from . its port . published port . protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The task's address and port.
    pub endpoint: SocketAddrV4,
    /// The published port.
    pub published: u16,
    /// The transport protocol.
    pub protocol: Protocol,
}

impl Key {
    /// The key as the kernel has it in a table of IPv4, and in one of IPv6: each part fills 4 bytes, the
    /// address of IPv6 16.
    pub fn to_bytes(self) -> [Vec<u8>; 2] {
        let [port_high, port_low] = self.endpoint.port().to_be_bytes();
        let [high, low] = self.published.to_be_bytes();
        let protocol = self.protocol.number();
        let rest = [port_high, port_low, 0, 0, high, low, 0, 0, protocol, 0, 0, 0];
        let address = *self.endpoint.ip();
        [[&address.octets()[..], &rest].concat(), [&twin(address).octets()[..], &rest].concat()]
    }

    /// The key that the kernel's bytes stand for, of a protocol that the mesh carries.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        const REST_LENGTH: usize = 12;
        let (address, rest) = bytes.split_at_checked(bytes.len().checked_sub(REST_LENGTH)?)?;
        let address = match (<[u8; 4]>::try_from(address), <[u8; 16]>::try_from(address)) {
            (Ok(octets), _) => Ipv4Addr::from(octets),
            (_, Ok(octets)) => of_twin(octets.into())?,
            _ => return None,
        };
        let [port_high, port_low, _, _, high, low, _, _, protocol, ..] =
            *rest.first_chunk::<REST_LENGTH>()?;
        let port = u16::from_be_bytes([port_high, port_low]);
        Some(Self {
            endpoint: SocketAddrV4::new(address, port),
            published: u16::from_be_bytes([high, low]),
            protocol: Protocol::from_number(protocol)?,
        })
    }
}

/// What was counted of one backend of one published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Connections that were given to it.
    pub connections: u64,
    /// Of those, the ones that it or its node refused.
    pub failures: u64,
    /// Bytes that clients sent.
    pub received_bytes: u64,
    /// Bytes that it answered.
    pub sent_bytes: u64,
}

/// The values of one metric: more labels, and which count it is.
type Values<'a> = &'a [(&'a str, fn(&Counts) -> u64)];

/// A task behind a published port.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    service: String,
    task_id: String,
    gone_at: Option<Timestamp>,
}

/// Which task is behind which address.
#[derive(Debug, Clone, Default)]
pub struct Owners(BTreeMap<Key, Owner>);

impl Owners {
    /// Takes a table over. Gives the keys whose counts, where there are any, are not of their owners: their
    /// addresses went to other tasks, also where connections of one that was forgotten had gone on, or
    /// their tasks have been gone for [`RETENTION`].
    pub fn learn(&mut self, table: &MeshTable, now: Timestamp) -> Vec<Key> {
        let mut stale = Vec::new();
        let mut present = BTreeSet::new();
        for port in &table.ports {
            let service = if port.service.is_empty() { &port.service_id } else { &port.service };
            for backend in &port.backends {
                let endpoint = SocketAddrV4::new(backend.address, backend.target_port);
                let key = Key { endpoint, published: port.published, protocol: port.protocol };
                let task_id = backend.task_id.clone();
                let owner = Owner { service: service.clone(), task_id, gone_at: None };
                present.insert(key);
                let old = self.0.insert(key, owner);
                if old.is_none_or(|old| old.task_id != backend.task_id) {
                    stale.push(key);
                }
            }
        }
        self.0.retain(|key, owner| {
            if present.contains(key) {
                return true;
            }
            let gone_at = *owner.gone_at.get_or_insert(now);
            let is_kept = now < gone_at.after(RETENTION);
            if !is_kept {
                stale.push(*key);
            }
            is_kept
        });
        stale
    }

    /// Counts as text for a collector. Tasks that nothing was counted of yet are there with zeros.
    pub fn render(&self, counts: &BTreeMap<Key, Counts>) -> String {
        let mut text = String::new();
        let metrics: [(&str, &str, Values<'_>); 3] = [
            (
                "skep_ingress_connections_total",
                "Connections to published ports that this node gave to a task.",
                &[("", |counts| counts.connections)],
            ),
            (
                "skep_ingress_failures_total",
                "Connections that this node gave to a task and that were refused.",
                &[("", |counts| counts.failures)],
            ),
            (
                "skep_ingress_bytes_total",
                "Bytes of IP packets from clients to a task (in) and back (out).",
                &[
                    (",direction=\"in\"", |counts| counts.received_bytes),
                    (",direction=\"out\"", |counts| counts.sent_bytes),
                ],
            ),
        ];
        for (name, help, values) in metrics {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
            for (key, owner) in &self.0 {
                let counts = counts.get(key).copied().unwrap_or_default();
                let Owner { service, task_id, .. } = owner;
                let Key { published, protocol, .. } = key;
                for (label, value) in values {
                    let _ = writeln!(
                        text,
                        "{name}{{service={service:?},task=\"{task_id}\",port=\"{published}\",protocol=\"{protocol}\"{label}}} {}",
                        value(&counts)
                    );
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Backend, PublishedPort};

    const NOW: Timestamp = Timestamp(1_700_000_000_000_000_000);

    /// Port 8080 of the service `web`; `backends` are words `task@last byte of its address`.
    fn table(backends: &str) -> MeshTable {
        let backend = |word: &str| {
            let (task_id, last) = word.split_once('@').unwrap();
            let address = Ipv4Addr::new(10, 192, 4, last.parse().unwrap());
            Backend { task_id: task_id.into(), address, target_port: 80 }
        };
        MeshTable {
            version: 1,
            self_number: 1,
            pool: MeshTable::default_pool(),
            slice_prefix: MeshTable::default_slice_prefix(),
            peers: Vec::new(),
            ipv6: BTreeMap::new(),
            daemons: BTreeMap::new(),
            ports: vec![PublishedPort {
                published: 8080,
                protocol: Protocol::Tcp,
                service_id: "id".into(),
                service: "web".into(),
                proxy_protocol: None,
                backends: backends.split_whitespace().map(backend).collect(),
            }],
        }
    }

    fn key(last: u8) -> Key {
        let endpoint = SocketAddrV4::new(Ipv4Addr::new(10, 192, 4, last), 80);
        Key { endpoint, published: 8080, protocol: Protocol::Tcp }
    }

    #[test]
    fn keys_are_read_back_as_written() {
        let [bytes, of_ipv6] = key(7).to_bytes();
        assert_eq!(bytes, [10, 192, 4, 7, 0, 80, 0, 0, 0x1f, 0x90, 0, 0, 6, 0, 0, 0]);
        assert_eq!(Key::from_bytes(&bytes), Some(key(7)));
        assert_eq!(of_ipv6.len(), 28);
        assert_eq!(of_ipv6[12..], bytes[..], "the twin ends in the address");
        assert_eq!(Key::from_bytes(&of_ipv6), Some(key(7)));
        let mut stranger = of_ipv6;
        stranger[0] = 0x20;
        assert_eq!(Key::from_bytes(&stranger), None, "an address that is no twin");
        assert_eq!(Key::from_bytes(&bytes[..15]), None);
        assert_eq!(Key::from_bytes(&bytes[..3]), None);
        let mut other = bytes;
        other[12] = 1;
        assert_eq!(Key::from_bytes(&other), None, "a protocol that is not the mesh's");
    }

    #[test]
    fn counts_go_with_their_task_not_with_its_address() {
        let mut owners = Owners::default();
        assert_eq!(owners.learn(&table("a@1 b@2"), NOW), [key(1), key(2)], "of nobody known");
        assert_eq!(owners.learn(&table("a@1 b@2"), NOW), []);
        assert_eq!(owners.learn(&table("a@1"), NOW), [], "b may end what it has");
        assert!(owners.render(&BTreeMap::new()).contains("task=\"b\""));
        assert_eq!(owners.learn(&table("a@1 c@2"), NOW), [key(2)], "another task's address");
        let text = owners.render(&BTreeMap::new());
        assert!(text.contains("task=\"c\"") && !text.contains("task=\"b\""), "{text}");
        assert_eq!(owners.learn(&table("a@1"), NOW), []);
        assert_eq!(owners.learn(&table("a@1"), NOW.after(RETENTION)), [key(2)], "long gone");
        assert!(!owners.render(&BTreeMap::new()).contains("task=\"c\""));
        let later = NOW.after(RETENTION);
        assert_eq!(
            owners.learn(&table("a@1 d@2"), later),
            [key(2)],
            "what c's clients went on with"
        );
    }

    #[test]
    fn counts_are_text() {
        let mut owners = Owners::default();
        owners.learn(&table("a@1 b@2"), NOW);
        let counts = Counts { connections: 3, failures: 1, received_bytes: 180, sent_bytes: 120 };
        let text = owners.render(&[(key(1), counts), (key(9), counts)].into());
        let a = "service=\"web\",task=\"a\",port=\"8080\",protocol=\"tcp\"";
        let b = a.replace("\"a\"", "\"b\"");
        assert_eq!(
            text,
            format!(
                "\
# HELP skep_ingress_connections_total Connections to published ports that this node gave to a task.
# TYPE skep_ingress_connections_total counter
skep_ingress_connections_total{{{a}}} 3
skep_ingress_connections_total{{{b}}} 0
# HELP skep_ingress_failures_total Connections that this node gave to a task and that were refused.
# TYPE skep_ingress_failures_total counter
skep_ingress_failures_total{{{a}}} 1
skep_ingress_failures_total{{{b}}} 0
# HELP skep_ingress_bytes_total Bytes of IP packets from clients to a task (in) and back (out).
# TYPE skep_ingress_bytes_total counter
skep_ingress_bytes_total{{{a},direction=\"in\"}} 180
skep_ingress_bytes_total{{{a},direction=\"out\"}} 120
skep_ingress_bytes_total{{{b},direction=\"in\"}} 0
skep_ingress_bytes_total{{{b},direction=\"out\"}} 0
"
            )
        );
    }
}
