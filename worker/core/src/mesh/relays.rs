//! Ports that the daemon serves instead of the kernel: it accepts each connection and makes one of its own to
//! a task.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;

use skep_common::spec::ProxyProtocol;

use super::{MeshTable, PortKey, Protocol, PublishedPort};

/// What the daemon must know of a port that it relays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// How tasks are told of clients.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The healthy tasks, ascending and without repetition.
    pub backends: Vec<SocketAddrV4>,
}

impl PublishedPort {
    /// Whether the daemon relays connections, which the kernel's rules then leave to it.
    pub fn is_relayed(&self) -> bool {
        self.protocol == Protocol::Tcp && self.proxy_protocol.is_some()
    }
}

/// The relayed ports of a table.
pub fn relays(table: &MeshTable) -> BTreeMap<PortKey, Relay> {
    let relayed = table.ports.iter().filter(|port| port.is_relayed());
    let relay = |port: &PublishedPort| {
        let backends = port.backends.iter();
        let backends = backends.map(|one| SocketAddrV4::new(one.address, one.target_port));
        let backends: BTreeSet<SocketAddrV4> = backends.collect();
        let backends = backends.into_iter().collect();
        let key = PortKey { protocol: port.protocol, port: port.published };
        (key, Relay { proxy_protocol: port.proxy_protocol, backends })
    };
    relayed.map(relay).collect()
}

/// Gives backends in exact turns, as long as they answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Turns {
    backends: Vec<SocketAddrV4>,
    next: usize,
}

impl Turns {
    /// Replaces the backends; where they are the same, the turns go on.
    pub fn set(&mut self, backends: &[SocketAddrV4]) {
        if self.backends != backends {
            *self = Self { backends: backends.to_vec(), next: 0 };
        }
    }

    /// The next backend in turn that is not in `failed`; `None` where all are.
    ///
    /// One that is passed over has had its turn: its neighbour does not get the double of it.
    pub fn take(&mut self, failed: &BTreeSet<SocketAddrV4>) -> Option<SocketAddrV4> {
        for _ in 0..self.backends.len() {
            let backend = *self.backends.get(self.next)?;
            self.next = (self.next + 1) % self.backends.len();
            if !failed.contains(&backend) {
                return Some(backend);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddrV4 {
        SocketAddrV4::new([10, 192, 4, last].into(), 80)
    }

    fn take(turns: &mut Turns, n: usize, dead: &[u8]) -> Vec<u8> {
        let connect = |turns: &mut Turns| {
            let mut failed = BTreeSet::new();
            loop {
                let backend = turns.take(&failed)?;
                let last = backend.ip().octets()[3];
                if !dead.contains(&last) {
                    return Some(last);
                }
                failed.insert(backend);
            }
        };
        (0..n).filter_map(|_| connect(turns)).collect()
    }

    #[test]
    fn turns_are_exact_and_pass_over_what_fails() {
        let mut turns = Turns::default();
        assert_eq!(turns.take(&BTreeSet::new()), None, "there is none");
        turns.set(&[1, 2, 3].map(address));
        assert_eq!(take(&mut turns, 4, &[]), [1, 2, 3, 1]);
        turns.set(&[1, 2, 3].map(address));
        assert_eq!(take(&mut turns, 2, &[]), [2, 3], "the same ones go on");
        assert_eq!(take(&mut turns, 4, &[2]), [1, 3, 1, 3], "its turns are nobody's");
        assert_eq!(take(&mut turns, 2, &[1, 2, 3]), [0; 0], "nobody is asked twice");
        turns.set(&[2, 3].map(address));
        assert_eq!(take(&mut turns, 3, &[]), [2, 3, 2]);
    }
}
