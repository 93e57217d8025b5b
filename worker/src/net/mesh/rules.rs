//! The nftables rules of the mesh: observes them, and brings them to what is wanted.
//!
//! The rules are read back from the kernel whenever its generation number is not the one that our
//! last commit left, that is, whenever any program changed any rule. A batch names the generation
//! it was planned on, so nothing is ever changed on the ground of an outdated observation.
//!
//! What is found damaged (a chain, rule or set of ours that is missing or has been changed) is
//! built again as a whole, in one atomic batch. Established connections do not notice: their
//! translation lives in conntrack.

use std::collections::{BTreeMap, BTreeSet};

use skep_worker_core::mesh::{Endpoint, Mac, Objects, PortKey, Protocol};

use super::layout::{self, Layout, NODES, PORTS, Rule, SENDERS, WAYS_BACK, ZONES};
use super::options::TABLE;
use crate::net::Error;
use crate::net::nft::{
    self, Batch, ChainRecord, CommitError, ElementRecord, NftChannel, RuleRecord,
};

/// Where iptables-nft keeps the rules for forwarded packets.
const HOST_TABLE: &str = "filter";
const HOST_CHAIN: &str = "FORWARD";
const HOST_HOOK: u32 = 2;

/// How often a batch is planned anew because another program was faster. Such programs (a
/// firewall that starts, a Kubernetes node) write in bursts of a few commits.
const ATTEMPTS: u32 = 50;

/// What was read back from the kernel.
#[derive(Debug, Clone, Default)]
struct Observed {
    /// Whether there is a table of ours, however damaged.
    has_table: bool,
    /// The part of the objects that are rules; `None` if the table is missing or damaged.
    objects: Option<Objects>,
    /// The host's chain for forwarded packets, if there is one.
    host_chain: Option<HostChain>,
}

#[derive(Debug, Clone, Default)]
struct HostChain {
    /// Comments and handles of the rules in it that are ours.
    ours: Vec<(String, u64)>,
}

/// Objects of IPv4, and of IPv6 where the node takes part in that.
pub(super) type Wanted<'a> = (&'a Objects, Option<&'a Objects>);

/// The rules of this node.
#[derive(Debug)]
pub(super) struct Rules {
    ipv4: Table,
    ipv6: Table,
    /// The last observation of both, and the generation that it is true for.
    observed: Option<(u32, [Observed; 2])>,
}

/// The rules of one IP version.
#[derive(Debug)]
struct Table {
    channel: NftChannel,
    layout: Layout,
}

impl Rules {
    /// Opens the kernel's rules in the namespace of the calling thread.
    pub(super) fn open(ipv4: Layout, ipv6: Layout) -> Result<Self, Error> {
        Ok(Self { ipv4: Table::open(ipv4)?, ipv6: Table::open(ipv6)?, observed: None })
    }

    /// What the kernel has of ours; nothing if the table is missing or damaged.
    pub(super) fn observe(&mut self) -> Result<(Objects, Option<Objects>), Error> {
        let (generation, observed) = self.current()?;
        let [ipv4, ipv6] = observed.each_ref().map(|observed| observed.objects.clone());
        self.observed = Some((generation, observed));
        Ok((ipv4.unwrap_or_default(), ipv6))
    }

