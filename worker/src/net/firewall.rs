//! Which rules of this node's nftables drop packets of the tunnel, as far as reading them can tell.
//!
//! Only what is plain is found: a rule that names the port, by itself or in a range, and drops, and a
//! chain that drops what no rule decides on in a table where no rule accepts the port. A rule that looks
//! ports up in a set may accept it, and is not said to drop it: nothing innocent is named. iptables-nft
//! keeps its rules there, too; those of iptables-legacy cannot be read.

use super::Error;
use super::nft::{Family, NftChannel, RuleRecord, attributes, be32, find, text};

const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// What drops packets of a port, a phrase each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Obstacles {
    /// Those that come in.
    pub(super) incoming: Vec<String>,
    /// Those that go out.
    pub(super) outgoing: Vec<String>,
}

impl Obstacles {
    /// Adds one of a chain at that hook; a chain without a hook may be jumped to from either.
    fn add(&mut self, hook: Option<u32>, phrase: String) {
        if matches!(hook, None | Some(OUTPUT | POSTROUTING)) {
            self.outgoing.push(phrase.clone());
        }
        if matches!(hook, None | Some(PREROUTING | INPUT)) {
            self.incoming.push(phrase);
        }
    }
}

/// What a rule does with packets to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Accepts,
    Drops,
}

/// Rules and policies that drop UDP packets to `port`, in the namespace of the calling thread.
pub(super) fn obstacles(port: u16) -> Result<Obstacles, Error> {
    let mut found = Obstacles::default();
    for (family, word) in [(Family::Ipv4, "ip"), (Family::Inet, "inet")] {
        let mut channel = NftChannel::open_of(family)?;
        let chains = channel.chains()?;
        let mut tables: Vec<&str> = chains.iter().map(|chain| chain.table.as_str()).collect();
        tables.sort_unstable();
        tables.dedup();
        for table in tables.into_iter().filter(|table| !table.starts_with("skep-")) {
            let rules = channel.rules(table, None)?;
            let verdicts: Vec<(&RuleRecord, Verdict)> =
                rules.iter().filter_map(|rule| Some((rule, verdict(rule, port)?))).collect();
            for (rule, _) in verdicts.iter().filter(|(_, verdict)| *verdict == Verdict::Drops) {
                let chain = chains.iter().find(|c| c.table == table && c.name == rule.chain);
                let hook = chain.and_then(|chain| chain.hook).map(|(hook, _)| hook);
                let phrase = format!(
                    "a rule of chain {} in table {word} {table} (handle {}) drops UDP {port}",
                    rule.chain, rule.handle
                );
                found.add(hook, phrase);
            }
            if verdicts.iter().any(|(_, verdict)| *verdict == Verdict::Accepts) {
                continue;
            }
            let policies = chains.iter().filter(|chain| {
                let hook = chain.hook.map(|(hook, _)| hook);
                chain.table == table
                    && chain.drops_by_default
                    && matches!(hook, Some(INPUT | OUTPUT))
            });
            for chain in policies {
                let phrase = format!(
                    "chain {} in table {word} {table} has the policy drop, and no rule there accepts UDP {port}",
                    chain.name
                );
                found.add(chain.hook.map(|(hook, _)| hook), phrase);
            }
        }
    }
    Ok(found)
}

/// What a rule that names the port does with it.
fn verdict(rule: &RuleRecord, port: u16) -> Option<Verdict> {
    let naming = naming(rule, port);
    if naming == Naming::Not {
        return None;
    }
    let verdict = rule.expressions.iter().find_map(|(name, data)| match name.as_str() {
        "reject" => Some(Verdict::Drops),
        "immediate" => {
            let value = attributes(data).find_map(|(_, value)| find(value, 2))?;
            match find(value, 1).and_then(be32) {
                Some(0) => Some(Verdict::Drops),
                Some(1) => Some(Verdict::Accepts),
                _ => None,
            }
        }
        "target" => match find(data, 1).and_then(text) {
            Some("REJECT" | "DROP") => Some(Verdict::Drops),
            _ => None,
        },
        _ => None,
    });
    verdict.filter(|verdict| naming == Naming::Plain || *verdict == Verdict::Accepts)
}

/// Whether a rule is about a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    Not,
    /// It looks ports up in a set that is not read.
    Perhaps,
    Plain,
}

