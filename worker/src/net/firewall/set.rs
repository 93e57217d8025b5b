//! Sets and maps: what is in them.

use super::packet::Known;
use crate::net::nft::{MemberRecord, VerdictRecord};

/// A set or map with its elements.
#[derive(Debug, Clone, Default)]
pub(super) struct Set {
    has_intervals: bool,
    /// In the order of their keys; the end of an interval comes before one that begins there.
    members: Vec<MemberRecord>,
}

/// What looking up a key says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found<'a> {
    Absent,
    /// What a map leads to, where it is a map of verdicts, or to data.
    Member(Option<&'a VerdictRecord>, Option<&'a [u8]>),
    Unknown,
}

impl Set {
    pub(super) fn new(has_intervals: bool, mut members: Vec<MemberRecord>) -> Self {
        members.sort_by(|a, b| (&a.key, !a.is_end).cmp(&(&b.key, !b.is_end)));
        Self { has_intervals, members }
    }

    /// Looks up a key of which the first bytes are in `key`.
    pub(super) fn find(&self, key: &[Option<u8>]) -> Found<'_> {
        let Some(first) = self.members.iter().find_map(|member| member.key.as_ref()) else {
            return self.catch_all();
        };
        let Some(key) = key.get(..first.len()) else { return Found::Unknown };
        let key: Option<Vec<u8>> = key.iter().copied().collect();
        let Some(key) = key else { return Found::Unknown };
        match self.member(&key) {
            Some(member) => member.found(),
            None => self.catch_all(),
        }
    }

    fn member(&self, key: &[u8]) -> Option<&MemberRecord> {
        let is_of_fields = self.members.iter().any(|member| member.key_end.is_some());
        let with_key = || self.members.iter().filter_map(|m| Some((m.key.as_deref()?, m)));
        if is_of_fields {
            let holds = |(from, member): &(&[u8], &MemberRecord)| {
                let to = member.key_end.as_deref().unwrap_or(from);
                fields_are_between(key, from, to)
            };
            return with_key().find(holds).map(|(_, member)| member);
        }
        if !self.has_intervals {
            return with_key().find(|(of, _)| *of == key).map(|(_, member)| member);
        }
        let before = with_key().take_while(|(from, _)| *from <= key);
        before.last().map(|(_, member)| member).filter(|member| !member.is_end)
    }

    /// The element for all keys that no other one holds.
    fn catch_all(&self) -> Found<'_> {
        let catches = self.members.iter().find(|member| member.key.is_none());
        catches.map_or(Found::Absent, MemberRecord::found)
    }
}

impl MemberRecord {
    fn found(&self) -> Found<'_> {
        match self.is_limited {
            true => Found::Unknown,
            false => Found::Member(self.verdict.as_ref(), self.data.as_deref()),
        }
    }
}

/// Whether each field of a concatenated key is between those of two others. A field begins at a multiple
/// of four bytes, and a shorter one is filled with zeros.
fn fields_are_between(key: &[u8], from: &[u8], to: &[u8]) -> bool {
    let fields = key.chunks(4).zip(from.chunks(4)).zip(to.chunks(4));
    key.len() == from.len()
        && key.len() == to.len()
        && fields.into_iter().all(|((key, from), to)| from <= key && key <= to)
}

/// Bytes that a map leads to, as a register has them.
pub(super) fn loaded(data: &[u8]) -> Known {
    super::packet::known(data)
}
