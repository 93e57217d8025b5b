//! Which rules of this node's nftables drop packets of the tunnel, as far as reading them can tell.
//!
//! Only what is plain is found: a rule that compares the port and drops, and a chain that drops what no
//! rule decides on in a table where no rule accepts the port. iptables-nft keeps its rules there, too;
//! those of iptables-legacy cannot be read.

use super::Error;
use super::nft::{Family, NftChannel, RuleRecord, attributes, be32, find, text};

const INPUT: u32 = 1;
const OUTPUT: u32 = 3;

/// What a rule does with packets to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Accepts,
    Drops,
}

/// Rules and policies that drop UDP packets to `port`, a phrase each, in the namespace of the calling thread.
pub(super) fn obstacles(port: u16) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
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
                found.push(format!(
                    "a rule of chain {} in table {word} {table} (handle {}) drops UDP {port}",
                    rule.chain, rule.handle
                ));
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
                found.push(format!(
                    "chain {} in table {word} {table} has the policy drop, and no rule there accepts UDP {port}",
                    chain.name
                ));
            }
        }
    }
    Ok(found)
}

/// What a rule that names the port does with it.
fn verdict(rule: &RuleRecord, port: u16) -> Option<Verdict> {
    if !names_port(rule, port) {
        return None;
    }
    rule.expressions.iter().find_map(|(name, data)| match name.as_str() {
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
    })
}

/// Whether a rule compares the destination port with `port`, by itself or by a match of iptables.
fn names_port(rule: &RuleRecord, port: u16) -> bool {
    let mut is_port_loaded = false;
    for (name, data) in &rule.expressions {
        let number = |kind| find(data, kind).and_then(be32);
        match name.as_str() {
            "payload" => {
                let (base, offset, length) = (number(2), number(3), number(4));
                is_port_loaded = (base, offset, length) == (Some(2), Some(2), Some(2));
            }
            "cmp" if is_port_loaded => {
                let value = find(data, 3).and_then(|value| find(value, 1));
                let is_equal = number(2) == Some(0);
                if is_equal && value == Some(&port.to_be_bytes()) {
                    return true;
                }
            }
            // `struct xt_udp`: two source ports, two destination ports, in the host's order.
            "match" if find(data, 1).and_then(text) == Some("udp") => {
                let ports = find(data, 3).and_then(|info| info.get(4..8));
                if let Some([low0, low1, high0, high1]) = ports.and_then(|p| p.first_chunk()) {
                    let low = u16::from_ne_bytes([*low0, *low1]);
                    let high = u16::from_ne_bytes([*high0, *high1]);
                    // A rule about every port names none.
                    if (low, high) != (0, u16::MAX) && (low..=high).contains(&port) {
                        return true;
                    }
                }
            }
            _ => {}
        }
    }
    false
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
}