    /// Brings the rules to those of `wanted`, and the host's forwarding chains to let them work.
    pub(super) fn converge(&mut self, wanted: Wanted<'_>) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let (generation, observed) = self.current()?;
            let mut batch = Batch::new();
            let wanted_each = [Some(wanted.0), wanted.1];
            let tables = [&self.ipv4, &self.ipv6];
            for ((table, observed), wanted) in tables.into_iter().zip(&observed).zip(wanted_each) {
                table.plan(observed, wanted, &mut batch);
            }
            if batch.is_empty() {
                if self.ipv4.channel.generation()? == generation {
                    self.observed = Some((generation, observed));
                    return Ok(());
                }
                continue;
            }
            match self.ipv4.channel.commit(&batch, Some(generation)) {
                Ok(()) => return self.remember(generation, &observed, wanted),
                Err(CommitError::Outdated) => {}
                Err(CommitError::Refused(error)) => return Err(error),
            }
        }
        Err(Error::Contended { attempts: ATTEMPTS })
    }

    /// Removes the tables and the rules of ours in the host's chains.
    pub(super) fn remove(&mut self) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            self.observed = None;
            let (generation, observed) = self.current()?;
            let mut batch = Batch::new();
            for (table, observed) in [&self.ipv4, &self.ipv6].into_iter().zip(&observed) {
                table.plan(observed, None, &mut batch);
            }
            if batch.is_empty() {
                return Ok(());
            }
            match self.ipv4.channel.commit(&batch, Some(generation)) {
                Ok(()) => return Ok(()),
                Err(CommitError::Outdated) => {}
                Err(CommitError::Refused(error)) => return Err(error),
            }
        }
        Err(Error::Contended { attempts: ATTEMPTS })
    }

    /// After a commit of ours the kernel has what was wanted, and its generation grew by one.
    fn remember(
        &mut self,
        generation: u32,
        [before, before6]: &[Observed; 2],
        (ipv4, ipv6): Wanted<'_>,
    ) -> Result<(), Error> {
        let after = self.ipv4.channel.generation()?;
        if after == generation.wrapping_add(1) {
            let ipv4 = self.ipv4.remember(before, Some(ipv4))?;
            let observed = [ipv4, self.ipv6.remember(before6, ipv6)?];
            self.observed = Some((after, observed));
        }
        Ok(())
    }

    /// Takes the last observation, or makes another where it is no longer true. Whoever changes nothing
    /// puts it back.
    fn current(&mut self) -> Result<(u32, [Observed; 2]), Error> {
        let generation = self.ipv4.channel.generation()?;
        match self.observed.take() {
            Some((known, observed)) if known == generation => Ok((generation, observed)),
            _ => Ok((generation, [self.ipv4.observe()?, self.ipv6.observe()?])),
        }
    }
}

impl Table {
    fn open(layout: Layout) -> Result<Self, Error> {
        Ok(Self { channel: NftChannel::open_of(layout.family())?, layout })
    }

    /// Adds what leads from what is there to what is wanted; `None` wants no table.
    fn plan(&self, observed: &Observed, wanted: Option<&Objects>, batch: &mut Batch) {
        batch.turn_to(self.layout.family());
        let Some(wanted) = wanted else {
            if observed.has_table {
                batch.delete_table(TABLE);
            }
            return forget_host_rules(observed, batch);
        };
        let nothing = Objects::default();
        let present = observed.objects.as_ref().unwrap_or_else(|| {
            self.layout.build(batch);
            &nothing
        });
        let ops = present.diff(wanted);
        for op in ops.iter().filter(|op| op.is_rules()) {
            tracing::debug!(%op, "mesh rules");
            self.layout.change(op, batch);
        }
        plan_host_rules(observed, batch);
    }

    /// What is there after a commit for `wanted`, before which there was `before`.
    fn remember(&mut self, before: &Observed, wanted: Option<&Objects>) -> Result<Observed, Error> {
        let objects = wanted.map(|wanted| Objects {
            node_addresses: wanted.node_addresses.clone(),
            peers: wanted.peers.clone(),
            ports: wanted.ports.clone(),
            ..Objects::default()
        });
        let host_chain = match &before.host_chain {
            Some(chain) if wanted.is_none() || !has_host_rules(chain) => {
                self.observe_host_chain()?
            }
            unchanged => unchanged.clone(),
        };
        Ok(Observed { has_table: wanted.is_some(), objects, host_chain })
    }

    fn observe(&mut self) -> Result<Observed, Error> {
        let chains: BTreeMap<String, ChainRecord> = self
            .channel
            .chains()?
            .into_iter()
            .filter(|chain| chain.table == TABLE)
            .map(|chain| (chain.name.clone(), chain))
            .collect();
        let has_table = !chains.is_empty();
        let objects = if has_table { self.observe_table(chains)? } else { None };
        Ok(Observed { has_table, objects, host_chain: self.observe_host_chain()? })
    }

    fn observe_host_chain(&mut self) -> Result<Option<HostChain>, Error> {
        let chains = self.channel.chains()?;
        let is_host_chain = |chain: &ChainRecord| {
            chain.table == HOST_TABLE
                && chain.name == HOST_CHAIN
                && chain.hook.is_some_and(|(hook, _)| hook == HOST_HOOK)
        };
        if !chains.iter().any(is_host_chain) {
            return Ok(None);
        }
        let rules = self.channel.rules(HOST_TABLE, Some(HOST_CHAIN))?;
        let ours = rules.into_iter().filter_map(|rule| {
            let comment = rule.comment.filter(|comment| comment.starts_with("skep mesh ["))?;
            Some((comment, rule.handle))
        });
        Ok(Some(HostChain { ours: ours.collect() }))
    }

