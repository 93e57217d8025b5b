//! Generic resources of a node: what it has of each kind, and which of it tasks hold.
//!
//! A kind is a number (`SSD=3`) or names (`GPU=UUID1`). A task asks for a number; as it is placed, it is
//! given that number, or the first names that nobody holds. It holds them until it has ended. What a
//! node does not have any more is missing, so that its holders have to leave.

use std::collections::{BTreeMap, BTreeSet};

use skep_common::Node;
use skep_common::spec::{GenericResource, TaskSpec};

/// What a task needs, by kind.
pub(crate) type Wanted = BTreeMap<String, i64>;

/// What the tasks of this spec need.
pub(crate) fn wanted(spec: &TaskSpec) -> Wanted {
    let reservations = spec.resources.as_ref().and_then(|all| all.reservations.as_ref());
    let list = reservations.and_then(|all| all.generic_resources.as_deref()).unwrap_or_default();
    let mut wanted = Wanted::new();
    for resource in list {
        let count = wanted.entry(resource.kind().to_owned()).or_default();
        match resource {
            GenericResource::Discrete { value, .. } => *count += value.max(&0),
            GenericResource::Named { .. } => *count += 1,
        }
    }
    wanted.retain(|_, count| *count > 0);
    wanted
}

/// What a node has, and what of it is held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stock {
    numbers: BTreeMap<String, i64>,
    names: BTreeMap<String, BTreeSet<String>>,
    held_numbers: BTreeMap<String, i64>,
    /// More than one task holds a name only where a node lost it and got it back.
    held_names: BTreeMap<String, BTreeMap<String, u32>>,
}

impl Stock {
    /// Takes over what a node says that it has; who holds what stays.
    pub(crate) fn set_node(&mut self, node: Option<&Node>) {
        self.numbers.clear();
        self.names.clear();
        let description = node.and_then(|node| node.description.as_ref());
        let list =
            description.and_then(|description| description.resources.generic_resources.as_ref());
        for resource in list.into_iter().flatten() {
            match resource {
                GenericResource::Discrete { kind, value } => {
                    *self.numbers.entry(kind.clone()).or_default() += value;
                }
                GenericResource::Named { kind, value } => {
                    self.names.entry(kind.clone()).or_default().insert(value.clone());
                }
            }
        }
    }

    /// A task holds these.
    pub(crate) fn take(&mut self, given: &[GenericResource]) {
        for resource in given {
            match resource.clone() {
                GenericResource::Discrete { kind, value } => {
                    *self.held_numbers.entry(kind).or_default() += value;
                }
                GenericResource::Named { kind, value } => {
                    let holders = self.held_names.entry(kind).or_default();
                    *holders.entry(value).or_default() += 1;
                }
            }
        }
    }

    /// Whether tasks hold any of it.
    pub(crate) fn is_held(&self) -> bool {
        !self.held_numbers.is_empty() || !self.held_names.is_empty()
    }

    /// A task holds these no more.
    pub(crate) fn give_back(&mut self, given: &[GenericResource]) {
        for resource in given {
            match resource.clone() {
                GenericResource::Discrete { kind, value } => {
                    *self.held_numbers.entry(kind).or_default() -= value;
                }
                GenericResource::Named { kind, value } => {
                    let holders = self.held_names.entry(kind).or_default();
                    let n_holders = holders.entry(value).or_default();
                    *n_holders = n_holders.saturating_sub(1);
                }
            }
        }
        self.held_numbers.retain(|_, held| *held != 0);
        self.held_names.retain(|_, holders| {
            holders.retain(|_, n_holders| *n_holders > 0);
            !holders.is_empty()
        });
    }

    /// How many of a kind nobody holds; negative where more is held than there is.
    pub(crate) fn free(&self, kind: &str) -> i64 {
        let number = self.numbers.get(kind).copied().unwrap_or(0);
        let names = i64::try_from(self.free_names(kind).count()).unwrap_or(i64::MAX);
        number + names - self.held_numbers.get(kind).copied().unwrap_or(0)
    }

    fn free_names(&self, kind: &str) -> impl Iterator<Item = &String> {
        let held = self.held_names.get(kind);
        let names = self.names.get(kind).into_iter().flatten();
        names.filter(move |name| !held.is_some_and(|held| held.contains_key(*name)))
    }

    /// The kind of which there is too little, in the order of kinds.
    pub(crate) fn lacks<'w>(&self, wanted: &'w Wanted) -> Option<(&'w str, i64)> {
        let short = wanted.iter().find(|(kind, count)| self.free(kind) < **count);
        short.map(|(kind, count)| (kind.as_str(), *count))
    }

    /// What a task that needs `wanted` is given, where there is enough of all.
    pub(crate) fn choose(&self, wanted: &Wanted) -> Vec<GenericResource> {
        let of_kind = |(kind, count): (&String, &i64)| -> Vec<GenericResource> {
            if !self.names.contains_key(kind) {
                return vec![GenericResource::Discrete { kind: kind.clone(), value: *count }];
            }
            let count = usize::try_from(*count).unwrap_or(0);
            let named = |value: &String| GenericResource::Named {
                kind: kind.clone(),
                value: value.clone(),
            };
            self.free_names(kind).take(count).map(named).collect()
        };
        wanted.iter().flat_map(of_kind).collect()
    }

    /// Whether a holder of these has to leave, since the node has less than is held.
    pub(crate) fn is_overdrawn_by(&self, given: &[GenericResource]) -> bool {
        given.iter().any(|resource| match resource {
            GenericResource::Discrete { kind, .. } => self.free(kind) < 0,
            GenericResource::Named { kind, value } => {
                let holders = self.held_names.get(kind).and_then(|holders| holders.get(value));
                let is_there = self.names.get(kind).is_some_and(|names| names.contains(value));
                !is_there || holders.is_some_and(|n_holders| *n_holders > 1)
            }
        })
    }
}
