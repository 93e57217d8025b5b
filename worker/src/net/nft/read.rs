//! What the kernel says about chains, rules and sets.

use std::time::Duration;

use super::attribute::{attributes, be32, be64, find, text};
use super::uapi::*;

/// A chain as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainRecord {
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// The hook's number and priority, for a base chain.
    pub hook: Option<(u32, i32)>,
    /// Whether a packet that no rule of this base chain decides on is dropped.
    pub drops_by_default: bool,
}

impl ChainRecord {
    pub(super) fn read(body: &[u8]) -> Option<Self> {
        let hook = find(body, NFTA_CHAIN_HOOK).and_then(|hook| {
            let priority = find(hook, NFTA_HOOK_PRIORITY).and_then(be32)?;
            Some((find(hook, NFTA_HOOK_HOOKNUM).and_then(be32)?, priority.cast_signed()))
        });
        const DROP: u32 = 0;
        Some(Self {
            table: find(body, NFTA_CHAIN_TABLE).and_then(text)?.to_owned(),
            name: find(body, NFTA_CHAIN_NAME).and_then(text)?.to_owned(),
            hook,
            drops_by_default: find(body, NFTA_CHAIN_POLICY).and_then(be32) == Some(DROP),
        })
    }
}

/// A rule as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleRecord {
    /// Its chain.
    pub chain: String,
    /// What names it within its table.
    pub handle: u64,
    /// The comment, where it has one.
    pub comment: Option<String>,
    /// Names and encoded contents of its expressions.
    pub expressions: Vec<(String, Vec<u8>)>,
}

impl RuleRecord {
    pub(super) fn read(body: &[u8]) -> Option<Self> {
        let list = find(body, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
        let expressions = attributes(list).map(|(_, expression)| {
            let name = find(expression, NFTA_EXPR_NAME).and_then(text).unwrap_or_default();
            let data = find(expression, NFTA_EXPR_DATA).unwrap_or_default();
            (name.to_owned(), data.to_vec())
        });
        Some(Self {
            chain: find(body, NFTA_RULE_CHAIN).and_then(text)?.to_owned(),
            handle: find(body, NFTA_RULE_HANDLE).and_then(be64)?,
            comment: find(body, NFTA_RULE_USERDATA).and_then(comment),
            expressions: expressions.collect(),
        })
    }

    /// The contents of the expression called `name`, if there is exactly one.
    pub fn expression(&self, name: &str) -> Option<&[u8]> {
        let mut found = self.expressions.iter().filter(|(n, _)| n == name);
        let (_, data) = found.next()?;
        found.next().is_none().then_some(data.as_slice())
    }
}

/// The comment in a rule's user data, which is a list of (kind, length, value) in bytes.
fn comment(mut user_data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = user_data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == NFTNL_UDATA_RULE_COMMENT {
            return text(value).map(str::to_owned);
        }
        user_data = &rest[value.len()..];
    }
    None
}

/// A set or map as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetRecord {
    /// Its name.
    pub name: String,
    /// Whether it belongs to one rule.
    pub is_anonymous: bool,
    /// Whether its elements are where intervals begin and end.
    pub has_intervals: bool,
}

impl SetRecord {
    pub(super) fn read(body: &[u8]) -> Option<Self> {
        let flags = find(body, NFTA_SET_FLAGS).and_then(be32).unwrap_or(0);
        let name = find(body, NFTA_SET_NAME).and_then(text)?.to_owned();
        let is = |flag| flags & flag != 0;
        let (is_anonymous, has_intervals) = (is(NFT_SET_ANONYMOUS), is(NFT_SET_INTERVAL));
        Some(Self { name, is_anonymous, has_intervals })
    }
}

/// An element of a set or map as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElementRecord {
    /// Its key.
    pub key: Vec<u8>,
    /// Its value, in a map to data.
    pub data: Option<Vec<u8>>,
    /// The chain it leads to, in a map to verdicts.
    pub chain: Option<String>,
}

