//! The kernel's table of connections in one network namespace: what it holds, and deletions.
//!
//! Source: `include/uapi/linux/netfilter/nfnetlink_conntrack.h` of the kernel.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;
use skep_worker_core::network::Connection;

use super::Error;
use super::channel::{Channel, Frame};
use super::nft::{Attributes, be32, find};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const NESTED: u16 = 0x8000;
const HEADER_LENGTH: usize = 4;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// How many looks at connections it takes after rules have changed: requests must be found unanswered twice, and
/// datagrams that were on their way through the kernel then have an entry at the second look only.
pub const N_LOOKS: u8 = 2;

/// `IPS_SEEN_REPLY`.
const STATUS_SEEN_REPLY: u32 = 1 << 1;

/// An entry of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What decides about it.
    pub connection: Connection,
    /// Whether it was answered, be it with a refusal.
    pub is_answered: bool,
    family: u8,
    /// What names it to the kernel: its first direction, its id, and its zone where it has one in both
    /// directions (that of one direction is part of it).
    original: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
}

/// What names an entry for as long as the kernel has it: its id and its first direction.
type Name = (Vec<u8>, Vec<u8>);

/// Requests that go astray and were not answered at the last look: see [`Conntrack::forget_unanswered`].
#[derive(Debug, Default)]
pub struct Unanswered(BTreeSet<Name>);

impl Unanswered {
    /// Takes over what another look found; gives what was found by both.
    fn look(&mut self, found: Vec<Entry>) -> Vec<Entry> {
        let (again, new): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|entry| self.0.contains(&entry.name()));
        self.0 = new.iter().map(Entry::name).collect();
        again
    }
}

impl Entry {
    fn name(&self) -> Name {
        (self.id.clone(), self.original.clone())
    }

    fn read(payload: &[u8]) -> Option<Self> {
        let family = *payload.first()?;
        let body = payload.get(HEADER_LENGTH..)?;
        let original = find(body, CTA_TUPLE_ORIG)?;
        let protocol = find(find(original, CTA_TUPLE_PROTO)?, CTA_PROTO_NUM)?;
        let reply = find(body, CTA_TUPLE_REPLY)?;
        let connection = Connection {
            protocol: *protocol.first()?,
            destination: address(original, CTA_IP_V4_DST, CTA_IP_V6_DST)?,
            destination_port: port(original, CTA_PROTO_DST_PORT),
            answers_from: address(reply, CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
            answers_from_port: port(reply, CTA_PROTO_SRC_PORT),
        };
        let id = find(body, CTA_ID)?.to_vec();
        let zone = find(body, CTA_ZONE).map(<[u8]>::to_vec);
        let status = find(body, CTA_STATUS).and_then(be32).unwrap_or(STATUS_SEEN_REPLY);
        let is_answered = status & STATUS_SEEN_REPLY != 0;
        Some(Self { connection, is_answered, family, original: original.to_vec(), id, zone })
    }
}

fn port(tuple: &[u8], side: u16) -> u16 {
    let bytes = find(tuple, CTA_TUPLE_PROTO).and_then(|protocol| find(protocol, side));
    bytes.and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

fn address(tuple: &[u8], ipv4: u16, ipv6: u16) -> Option<IpAddr> {
    let addresses = find(tuple, CTA_TUPLE_IP)?;
    if let Some(bytes) = find(addresses, ipv4) {
        return Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into());
    }
    Some(Ipv6Addr::from(*find(addresses, ipv6)?.first_chunk::<16>()?).into())
}

/// A socket to the table of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conntrack {
    channel: Channel,
}

