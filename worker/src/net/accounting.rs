//! Counts connections through published ports, in the kernel, by task.
//!
//! What the daemon relays is no translated connection: it counts that itself (`mesh::tally`), and both are told together.
//! The node that a client reaches counts: there its connection is translated, and there all of its
//! packets pass, both ways. All of this is an nftables table of its own beside the mesh's, and one of
//! IPv6 where the mesh has that, which are there only while someone may ask for the counts.
//!
//! ```text
//! answers      prerouting -140  answers of tasks: their bytes, and refusals
//! connections  postrouting  99  each connection once: NAT chains see its first packet alone
//! requests     postrouting  98  packets to tasks: their bytes; unreachable tasks
//! ```
//!
//! Each chain adds to a set by the connection's own addresses ([`Key`]), so that no rule depends on
//! which tasks there are. A set is per-processor counters behind one hash: no lock is shared.
//!
//! # Invariants
//!
//! - Nothing is read but when the counts are asked for.
//! - A daemon that starts counts anew, as counters of a process do: who had an address before it
//!   is not known.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv4Net};
use skep_common::Timestamp;
use skep_worker_core::accounting::{Counts, Key, Owners};
use skep_worker_core::mesh::{MeshTable, twin_net};

use super::Error;
use super::mesh::tally::Tally;
use super::mesh::{Mesh, host_has_ipv6};
use super::nft::expression as rule;
use super::nft::{Batch, Element, Expression, Family, Hook, NftChannel, SetKind, Value};
use super::thread::KernelThread;

const TABLE: &str = "skep-accounting";
const CONNECTIONS: &str = "connections";
const FAILURES: &str = "failures";
const REQUESTS: &str = "requests";
const ANSWERS: &str = "answers";
const SETS: [&str; 4] = [CONNECTIONS, FAILURES, REQUESTS, ANSWERS];

/// Backends of published ports that are counted; a connection to more of them is not, but served.
const KEYS_MAX: u32 = 1 << 16;
/// `inet_service . inet_service . inet_proto` as `nft` numbers types, behind the type of an address.
const KEY_REST_TYPE: u32 = 13 << 12 | 13 << 6 | 12;
const KEY_REST_LENGTH: u32 = 12;
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;

const PREROUTING: u32 = 0;
const POSTROUTING: u32 = 4;

/// The counts of this node. Clones share them.
#[derive(Debug, Clone)]
pub struct Accounting {
    kernel: std::sync::Arc<KernelThread<Kernel>>,
}

#[derive(Debug)]
struct Kernel {
    /// The tables of IPv4, and where the host has it those of IPv6.
    channels: Vec<NftChannel>,
    owners: Owners,
    /// What the daemon relays.
    relayed: Tally,
}

impl Accounting {
    /// Begins to count what the daemon of the mesh relays, and nothing else: for a kernel without rules.
    ///
    /// Must be called within a Tokio runtime.
    pub async fn start_in_user_space(mesh: &Mesh) -> Result<Self, Error> {
        let relayed = mesh.tally();
        relayed.start();
        let start =
            move || Ok((Kernel { channels: Vec::new(), owners: Owners::default(), relayed }, ()));
        let (kernel, ()) = KernelThread::start("skep-accounting", start).await?;
        Ok(Self { kernel: std::sync::Arc::new(kernel) })
    }

    /// Begins to count connections to tasks with addresses of `pool`, in the network namespace of the
    /// calling thread, to their twins where the mesh carries IPv6, and what the daemon of the mesh relays.
    ///
    /// Must be called within a Tokio runtime.
    pub async fn start(mesh: &Mesh, pool: Ipv4Net, has_ipv6: bool) -> Result<Self, Error> {
        let relayed = mesh.tally();
        relayed.start();
        let start = move || {
            let mut channels = vec![NftChannel::open()?];
            let mut batch = Batch::new();
            lay_out(&mut batch, pool.into());
            if has_ipv6 {
                channels.push(NftChannel::open_of(Family::Ipv6)?);
                batch.turn_to(Family::Ipv6);
                lay_out(&mut batch, twin_net(pool).into());
            }
            NftChannel::open()?.commit_any(&batch)?;
            Ok((Kernel { channels, owners: Owners::default(), relayed }, ()))
        };
        let (kernel, ()) = KernelThread::start("skep-accounting", start).await?;
        Ok(Self { kernel: std::sync::Arc::new(kernel) })
    }

    /// Takes over which task has which address.
    pub async fn learn(&self, table: &MeshTable, now: Timestamp) -> Result<(), Error> {
        let table = table.clone();
        self.kernel.run(move |kernel| kernel.learn(&table, now)).await?
    }

