//! When a node changes its key: made before it is told, told before it is used, used before the old one
//! is dropped.
//!
//! ```text
//!  one key ── old enough ──► two, the old one current ── all peers have sessions ──► two, the new one
//!     ▲                                                                                 │
//!     └───────────────────────────────── none needs the old one ◄───────────────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use skep_common::Timestamp;
use skep_runtime::clock;
use skep_runtime::telemetry::Chain;

use super::keyring::{Keyring, Pairs};

/// How often it is looked whether the next step is due.
const LOOK_PERIOD: Duration = Duration::from_secs(10);

/// How old a key becomes, as in Swarm (`rotationInterval` of its key manager).
const KEY_AGE_MAX: Duration = Duration::from_secs(12 * 60 * 60);

/// How long the old key is kept at least. Sessions that nobody uses last three minutes
/// (`REJECT_AFTER_TIME` of WireGuard).
const OLD_KEPT: Duration = Duration::from_secs(10 * 60);

/// After this time without a switch it is said that one is waited for: a peer that lives has been asked for
/// a session many times by then.
const SWITCH_EXPECTED: Duration = Duration::from_secs(5 * 60);

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Begin,
    Switch,
    End,
}

/// The nodes that there are sessions with, by slot of this node; no slot where there are no encrypted
/// networks.
pub type Sessions = BTreeMap<u8, BTreeSet<Ipv4Addr>>;

fn next_step(pairs: &Pairs, now: Timestamp, sessions: &Sessions) -> Option<Step> {
    let current = pairs.keys.get(&pairs.current)?;
    let mut others = pairs.keys.iter().filter(|(slot, _)| **slot != pairs.current);
    let Some((slot, other)) = others.next() else {
        return (now.since(current.made) >= KEY_AGE_MAX).then_some(Step::Begin);
    };
    let of_other = sessions.get(slot);
    if other.made > current.made {
        // A node without sessions is dead, or hears of the key before it has one.
        let is_known = match sessions.get(&pairs.current) {
            Some(of_current) => of_other.is_some_and(|other| of_current.is_subset(other)),
            None => true,
        };
        return is_known.then_some(Step::Switch);
    }
    let is_unused = of_other.is_none_or(BTreeSet::is_empty);
    (is_unused && now.since(pairs.switched) >= OLD_KEPT).then_some(Step::End)
}

/// The slot that waits to become the current one.
pub(super) fn coming(pairs: &Pairs) -> Option<u8> {
    let current = pairs.keys.get(&pairs.current)?;
    let mut others = pairs.keys.iter().filter(|(slot, _)| **slot != pairs.current);
    others.find(|(_, other)| other.made > current.made).map(|(slot, _)| *slot)
}

/// The nodes that a switch has waited for too long: those with a session in the current slot alone.
fn awaited(pairs: &Pairs, now: Timestamp, sessions: &Sessions) -> BTreeSet<Ipv4Addr> {
    let Some(slot) = coming(pairs) else { return BTreeSet::new() };
    if now.since(pairs.keys[&slot].made) < SWITCH_EXPECTED {
        return BTreeSet::new();
    }
    let of = |slot| sessions.get(&slot).cloned().unwrap_or_default();
    of(pairs.current).difference(&of(slot)).copied().collect()
}

