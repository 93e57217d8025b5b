//! The rules of virtual addresses in one container: observes them, and brings them to what is wanted.
//!
//! ```text
//! output -100  new: ip daddr  ──@vips4──┐► chain vip-10.0.1.2: dnat to numgen inc mod N map {...},
//!              new: ip6 daddr ──@vips6──┘                      dnat to the first of them
//! ```
//!
//! The second rule is for packets that are in the chain while it is replaced, as in that of a published port.
//!
//! Addresses alone are translated, so that any protocol and port works, echo too. An address without
//! backends refuses at once. The table is the container's own matter: what it sends is translated
//! before it leaves, and nothing on the way knows virtual addresses.
//!
//! A rule and the anonymous map it uses never change in the kernel; they can only be replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use skep_worker_core::network::{VipOp, Vips, in_turn};

use crate::net::Error;
use crate::net::nft::expression as rule;
use crate::net::nft::{
    self, Batch, CommitError, Element, ElementRecord, Expression, Family, Hook, NftChannel,
    RuleRecord, SetKind, Value,
};

const TABLE: &str = "skep-vip";
const OUTPUT_CHAIN: &str = "output";
const OUTPUT: Hook = Hook { kind: "nat", number: 3, priority: -100, drops_by_default: false };
/// The maps from an address to its chain, of IPv4 and IPv6.
const MAPS: [&str; 2] = ["vips4", "vips6"];
/// Changes with the rules of the base chain: a table of another program version is built again.
const OUTPUT_COMMENTS: [&str; 2] = ["virtual IPv4 addresses [1]", "virtual IPv6 addresses [1]"];
const CHAIN: &str = "vip-";
/// The comment of the rule for packets that find an address's map out of force.
const MISSED: &str = "a healthy task, when a turn is missed";

// Data types as `nft` numbers them (`include/datatype.h` of nftables).
const TYPE_INTEGER: u32 = 4;
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;

const TCP: u8 = 6;

/// How often a batch is planned anew because another program was faster. Nobody else has rights in a
/// container, but that its names are redirected there once.
const ATTEMPTS: u32 = 10;

/// The rules of virtual addresses in one container.
#[derive(Debug)]
pub(super) struct Rules {
    channel: NftChannel,
    /// Whose container it is: decides where turns begin.
    task_id: u128,
    /// The last observation, and the generation that it is true for; the addresses are `None` where the
    /// table is missing or damaged.
    observed: Option<(u32, Option<Vips>)>,
}

impl Rules {
    /// Opens the rules in the namespace of the calling thread.
    pub(super) fn open(task_id: u128) -> Result<Self, Error> {
        Ok(Self { channel: NftChannel::open_of(Family::Inet)?, task_id, observed: None })
    }