    /// What was counted so far, as text for a collector.
    pub async fn text(&self) -> Result<String, Error> {
        self.kernel.run(Kernel::text).await?
    }

    /// Removes what counts from this node; fine if there is nothing.
    pub async fn remove() -> Result<(), Error> {
        let remove = || {
            let mut batch = Batch::new();
            batch.add_table(TABLE); // Deleting a table needs it to exist.
            batch.delete_table(TABLE);
            if host_has_ipv6() {
                batch.turn_to(Family::Ipv6);
                batch.add_table(TABLE);
                batch.delete_table(TABLE);
            }
            Ok(((), NftChannel::open()?.commit_any(&batch)?))
        };
        KernelThread::start("skep-accounting", remove).await.map(drop)
    }
}

impl Kernel {
    fn learn(&mut self, table: &MeshTable, now: Timestamp) -> Result<(), Error> {
        let stale = self.owners.learn(table, now);
        if stale.is_empty() {
            return Ok(());
        }
        self.relayed.forget(&stale);
        for (family, channel) in self.channels.iter_mut().enumerate() {
            let mut batch = Batch::of(if family == 0 { Family::Ipv4 } else { Family::Ipv6 });
            for set in SETS {
                let present = channel.counts(TABLE, set)?;
                let stale = stale.iter().filter_map(|key| key.to_bytes().into_iter().nth(family));
                let counted = stale.filter(|key| present.iter().any(|count| count.key == *key));
                let elements: Vec<Element> = counted.map(Element::key).collect();
                batch.delete_elements(TABLE, set, &elements);
            }
            if !batch.is_empty() {
                channel.commit_any(&batch)?;
            }
        }
        Ok(())
    }

    fn text(&mut self) -> Result<String, Error> {
        let mut all: BTreeMap<Key, Counts> = self.relayed.counts();
        for (channel, set) in
            (0..self.channels.len()).flat_map(|channel| SETS.map(|set| (channel, set)))
        {
            for count in self.channels[channel].counts(TABLE, set)? {
                let Some(key) = Key::from_bytes(&count.key) else { continue };
                let counts = all.entry(key).or_default();
                match set {
                    CONNECTIONS => counts.connections += count.packets,
                    FAILURES => counts.failures += count.packets,
                    REQUESTS => counts.received_bytes += count.bytes,
                    _ => counts.sent_bytes += count.bytes,
                }
            }
        }
        Ok(self.owners.render(&all))
    }
}

/// The table of the pool's family, without a count.
fn lay_out(batch: &mut Batch, pool: IpNet) {
    let is_ipv4 = pool.addr().is_ipv4();
    let (address_type, address_length) = if is_ipv4 { (TYPE_IPV4, 4) } else { (TYPE_IPV6, 16) };
    batch.add_table(TABLE);
    batch.delete_table(TABLE);
    batch.add_table(TABLE);
    let kind = SetKind {
        key_type: address_type << 18 | KEY_REST_TYPE,
        key_length: address_length + KEY_REST_LENGTH,
        is_host_order: false,
        value: Value::None,
    };
    for set in SETS {
        batch.add_dynamic_set(TABLE, set, &kind, KEYS_MAX);
    }
    let original = rule::connection_is_original().to_vec();
    let reply = rule::connection_is_reply().to_vec();
    let published = [
        rule::connection_is_published(true).to_vec(),
        rule::connection_is_answered_from(pool).to_vec(),
    ]
    .concat();
    let mut chain = |name, kind, number, priority, rules: &[(Vec<Expression>, &str)]| {
        batch.add_chain(
            TABLE,
            name,
            Some(&Hook { kind, number, priority, drops_by_default: false }),
        );
        for (matches, set) in rules {
            let count = rule::count_connection_in(is_ipv4, set).to_vec();
            batch.add_rule(TABLE, name, &[matches.clone(), count].concat(), set);
        }
    };
    let refused = [rule::connection_is_refused().to_vec(), reply.clone(), published.clone()];
    let unreachable = [rule::connection_is_unreachable(is_ipv4), published.clone()];
    let answers = [reply, published.clone()].concat();
    let requests = [original, published.clone()].concat();
    let responses = [(refused.concat(), FAILURES), (answers, ANSWERS)];
    chain("answers", "filter", PREROUTING, -140, &responses);
    chain(
        "requests",
        "filter",
        POSTROUTING,
        98,
        &[(unreachable.concat(), FAILURES), (requests, REQUESTS)],
    );
    chain("connections", "nat", POSTROUTING, 99, &[(published, CONNECTIONS)]);
}