impl Conntrack {
    /// Opens a channel in the namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        let channel = Channel::open(NETLINK_NETFILTER);
        let channel = channel.map_err(|e| Error::kernel("open a conntrack netlink socket", e))?;
        Ok(Self { channel })
    }

    /// All connections of IPv4 and IPv6.
    pub fn list(&mut self) -> Result<Vec<Entry>, Error> {
        self.dump(&Attributes::new())
    }

    /// Those that were not answered.
    pub fn list_unanswered(&mut self) -> Result<Vec<Entry>, Error> {
        // An older kernel does not know the filter and lists all.
        let filter = Attributes::new().be32(CTA_STATUS, 0);
        let mut entries = self.dump(&filter.be32(CTA_STATUS_MASK, STATUS_SEEN_REPLY))?;
        entries.retain(|entry| !entry.is_answered);
        Ok(entries)
    }

    fn dump(&mut self, filter: &Attributes) -> Result<Vec<Entry>, Error> {
        let mut body = vec![0; HEADER_LENGTH]; // Of any family.
        body.extend(filter.as_bytes());
        let frames = self.channel.request(SUBSYSTEM << 8 | GET, NLM_F_REQUEST | NLM_F_DUMP, &body);
        let frames = frames.map_err(|refusal| Error::kernel("list connections", refusal))?;
        Ok(frames.iter().filter_map(|frame| Entry::read(&frame.payload)).collect())
    }

    /// Has the kernel forget a connection; fine if it has already.
    pub fn delete(&mut self, entry: &Entry) -> Result<(), Error> {
        self.request_of(DELETE, entry).map(drop)
    }

    /// Has the kernel forget requests that go astray (`is_astray` tells which) and were not answered at the look
    /// before this one either. `before` is what that look found, and becomes what this one found, and what could
    /// not be deleted. Looks are to be as far apart as an answer may take.
    ///
    /// A single look would not do. Where a request is answered between the look and the deletion, its client
    /// is connected, and the next packet is taken for a new connection, sent to another task and refused.
    pub fn forget_unanswered(
        &mut self,
        before: &mut Unanswered,
        is_astray: impl Fn(&Connection) -> bool,
    ) -> Result<(), Error> {
        let mut entries = self.list_unanswered()?;
        entries.retain(|entry| is_astray(&entry.connection));
        let mut failure = None;
        for entry in before.look(entries) {
            let connection = &entry.connection;
            match self.delete_unanswered(&entry) {
                Ok(is_forgotten) => {
                    tracing::debug!(
                        ?connection,
                        is_forgotten,
                        "a request was found unanswered twice"
                    );
                }
                Err(error) => {
                    before.0.insert(entry.name());
                    failure.get_or_insert(error);
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Has the kernel forget a connection unless it was answered since it was listed: what is established
    /// would break. Returns whether it was forgotten.
    ///
    /// On a busy machine a long list is old before its end is reached. Not every kernel knows a
    /// deletion with a condition, so each is looked at again at the last moment.
    pub fn delete_unanswered(&mut self, entry: &Entry) -> Result<bool, Error> {
        let found = self.request_of(GET, entry)?;
        let found = found.iter().find_map(|frame| Entry::read(&frame.payload));
        if found.is_none_or(|found| found.is_answered) {
            return Ok(false);
        }
        self.delete(entry)?;
        Ok(true)
    }

    /// A request about one entry. No answer where the kernel has forgotten it.
    fn request_of(&mut self, kind: u16, entry: &Entry) -> Result<Vec<Frame>, Error> {
        let list = Attributes::new().raw(CTA_TUPLE_ORIG | NESTED, &entry.original);
        let list = list.raw(CTA_ID, &entry.id);
        let list = match &entry.zone {
            Some(zone) => list.raw(CTA_ZONE, zone),
            None => list,
        };
        let body = [&[entry.family, 0, 0, 0], list.as_bytes()].concat();
        match self.channel.request(SUBSYSTEM << 8 | kind, NLM_F_REQUEST | NLM_F_ACK, &body) {
            Err(refusal) if refusal.errno() == Some(libc::ENOENT) => Ok(Vec::new()),
            other => {
                other.map_err(|refusal| Error::kernel("ask for or delete a connection", refusal))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_with_the_address_that_answers() {
        let tuple = |source: &[u8], destination: &[u8], v4: bool| {
            let (from, to) = if v4 { (1, 2) } else { (3, 4) };
            let ip = Attributes::new().raw(from, source).raw(to, destination);
            let protocol = Attributes::new().raw(CTA_PROTO_NUM, &[17]);
            let protocol = protocol.raw(CTA_PROTO_SRC_PORT, &[0, 53]);
            let protocol = protocol.raw(CTA_PROTO_DST_PORT, &[4, 0]);
            Attributes::new().nested(CTA_TUPLE_IP, &ip).nested(CTA_TUPLE_PROTO, &protocol)
        };
        let message = |original: &Attributes, reply: &Attributes| {
            let list = Attributes::new().nested(CTA_TUPLE_ORIG, original);
            let list = list.nested(CTA_TUPLE_REPLY, reply).be32(CTA_ID, 7);
            [&[2, 0, 0, 0], list.as_bytes()].concat()
        };
        let original = tuple(&[10, 0, 1, 5], &[10, 0, 1, 2], true);
        let reply = tuple(&[10, 0, 1, 4], &[10, 0, 1, 5], true);
        let entry = Entry::read(&message(&original, &reply)).unwrap();
        let expect = Connection {
            protocol: 17,
            destination: "10.0.1.2".parse().unwrap(),
            destination_port: 1024,
            answers_from: "10.0.1.4".parse().unwrap(),
            answers_from_port: 53,
        };
        assert_eq!(entry.connection, expect);
        assert_eq!(entry.original, original.as_bytes());

        let original = tuple(&[1; 16], &[2; 16], false);
        let entry = Entry::read(&message(&original, &tuple(&[3; 16], &[1; 16], false))).unwrap();
        assert_eq!(entry.connection.answers_from, IpAddr::from([3; 16]));
        assert_eq!(Entry::read(b""), None);
        assert_eq!(Entry::read(&message(&Attributes::new(), &reply)), None);
    }
}