    /// Brings the rules to those of `wanted`.
    pub(super) fn converge(&mut self, wanted: &Vips) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let generation = self.channel.generation()?;
            let present = match self.observed.take() {
                Some((known, present)) if known == generation => present,
                _ => self.observe()?,
            };
            let batch = self.plan(present.as_ref(), wanted);
            if batch.is_empty() {
                self.observed = Some((generation, present));
                return Ok(());
            }
            match self.channel.commit(&batch, Some(generation)) {
                Ok(()) => {
                    // Another program's commit in between would have added one more.
                    if self.channel.generation()? == generation.wrapping_add(1) {
                        self.observed = Some((generation.wrapping_add(1), Some(wanted.clone())));
                    }
                    return Ok(());
                }
                Err(CommitError::Outdated) => {}
                Err(CommitError::Refused(error)) => return Err(error),
            }
        }
        Err(Error::Contended { attempts: ATTEMPTS })
    }

    fn plan(&self, present: Option<&Vips>, wanted: &Vips) -> Batch {
        let mut batch = Batch::of(Family::Inet);
        let nothing = Vips::default();
        let present = present.unwrap_or_else(|| {
            build(&mut batch);
            &nothing
        });
        for op in present.diff(wanted) {
            tracing::debug!(%op, "container rules");
            change(&op, self.task_id, &mut batch);
        }
        batch
    }

    /// What the kernel has of ours. `None` means that it is not as we build it.
    fn observe(&mut self) -> Result<Option<Vips>, Error> {
        let chains = self.channel.chains()?.into_iter().filter(|chain| chain.table == TABLE);
        let mut chains: BTreeMap<String, Option<(u32, i32)>> =
            chains.map(|chain| (chain.name, chain.hook)).collect();
        let sets = self.channel.sets(TABLE)?.into_iter().filter(|set| !set.is_anonymous);
        let sets: BTreeSet<String> = sets.map(|set| set.name).collect();
        let hook = chains.remove(OUTPUT_CHAIN).flatten();
        if hook != Some((OUTPUT.number, OUTPUT.priority))
            || sets != BTreeSet::from(MAPS.map(str::to_owned))
        {
            return Ok(None);
        }
        let mut rules: BTreeMap<String, Vec<RuleRecord>> = BTreeMap::new();
        for rule in self.channel.rules(TABLE, None)? {
            rules.entry(rule.chain.clone()).or_default().push(rule);
        }
        let base = rules.remove(OUTPUT_CHAIN).unwrap_or_default();
        if !base.iter().map(|rule| rule.comment.as_deref()).eq(OUTPUT_COMMENTS.map(Some)) {
            return Ok(None);
        }
        let mut vips = Vips::default();
        for map in MAPS {
            for element in self.channel.elements(TABLE, map)? {
                let Some(vip) = read_address(&element.key) else { return Ok(None) };
                let name = chain_name(vip);
                let is_ours = element.chain.as_ref() == Some(&name);
                if !is_ours || chains.remove(&name).is_none() {
                    return Ok(None);
                }
                let rules = rules.remove(&name).unwrap_or_default();
                let Some(backends) = self.read_backends(vip, &rules)? else { return Ok(None) };
                vips.0.insert(vip, backends.into());
            }
        }
        Ok(chains.is_empty().then_some(vips))
    }

    fn read_backends(
        &mut self,
        vip: IpAddr,
        rules: &[RuleRecord],
    ) -> Result<Option<Vec<IpAddr>>, Error> {
        const NFTA_LOOKUP_SET: u16 = 1;
        const NFTA_NG_MODULUS: u16 = 2;
        let names = |rule: &RuleRecord| -> Vec<String> {
            rule.expressions.iter().map(|(name, _)| name.clone()).collect()
        };
        match rules {
            [reset, unreachable]
                if names(reset) == ["meta", "cmp", "reject"]
                    && names(unreachable) == ["reject"] =>
            {
                Ok(Some(Vec::new()))
            }
            [turns, missed]
                if names(turns) == ["numgen", "lookup", "nat"]
                    && missed.comment.as_deref() == Some(MISSED) =>
            {
                let lookup = turns.expression("lookup").unwrap_or_default();
                let map = nft::find(lookup, NFTA_LOOKUP_SET).and_then(nft::text);
                let numgen = turns.expression("numgen").unwrap_or_default();
                let modulus = nft::find(numgen, NFTA_NG_MODULUS).and_then(nft::be32);
                let (Some(map), Some(modulus)) = (map, modulus) else { return Ok(None) };
                let backends = read_turns(self.channel.elements(TABLE, map)?);
                let is_right = |list: &Vec<IpAddr>| {
                    usize::try_from(modulus) == Ok(list.len())
                        && list.iter().all(|address| address.is_ipv4() == vip.is_ipv4())
                };
                Ok(backends.filter(is_right))
            }
            _ => Ok(None),
        }
    }
}

