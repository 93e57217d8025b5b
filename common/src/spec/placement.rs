//! Where tasks may run, and which nodes come first.

use serde::{Deserialize, Serialize};

use super::{Extra, Platform};

/// Where tasks may run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Placement {
    /// `key == value` or `key != value`; all must hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constraints: Option<Vec<String>>,
    /// What tasks are spread over, the most important first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preferences: Option<Vec<PlacementPreference>>,
    /// Tasks of the service a node may have; 0 is unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_replicas: Option<u64>,
    /// Platforms the image exists for; empty is any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platforms: Option<Vec<Platform>>,
    /// Which nodes come first; absent is the swarm's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategy: Option<PlacementStrategy>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One of the things that tasks are spread over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PlacementPreference {
    /// Over the values of a label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread: Option<SpreadOver>,
}

/// A label over whose values tasks are spread.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SpreadOver {
    /// `node.labels.X` or `engine.labels.X`.
    pub spread_descriptor: String,
}

/// Which of the nodes that fit comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlacementStrategy {
    /// The one with the fewest tasks of the service.
    #[default]
    Spread,
    /// The fullest one.
    Binpack,
}

impl PlacementStrategy {
    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Spread => "spread",
            Self::Binpack => "binpack",
        }
    }

    /// The strategy of that name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::Spread, Self::Binpack].into_iter().find(|strategy| strategy.name() == name)
    }
}

/// Something of which a node has so many, or some with names: `SSD=3`, `GPU=UUID1`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum GenericResource {
    /// One that has a name of its own.
    #[serde(rename = "NamedResourceSpec", rename_all = "PascalCase")]
    Named {
        /// What it is.
        kind: String,
        /// Which one.
        value: String,
    },
    /// A number of them.
    #[serde(rename = "DiscreteResourceSpec", rename_all = "PascalCase")]
    Discrete {
        /// What they are.
        kind: String,
        /// How many.
        value: i64,
    },
}

impl GenericResource {
    /// What it is.
    pub fn kind(&self) -> &str {
        match self {
            Self::Named { kind, .. } | Self::Discrete { kind, .. } => kind,
        }
    }
}