impl ElementRecord {
    /// The elements in one message of a dump.
    pub(super) fn read_all(body: &[u8]) -> Vec<Self> {
        let list = find(body, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        attributes(list).filter_map(|(_, element)| Self::read(element)).collect()
    }

    fn read(element: &[u8]) -> Option<Self> {
        let key = find(find(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?.to_vec();
        let value = find(element, NFTA_SET_ELEM_DATA);
        let data = value.and_then(|value| find(value, NFTA_DATA_VALUE)).map(<[u8]>::to_vec);
        let verdict = value.and_then(|value| find(value, NFTA_DATA_VERDICT));
        let chain = verdict.and_then(|verdict| find(verdict, NFTA_VERDICT_CHAIN)).and_then(text);
        Some(Self { key, data, chain: chain.map(str::to_owned) })
    }
}

/// What is done with a packet, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerdictRecord {
    /// `NF_DROP`, `NF_ACCEPT` or one of nftables.
    pub code: u32,
    /// The chain that it leads to.
    pub chain: Option<String>,
}

impl VerdictRecord {
    /// Reads the attributes of a verdict.
    pub fn of(verdict: &[u8]) -> Option<Self> {
        let chain = find(verdict, NFTA_VERDICT_CHAIN).and_then(text).map(str::to_owned);
        Some(Self { code: find(verdict, NFTA_VERDICT_CODE).and_then(be32)?, chain })
    }
}

/// An element of a set or map of anyone's, as the kernel lists it: also a bound of an interval.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemberRecord {
    /// Its key; none of the element for all keys that no other one holds.
    pub key: Option<Vec<u8>>,
    /// The last key of a range of concatenated fields.
    pub key_end: Option<Vec<u8>>,
    /// Whether an interval ends before its key.
    pub is_end: bool,
    /// Whether it holds for some packets alone, by a limit of its own.
    pub is_limited: bool,
    /// Where a map of verdicts leads to.
    pub verdict: Option<VerdictRecord>,
    /// What a map leads to.
    pub data: Option<Vec<u8>>,
}

impl MemberRecord {
    /// The elements in one message of a dump.
    pub(super) fn read_all(body: &[u8]) -> Vec<Self> {
        let list = find(body, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        attributes(list).map(|(_, element)| Self::read(element)).collect()
    }

    fn read(element: &[u8]) -> Self {
        let value = |kind| find(find(element, kind)?, NFTA_DATA_VALUE).map(<[u8]>::to_vec);
        let flags = find(element, NFTA_SET_ELEM_FLAGS).and_then(be32).unwrap_or(0);
        let verdict = find(element, NFTA_SET_ELEM_DATA).and_then(|v| find(v, NFTA_DATA_VERDICT));
        let several = find(element, NFTA_SET_ELEM_EXPRESSIONS).into_iter().flat_map(attributes);
        let mut of_its_own =
            find(element, NFTA_SET_ELEM_EXPR).into_iter().chain(several.map(|(_, one)| one));
        let name = |expression| find(expression, NFTA_EXPR_NAME).and_then(text);
        Self {
            key: value(NFTA_SET_ELEM_KEY),
            key_end: value(NFTA_SET_ELEM_KEY_END),
            is_end: flags & NFT_SET_ELEM_INTERVAL_END != 0,
            is_limited: of_its_own.any(|one| !matches!(name(one), Some("counter" | "last"))),
            verdict: verdict.and_then(VerdictRecord::of),
            data: value(NFTA_SET_ELEM_DATA),
        }
    }
}

/// An element of a set as the kernel lists it, with its counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountRecord {
    /// Its key.
    pub key: Vec<u8>,
    /// Packets that matched it.
    pub packets: u64,
    /// Their bytes, with their IP headers.
    pub bytes: u64,
}

impl CountRecord {
    /// The elements with a counter in one message of a dump.
    pub(super) fn read_all(body: &[u8]) -> Vec<Self> {
        let list = find(body, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        attributes(list).filter_map(|(_, element)| Self::read(element)).collect()
    }

    fn read(element: &[u8]) -> Option<Self> {
        let key = find(find(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?.to_vec();
        let counter = find(find(element, NFTA_SET_ELEM_EXPR)?, NFTA_EXPR_DATA)?;
        let number = |kind| find(counter, kind).and_then(be64);
        let (packets, bytes) = (number(NFTA_COUNTER_PACKETS)?, number(NFTA_COUNTER_BYTES)?);
        Some(Self { key, packets, bytes })
    }
}

/// An element of a set whose elements expire, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgeRecord {
    /// Its key.
    pub key: Vec<u8>,
    /// How long it has left.
    pub expires_in: Duration,
}

impl AgeRecord {
    /// The elements that expire in one message of a dump.
    pub(super) fn read_all(body: &[u8]) -> Vec<Self> {
        let list = find(body, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        attributes(list).filter_map(|(_, element)| Self::read(element)).collect()
    }

    fn read(element: &[u8]) -> Option<Self> {
        let key = find(find(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?.to_vec();
        let milliseconds = find(element, NFTA_SET_ELEM_EXPIRATION).and_then(be64)?;
        Some(Self { key, expires_in: Duration::from_millis(milliseconds) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_is_found_behind_other_user_data() {
        assert_eq!(comment(b"\x00\x05skep\x00").as_deref(), Some("skep"));
        assert_eq!(comment(b"\x07\x02ab\x00\x05skep\x00").as_deref(), Some("skep"));
        assert_eq!(comment(b"\x00\x09skep\x00"), None);
        assert_eq!(comment(b""), None);
    }
}
