//! The flags that say where tasks are placed. Source: docker/cli `service/opts.go`,
//! `placementPrefOpts`.

use anyhow::Result;
use clap::Args;
use skep_common::spec::{
    GenericResource, Placement, PlacementPreference, PlacementStrategy, SpreadOver, TaskSpec,
};

/// Flags that set what there is one of.
#[derive(Debug, Args)]
pub(super) struct PlacementFlags {
    /// Which of the nodes that fit comes first: the one with the fewest tasks of the service, or the
    /// fullest (default the swarm's: spread)
    #[arg(long, value_parser = parse_strategy, value_name = "spread|binpack")]
    placement_strategy: Option<PlacementStrategy>,
    /// Maximum number of tasks per node (default 0 = unlimited)
    #[arg(long)]
    replicas_max_per_node: Option<u64>,
}

fn parse_strategy(text: &str) -> Result<PlacementStrategy, String> {
    PlacementStrategy::of(text).ok_or_else(|| "must be spread or binpack".into())
}

impl PlacementFlags {
    /// Lays the given flags over a task's placement.
    pub(super) fn apply(&self, placement: &mut Option<Placement>) {
        if let Some(strategy) = self.placement_strategy {
            placement.get_or_insert_default().strategy = Some(strategy);
        }
        if self.replicas_max_per_node.is_some() {
            placement.get_or_insert_default().max_replicas =
                self.replicas_max_per_node.filter(|n| *n > 0);
        }
    }
}

/// Reads `spread=node.labels.zone`.
pub(super) fn parse_preference(text: &str) -> Result<PlacementPreference, String> {
    match text.split_once('=') {
        Some(("spread", descriptor)) if !descriptor.is_empty() => {
            let spread = SpreadOver { spread_descriptor: descriptor.to_owned() };
            Ok(PlacementPreference { spread: Some(spread) })
        }
        Some(("spread", _)) => Err("nothing to spread over: write spread=node.labels.KEY".into()),
        _ => Err("only spread is supported: write spread=node.labels.KEY".into()),
    }
}

/// Takes preferences away and adds others after those that stay.
pub(super) fn change_preferences(
    task: &mut TaskSpec,
    add: &[PlacementPreference],
    remove: &[PlacementPreference],
) {
    if add.is_empty() && remove.is_empty() {
        return;
    }
    let placement = task.placement.get_or_insert_default();
    let mut preferences = placement.preferences.take().unwrap_or_default();
    preferences.retain(|known| !remove.contains(known));
    for preference in add {
        if !preferences.contains(preference) {
            preferences.push(preference.clone());
        }
    }
    placement.preferences = (!preferences.is_empty()).then_some(preferences);
}

/// Takes kinds of generic resources away, and sets the numbers of others.
pub(super) fn change_generic(task: &mut TaskSpec, set: &[GenericResource], remove: &[String]) {
    let reserved = task.resources.as_ref().and_then(|all| all.reservations.as_ref());
    let before = reserved.and_then(|all| all.generic_resources.clone()).unwrap_or_default();
    let is_set = |known: &GenericResource| set.iter().any(|new| new.kind() == known.kind());
    let mut after = before.clone();
    after.retain(|known| !is_set(known) && !remove.iter().any(|kind| kind == known.kind()));
    after.extend(set.iter().cloned());
    if after != before {
        let resources = task.resources.get_or_insert_default();
        resources.reservations.get_or_insert_default().generic_resources =
            (!after.is_empty()).then_some(after);
    }
}

/// Preferences as flags have them.
pub(super) fn preferences_text(preferences: &[PlacementPreference]) -> String {
    let spreads = preferences.iter().filter_map(|preference| preference.spread.as_ref());
    let texts: Vec<String> =
        spreads.map(|spread| format!("spread={}", spread.spread_descriptor)).collect();
    texts.join(" ")
}