/// Whether a rule compares the destination port with `port`, by itself or by a match of iptables.
fn naming(rule: &RuleRecord, port: u16) -> Naming {
    let (mut is_port_loaded, mut named) = (false, Naming::Not);
    for (name, data) in &rule.expressions {
        let number = |kind| find(data, kind).and_then(be32);
        let bound = |kind| {
            let value = find(data, kind).and_then(|value| find(value, 1))?;
            value.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes))
        };
        match name.as_str() {
            "payload" => {
                let (base, offset, length) = (number(2), number(3), number(4));
                is_port_loaded = (base, offset, length) == (Some(2), Some(2), Some(2));
            }
            "cmp" | "range" if is_port_loaded => {
                let (from, to) = (bound(3), bound(4));
                let is_it = match (name.as_str(), number(2)) {
                    ("cmp", Some(0)) => from == Some(port),
                    ("cmp", Some(2)) => from.is_some_and(|bound| port < bound),
                    ("cmp", Some(3)) => from.is_some_and(|bound| port <= bound),
                    ("cmp", Some(4)) => from.is_some_and(|bound| port > bound),
                    ("cmp", Some(5)) => from.is_some_and(|bound| port >= bound),
                    ("range", Some(0)) => from <= Some(port) && to.is_some_and(|to| port <= to),
                    _ => false, // A rule about all other ports names none.
                };
                if !is_it {
                    return Naming::Not;
                }
                named = Naming::Plain;
            }
            "lookup" if is_port_loaded => named = Naming::Perhaps,
            // `struct xt_udp`: two source ports, two destination ports, in the host's order.
            "match" if find(data, 1).and_then(text) == Some("udp") => {
                let ports = find(data, 3).and_then(|info| info.get(4..8));
                if let Some([low0, low1, high0, high1]) = ports.and_then(|p| p.first_chunk()) {
                    let low = u16::from_ne_bytes([*low0, *low1]);
                    let high = u16::from_ne_bytes([*high0, *high1]);
                    // A rule about every port names none.
                    if (low, high) != (0, u16::MAX) && (low..=high).contains(&port) {
                        named = Naming::Plain;
                    }
                }
            }
            _ => {}
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::nft::Attributes;

    fn rule(port: u16, verdict: u32) -> RuleRecord {
        let data = |list: Attributes| list.as_bytes().to_vec();
        let payload = Attributes::new().be32(1, 1).be32(2, 2).be32(3, 2).be32(4, 2);
        let value = Attributes::new().raw(1, &port.to_be_bytes());
        let cmp = Attributes::new().be32(1, 1).be32(2, 0).nested(3, &value);
        let code = Attributes::new().be32(1, verdict);
        let immediate = Attributes::new().be32(1, 0).nested(2, &Attributes::new().nested(2, &code));
        let expressions = [("payload", payload), ("cmp", cmp), ("immediate", immediate)];
        RuleRecord {
            chain: "input".into(),
            handle: 4,
            comment: None,
            expressions: expressions.map(|(name, list)| (name.to_owned(), data(list))).into(),
        }
    }

    #[test]
    fn rules_that_name_the_port_are_told_from_others() {
        assert_eq!(verdict(&rule(4789, 0), 4789), Some(Verdict::Drops));
        assert_eq!(verdict(&rule(4789, 1), 4789), Some(Verdict::Accepts));
        assert_eq!(verdict(&rule(53, 0), 4789), None);
        let udp = |low: u16, high: u16| {
            let info = [1u16, 0xffff, low, high].map(u16::to_ne_bytes).concat();
            let of_iptables = Attributes::new().text(1, "udp").raw(3, &info);
            let mut rule = rule(53, 0);
            rule.expressions[0] = ("match".into(), of_iptables.as_bytes().to_vec());
            verdict(&rule, 4789)
        };
        assert_eq!(udp(4789, 4789), Some(Verdict::Drops));
        assert_eq!(udp(0, 0xffff), None);
    }

    #[test]
    fn ranges_and_sets_are_read_as_what_they_may_be() {
        let value = |port: u16| Attributes::new().raw(1, &port.to_be_bytes());
        let cmp = |op: u32, port| {
            (
                "cmp".to_owned(),
                Attributes::new().be32(2, op).nested(3, &value(port)).as_bytes().to_vec(),
            )
        };
        let with = |expressions: Vec<(String, Vec<u8>)>, code: u32| {
            let mut rule = rule(53, code);
            rule.expressions.splice(1..2, expressions);
            verdict(&rule, 4789)
        };
        let (drops, accepts) = (Some(Verdict::Drops), Some(Verdict::Accepts));
        assert_eq!(with(vec![cmp(5, 4789), cmp(3, 4791)], 1), accepts);
        assert_eq!(with(vec![cmp(5, 4789), cmp(3, 4791)], 0), drops);
        assert_eq!(with(vec![cmp(5, 4000), cmp(3, 4788)], 0), None);
        let range = Attributes::new().be32(2, 0).nested(3, &value(4000)).nested(4, &value(4789));
        assert_eq!(with(vec![("range".into(), range.as_bytes().to_vec())], 1), accepts);
        assert_eq!(with(vec![("lookup".into(), Vec::new())], 1), accepts);
        assert_eq!(with(vec![("lookup".into(), Vec::new())], 0), None, "it may be another port");
        assert_eq!(with(vec![cmp(1, 53)], 0), None);
    }

    #[test]
    fn obstacles_stand_in_the_way_of_their_own_direction() {
        let mut found = Obstacles::default();
        for hook in [None, Some(INPUT), Some(2), Some(OUTPUT)] {
            found.add(hook, format!("{hook:?}"));
        }
        assert_eq!(found.incoming, ["None", "Some(1)"]);
        assert_eq!(found.outgoing, ["None", "Some(3)"]);
    }
}