/// Changes the node's key again and again.
pub async fn rotate(keyring: Arc<Keyring>, sessions: impl AsyncFn() -> Option<Sessions>) {
    let mut was_awaited = false;
    loop {
        tokio::time::sleep(LOOK_PERIOD).await;
        let Some(sessions) = sessions().await else { continue };
        let (pairs, now) = (keyring.pairs(), clock::now());
        let awaited = awaited(&pairs, now, &sessions);
        if !awaited.is_empty() && !was_awaited {
            tracing::warn!(
                ?awaited,
                "the key of encrypted networks changes only when these addresses within the tunnels answer to \
                 the new one: look whether their nodes hear of a leader, and let UDP 4790 and 4791 through"
            );
        }
        was_awaited = !awaited.is_empty();
        let Some(step) = next_step(&pairs, now, &sessions) else { continue };
        tracing::info!(?step, "this node changes its key of encrypted networks");
        let done = match step {
            Step::Begin => keyring.begin_rotation(now),
            Step::Switch => keyring.switch(now),
            Step::End => keyring.end_rotation(),
        };
        if let Err(error) = done {
            tracing::warn!(error = %Chain(&error), "the key of encrypted networks stays as it is");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::keyring::{Pair, PrivateKey};
    use super::*;

    /// Pairs as `made` seconds by slot, the current slot, and when it became that.
    fn pairs(made: &[i64], current: u8, switched: i64) -> Pairs {
        let pair = |made: &i64| Pair {
            key: PrivateKey::new().unwrap(),
            made: Timestamp::from_secs(*made),
        };
        let keys: BTreeMap<u8, Pair> = (0..).zip(made.iter().map(pair)).collect();
        Pairs { current, keys, switched: Timestamp::from_secs(switched) }
    }

    /// Sessions by slot as `slot:node,node` words.
    fn sessions(words: &str) -> Sessions {
        let slot = |word: &str| {
            let (slot, nodes) = word.split_once(':').expect("slot:nodes");
            let nodes = nodes.split(',').filter(|node| !node.is_empty());
            let nodes = nodes.map(|node| Ipv4Addr::new(198, 18, 0, node.parse().unwrap()));
            (slot.parse().unwrap(), nodes.collect())
        };
        words.split_whitespace().map(slot).collect()
    }

    #[test]
    fn whoever_keeps_a_switch_waiting_is_asked_and_then_named() {
        for (name, pairs, now, slot, expect) in [
            ("one key", pairs(&[0], 0, 0), 6000, None, ""),
            ("it may still come", pairs(&[0, 50], 0, 0), 349, Some(1), ""),
            ("it does not come", pairs(&[0, 50], 0, 0), 350, Some(1), "198.18.0.3"),
            ("switched", pairs(&[0, 50], 1, 60), 6000, None, ""),
        ] {
            assert_eq!(coming(&pairs), slot, "{name}");
            let awaited = awaited(&pairs, Timestamp::from_secs(now), &sessions("0:2,3 1:2"));
            let awaited: Vec<String> = awaited.iter().map(ToString::to_string).collect();
            assert_eq!(awaited.join(" "), expect, "{name}");
        }
    }

    #[test]
    fn each_step_waits_for_the_one_before_to_be_known() {
        const HALF_DAY: i64 = 12 * 60 * 60;
        for (name, pairs, now, words, expect) in [
            ("a young key", pairs(&[0], 0, 0), HALF_DAY - 1, "0:2,3", None),
            ("an old key", pairs(&[0], 0, 0), HALF_DAY, "0:2,3", Some(Step::Begin)),
            ("no interface yet", pairs(&[0, 50], 0, 0), 60, "0:2,3", None),
            ("one was not told", pairs(&[0, 50], 0, 0), 6000, "0:2,3 1:2", None),
            ("told to all", pairs(&[0, 50], 0, 0), 60, "0:2,3 1:2,3,4", Some(Step::Switch)),
            ("none to tell", pairs(&[0, 50], 0, 0), 60, "", Some(Step::Switch)),
            ("in use for a while", pairs(&[0, 50], 1, 60), 659, "0: 1:2", None),
            ("the old one still in use", pairs(&[0, 50], 1, 60), 6000, "0:3 1:2", None),
            ("in use for long", pairs(&[0, 50], 1, 60), 660, "0: 1:2", Some(Step::End)),
            ("the other slot", pairs(&[50, 0], 1, 0), 60, "0:2 1:2", Some(Step::Switch)),
        ] {
            let now = Timestamp::from_secs(now);
            assert_eq!(next_step(&pairs, now, &sessions(words)), expect, "{name}");
        }
    }
}
