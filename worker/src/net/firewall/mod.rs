//! Which rules of this node's nftables drop packets of the tunnels, as far as reading them can tell.
//!
//! A packet is led through each chain of its direction as the kernel would lead it: rule by rule, with
//! jumps, sets and maps. What cannot be known of it (marks, limits, matches of iptables) leaves a rule
//! undecided. Such a rule is taken for what it does only where it names the packet's port: a drop is named
//! then, and what may accept the port ends the search in its chain, so that nothing innocent is named. A target
//! of iptables that is not known here may drop what it is given, which is said so.
//! iptables-nft keeps its rules there, too; those of iptables-legacy cannot be read.
//!
//! # Reading order
//!
//! `packet` (what is known of a packet), `rule` (whether a rule is about it, and what it does then), `set`
//! (sets and maps), then the walk here. All of it is pure but [`Ruleset::read`].

mod packet;
mod rule;
mod set;

use std::collections::BTreeMap;

pub(super) use self::packet::{Interface, Packet};
use self::rule::{Effect, Weight, weigh};
use self::set::Set;
use super::Error;
use super::nft::{ChainRecord, Family, NftChannel, RuleRecord};

const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// The kernel refuses rules that jump deeper than this (`NFT_JUMP_STACK_SIZE`).
const JUMPS_MAX: u32 = 16;

/// The tables of a network namespace that packets of IPv4 pass, but for those of skep.
#[derive(Debug, Default)]
pub(super) struct Ruleset(Vec<Table>);

#[derive(Debug, Default)]
struct Table {
    /// As in `nft list table`: family and name.
    name: String,
    chains: Vec<ChainRecord>,
    /// In their order.
    rules: Vec<RuleRecord>,
    /// Those that rules look something up in.
    sets: BTreeMap<String, Set>,
}

/// What becomes of a packet in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    /// No rule has decided.
    Undecided,
    Accepted,
    /// Perhaps it is accepted: what follows is not to blame for sure.
    Doubtful,
    /// Perhaps it is dropped, as this says; what follows is not to blame for sure.
    PerhapsDropped {
        by: String,
    },
    /// A rule drops it, which names its port or not.
    Dropped {
        by: String,
        names_port: bool,
    },
}

impl Ruleset {
    /// Reads the tables of the calling thread's network namespace.
    pub(super) fn read() -> Result<Self, Error> {
        let mut tables = Vec::new();
        for (family, word) in [(Family::Ipv4, "ip"), (Family::Inet, "inet")] {
            let mut channel = NftChannel::open_of(family)?;
            let mut chains: BTreeMap<String, Vec<ChainRecord>> = BTreeMap::new();
            for chain in channel.chains()? {
                chains.entry(chain.table.clone()).or_default().push(chain);
            }
            for (name, chains) in chains.into_iter().filter(|(name, _)| !name.starts_with("skep-"))
            {
                let rules = channel.rules(&name, None)?;
                let mut sets = BTreeMap::new();
                for record in channel.sets(&name)? {
                    if rules.iter().any(|rule| rule::looks_up(rule, &record.name)) {
                        let members = channel.members(&name, &record.name)?;
                        sets.insert(record.name, Set::new(record.has_intervals, members));
                    }
                }
                tables.push(Table { name: format!("{word} {name}"), chains, rules, sets });
            }
        }
        Ok(Self(tables))
    }

    /// What drops such packets, a phrase each. A packet must pass every chain of its direction.
    pub(super) fn obstacles(&self, packet: &Packet) -> Vec<String> {
        let hooks = if packet.is_incoming { [PREROUTING, INPUT] } else { [OUTPUT, POSTROUTING] };
        let mut found = Vec::new();
        for table in &self.0 {
            for hook in hooks {
                let is_of = |chain: &&ChainRecord| chain.hook.is_some_and(|(of, _)| of == hook);
                found.extend(table.chains.iter().filter(is_of).filter_map(|chain| {
                    match table.walk(&chain.name, packet, 0) {
                        Fate::Dropped { by, .. } | Fate::PerhapsDropped { by } => Some(by),
                        Fate::Undecided if chain.drops_by_default => Some(format!(
                            "chain {} in table {} has the policy drop, and no rule there accepts UDP {}",
                            chain.name, table.name, packet.port
                        )),
                        _ => None,
                    }
                }));
            }
        }
        found
    }
}

impl Table {
    fn walk(&self, chain: &str, packet: &Packet, n_jumps: u32) -> Fate {
        if n_jumps > JUMPS_MAX {
            return Fate::Doubtful;
        }
        for rule in self.rules.iter().filter(|rule| rule.chain == chain) {
            let Weight { is_certain, names_port, effect } = weigh(rule, packet, &self.sets);
            let (fate, returns) = match effect {
                Effect::None => continue,
                Effect::Returns if is_certain => return Fate::Undecided,
                Effect::Returns => continue,
                Effect::Accepts => (Fate::Accepted, false),
                Effect::Drops => {
                    let by = format!(
                        "a rule of chain {chain} in table {} (handle {}) drops UDP {}",
                        self.name, rule.handle, packet.port
                    );
                    (Fate::Dropped { by, names_port }, false)
                }
                Effect::Decides(target) => {
                    let by = format!(
                        "UDP {} may be dropped by target {target} of a rule of chain {chain} in table {} (handle {})",
                        packet.port, self.name, rule.handle
                    );
                    (Fate::PerhapsDropped { by }, false)
                }
                Effect::Jumps(to) => (self.walk(&to, packet, n_jumps + 1), false),
                Effect::GoesTo(to) => (self.walk(&to, packet, n_jumps + 1), is_certain),
            };
            let blames_port = names_port || matches!(fate, Fate::Dropped { names_port: true, .. });
            match fate {
                Fate::Undecided if returns => return Fate::Undecided,
                Fate::Undecided => {}
                fate if is_certain => return fate,
                Fate::Dropped { by, .. } if blames_port => {
                    return Fate::Dropped { by, names_port: true };
                }
                Fate::Accepted | Fate::Doubtful if names_port => return Fate::Doubtful,
                Fate::PerhapsDropped { by } if names_port => return Fate::PerhapsDropped { by },
                Fate::Doubtful => return Fate::Doubtful,
                Fate::PerhapsDropped { .. } | Fate::Accepted | Fate::Dropped { .. } => {}
            }
        }
        Fate::Undecided
    }
}

#[cfg(test)]
mod tests;