/// Adds the table with what is always there.
fn build(batch: &mut Batch) {
    // Deleting a table needs it to exist; adding one that exists is fine.
    batch.add_table(TABLE);
    batch.delete_table(TABLE);
    batch.add_table(TABLE);
    let kinds = [(TYPE_IPV4, 4), (TYPE_IPV6, 16)];
    for (map, (key_type, key_length)) in MAPS.into_iter().zip(kinds) {
        let kind = SetKind { key_type, key_length, is_host_order: false, value: Value::Verdict };
        batch.add_set(TABLE, map, &kind);
    }
    batch.add_chain(TABLE, OUTPUT_CHAIN, Some(&OUTPUT));
    for ((map, comment), is_ipv4) in MAPS.into_iter().zip(OUTPUT_COMMENTS).zip([true, false]) {
        // The kernel keeps track of connections only where a rule asks for it, and without that passes
        // by this chain: no rule is left that does where every address refuses.
        let parts = [
            rule::connection_is_new().to_vec(),
            rule::destination_to_verdict(is_ipv4, map).to_vec(),
        ];
        batch.add_rule(TABLE, OUTPUT_CHAIN, &parts.concat(), comment);
    }
}

fn change(op: &VipOp, task_id: u128, batch: &mut Batch) {
    match op {
        VipOp::Add(vip, backends) => {
            let chain = chain_name(*vip);
            batch.add_chain(TABLE, &chain, None);
            balance(*vip, &in_turn(backends, task_id), batch);
            batch.add_elements(TABLE, map_of(*vip), &[Element::goto(bytes(*vip), &chain)]);
        }
        VipOp::Replace(vip, backends) => {
            batch.flush_chain(TABLE, &chain_name(*vip));
            balance(*vip, &in_turn(backends, task_id), batch);
        }
        VipOp::Delete(vip) => {
            batch.delete_elements(TABLE, map_of(*vip), &[Element::key(bytes(*vip))]);
            batch.flush_chain(TABLE, &chain_name(*vip));
            batch.delete_chain(TABLE, &chain_name(*vip));
        }
    }
}

/// Adds the rules of an address's chain.
fn balance(vip: IpAddr, backends: &[IpAddr], batch: &mut Batch) {
    let chain = chain_name(vip);
    if backends.is_empty() {
        let reset: Vec<Expression> =
            rule::transport_protocol(TCP).into_iter().chain([rule::reject_with_reset()]).collect();
        batch.add_rule(TABLE, &chain, &reset, "no healthy task");
        batch.add_rule(TABLE, &chain, &[rule::reject_as_unreachable()], "no healthy task");
        return;
    }
    let (kind, length) = if vip.is_ipv4() { (TYPE_IPV4, 4) } else { (TYPE_IPV6, 16) };
    let kind = SetKind {
        key_type: TYPE_INTEGER,
        key_length: 4,
        is_host_order: true,
        value: Value::Data { kind, length, is_host_order: false },
    };
    let element =
        |(turn, address): (u32, &IpAddr)| Element::data(turn.to_ne_bytes(), &bytes(*address));
    let elements: Vec<Element> = (0u32..).zip(backends).map(element).collect();
    let (map, id) = batch.add_anonymous_map(TABLE, &kind, &elements);
    let modulus = u32::try_from(backends.len()).expect("a service has under 2^32 backends");
    let turns = rule::round_robin_addresses(vip.is_ipv4(), modulus, map, id);
    batch.add_rule(TABLE, &chain, &turns, "healthy tasks, in turn");
    batch.add_rule(TABLE, &chain, &rule::translate_to_address(backends[0]), MISSED);
}

fn map_of(vip: IpAddr) -> &'static str {
    MAPS[usize::from(vip.is_ipv6())]
}

/// `nft` reads back no name with a colon in it.
fn chain_name(vip: IpAddr) -> String {
    match vip {
        IpAddr::V4(vip) => format!("{CHAIN}{vip}"),
        IpAddr::V6(vip) => format!("{CHAIN}{:032x}", u128::from(vip)),
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

/// The backends in ascending order, if their turns are 0, 1, 2, …
fn read_turns(elements: Vec<ElementRecord>) -> Option<Vec<IpAddr>> {
    let mut turns = BTreeMap::new();
    for element in elements {
        let turn = u32::from_ne_bytes(*element.key.first_chunk()?);
        turns.insert(turn, read_address(&element.data?)?);
    }
    let is_gapless = turns.keys().copied().eq((0u32..).take(turns.len()));
    let mut backends: Vec<IpAddr> = turns.into_values().collect();
    backends.sort_unstable();
    is_gapless.then_some(backends)
}