    fn observe_table(
        &mut self,
        chains: BTreeMap<String, ChainRecord>,
    ) -> Result<Option<Objects>, Error> {
        let mut rules: BTreeMap<String, Vec<RuleRecord>> = BTreeMap::new();
        for rule in self.channel.rules(TABLE, None)? {
            rules.entry(rule.chain.clone()).or_default().push(rule);
        }
        let named: BTreeSet<String> = self
            .channel
            .sets(TABLE)?
            .into_iter()
            .filter(|set| !set.is_anonymous)
            .map(|set| set.name)
            .collect();
        let expected = self.layout.set_names();
        if !named.iter().map(String::as_str).eq(expected) {
            tracing::warn!(
                table = TABLE,
                "sets of the mesh were changed; building its rules again"
            );
            return Ok(None);
        }
        let mut reader = Reader { channel: &mut self.channel, layout: &self.layout, chains, rules };
        let objects = reader.read()?;
        if objects.is_none() {
            tracing::warn!(table = TABLE, "rules of the mesh were changed; building them again");
        }
        Ok(objects)
    }
}

fn forget_host_rules(observed: &Observed, batch: &mut Batch) {
    for (_, handle) in observed.host_chain.iter().flat_map(|chain| &chain.ours) {
        batch.delete_rule(HOST_TABLE, HOST_CHAIN, *handle);
    }
}

/// Whether exactly our rules are in the host's chain.
fn has_host_rules(chain: &HostChain) -> bool {
    let rules = Layout::accept_rules();
    let mut wanted: Vec<&str> = rules.iter().map(|rule| rule.comment.as_str()).collect();
    let mut present: Vec<&str> = chain.ours.iter().map(|(comment, _)| comment.as_str()).collect();
    wanted.sort_unstable();
    present.sort_unstable();
    wanted == present
}

fn plan_host_rules(observed: &Observed, batch: &mut Batch) {
    if observed.host_chain.as_ref().is_none_or(has_host_rules) {
        return;
    }
    forget_host_rules(observed, batch);
    for Rule { expressions, comment } in Layout::accept_rules().iter().rev() {
        batch.insert_rule(HOST_TABLE, HOST_CHAIN, expressions, comment);
    }
}

/// Reads the table back into objects. `None` means that it is not as we build it.
struct Reader<'a> {
    channel: &'a mut NftChannel,
    layout: &'a Layout,
    /// Chains that no part of the table has accounted for yet.
    chains: BTreeMap<String, ChainRecord>,
    rules: BTreeMap<String, Vec<RuleRecord>>,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<Option<Objects>, Error> {
        if !self.has_base_chains() {
            return Ok(None);
        }
        let mut objects = Objects::default();
        for element in self.channel.elements(TABLE, NODES)? {
            let Some(address) = layout::read_address(&element.key) else { return Ok(None) };
            objects.node_addresses.insert(address);
        }
        let Some(peers) = self.read_peers()? else { return Ok(None) };
        objects.peers = peers;
        for element in self.channel.elements(TABLE, PORTS)? {
            let Some((key, backends)) = self.read_port(&element)? else { return Ok(None) };
            objects.ports.insert(key, backends);
        }
        Ok(self.chains.is_empty().then_some(objects))
    }

    fn has_base_chains(&mut self) -> bool {
        self.layout.base_chains().iter().all(|chain| {
            let hook = self.chains.remove(chain.name).and_then(|record| record.hook);
            let comments = chain.rules.iter().map(|rule| Some(rule.comment.as_str()));
            hook == Some((chain.hook.number, chain.hook.priority))
                && comments.eq(self.comments(chain.name))
        })
    }

    fn comments(&self, chain: &str) -> impl Iterator<Item = Option<&str>> {
        self.rules.get(chain).into_iter().flatten().map(|rule| rule.comment.as_deref())
    }

    /// The peers, if each has all of its chains and no key leads anywhere else.
    fn read_peers(&mut self) -> Result<Option<BTreeMap<u16, Mac>>, Error> {
        let mut maps = BTreeMap::new();
        for map in [ZONES, SENDERS, WAYS_BACK] {
            for element in self.channel.elements(TABLE, map)? {
                maps.insert((map, element.key), element.chain.unwrap_or_default());
            }
        }
        let zones = maps.iter().filter(|((map, _), _)| *map == ZONES);
        let peers: Option<BTreeMap<u16, Mac>> = zones
            .map(|((_, key), chain)| {
                let mac = key.first_chunk::<6>().copied().map(Mac)?;
                Some((layout::zone_chain_number(chain)?, mac))
            })
            .collect();
        let Some(peers) = peers else { return Ok(None) };
        for (number, mac) in &peers {
            let chains = self.layout.peer_chains(*number);
            for ((chain, rule), key) in chains.iter().zip(self.layout.peer_keys(*number, *mac)) {
                let leads_to = maps.remove(&key);
                if leads_to.as_ref() != Some(chain) || !self.has_chain(chain, rule) {
                    return Ok(None);
                }
            }
        }
        Ok(maps.is_empty().then_some(peers))
    }

    /// Whether the chain exists and holds `rule` alone.
    fn has_chain(&mut self, chain: &str, rule: &Rule) -> bool {
        self.chains.remove(chain).is_some()
            && self.comments(chain).eq([Some(rule.comment.as_str())])
    }

    fn read_port(
        &mut self,
        element: &ElementRecord,
    ) -> Result<Option<(PortKey, Vec<Endpoint>)>, Error> {
        let Some([protocol, _, _, _, high, low, _, _]) = element.key.first_chunk::<8>() else {
            return Ok(None);
        };
        let Some(protocol) = Protocol::from_number(*protocol) else { return Ok(None) };
        let key = PortKey { protocol, port: u16::from_be_bytes([*high, *low]) };
        let chain = layout::port_chain(key);
        if element.chain.as_deref() != Some(&chain) || self.chains.remove(&chain).is_none() {
            return Ok(None);
        }
        let rules = self.rules.get(&chain).map(Vec::as_slice);
        let Some([rule, rest @ ..]) = rules else { return Ok(None) };
        let names: Vec<&str> = rule.expressions.iter().map(|(name, _)| name.as_str()).collect();
        let rest: Vec<Option<&str>> = rest.iter().map(|rule| rule.comment.as_deref()).collect();
        let backends = match (names.as_slice(), rest.as_slice()) {
            (["meta", "cmp", "reject"], []) => Some(Vec::new()),
            (["meta", "cmp", "numgen", "lookup", "nat"], [Some(layout::MISSED)]) => {
                const NFTA_LOOKUP_SET: u16 = 1;
                const NFTA_NG_MODULUS: u16 = 2;
                let lookup = rule.expression("lookup").unwrap_or_default();
                let map = nft::find(lookup, NFTA_LOOKUP_SET).and_then(nft::text);
                let numgen = rule.expression("numgen").unwrap_or_default();
                let modulus = nft::find(numgen, NFTA_NG_MODULUS).and_then(nft::be32);
                let (Some(map), Some(modulus)) = (map, modulus) else { return Ok(None) };
                let backends = read_backends(self.channel.elements(TABLE, map)?);
                backends.filter(|list| usize::try_from(modulus) == Ok(list.len()))
            }
            _ => None,
        };
        Ok(backends.map(|backends| (key, backends)))
    }
}

/// The backends of a port's map in the order of their turns, if these are 0, 1, 2, …
fn read_backends(elements: Vec<ElementRecord>) -> Option<Vec<Endpoint>> {
    let mut turns = BTreeMap::new();
    for element in elements {
        let turn = u32::from_ne_bytes(*element.key.first_chunk()?);
        turns.insert(turn, layout::read_endpoint(&element.data?)?);
    }
    let is_gapless = turns.keys().copied().eq((0u32..).take(turns.len()));
    is_gapless.then(|| turns.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_with_a_gap_are_no_backends() {
        let element = |turn: u32, last: u8| ElementRecord {
            key: turn.to_ne_bytes().to_vec(),
            data: Some(vec![10, 0, 0, last, 0, 80, 0, 0]),
            chain: None,
        };
        let read = read_backends(vec![element(1, 9), element(0, 8)]).unwrap();
        let texts: Vec<String> = read.iter().map(Endpoint::to_string).collect();
        assert_eq!(texts, ["10.0.0.8:80", "10.0.0.9:80"]);
        assert_eq!(read_backends(vec![element(0, 8), element(2, 9)]), None);
        assert_eq!(read_backends(Vec::new()), Some(Vec::new()));
    }
}
