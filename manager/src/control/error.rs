//! Why a control request was refused. Messages and codes follow SwarmKit's control API.

use skep_common::Kind;
use skep_manager_core::{Refusal, container, network, secrets, service, stack, whatif};
use tonic::{Code, Status};

use crate::consensus::{ReadError, propose};
use crate::space::Full;

/// A refused request. Each message is one sentence that says what, where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No object has this id, name or prefix.
    #[error("{kind} {reference:?} not found")]
    NotFound {
        /// `service`, `node`, ….
        kind: &'static str,
        /// What was asked for.
        reference: String,
    },
    /// A prefix of several ids.
    #[error("{kind} {reference:?} is ambiguous: {matches} ids begin with it; give more characters")]
    Ambiguous {
        /// `service`, `node`, ….
        kind: &'static str,
        /// What was asked for.
        reference: String,
        /// How many.
        matches: usize,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Right, but not now.
    #[error("{0}")]
    Precondition(String),
    /// Remedy: in the message.
    #[error("{0}")]
    DiskFull(Full),
    /// The core refused the request about a service.
    #[error(transparent)]
    Service(#[from] service::Error),
    /// The core refused the request about a network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The core refused the request about a secret or a config.
    #[error(transparent)]
    Secret(#[from] secrets::Error),
    /// The core refused the request about a container.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// The core refused the request about a stack.
    #[error(transparent)]
    Stack(#[from] stack::Error),
    /// A question has no answer.
    #[error(transparent)]
    WhatIf(#[from] whatif::Error),
    /// The store refused the write.
    #[error("{0}")]
    Refused(Refusal),
    /// Too few managers answer, or there is no leader at the moment: who, since when, and what to do.
    #[error("{0}")]
    NoQuorum(String),
    /// It is not in the state that this manager last knew, which may be old.
    #[error("{missing}; {stale}")]
    Unconfirmed {
        /// What was not found.
        missing: String,
        /// Why nobody can say whether it is there.
        stale: String,
    },
    /// Too few managers answer, which was found after the write was on its way.
    #[error("the change may still be made: {0}")]
    Unsure(String),
    /// The write may or may not have been committed.
    #[error("failed to commit the change")]
    Propose(#[from] propose::Error),
    /// There is no current view of the store.
    #[error("failed to read the state of the swarm")]
    Read(#[from] ReadError),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::Ambiguous { .. } | Self::Invalid(_) => Code::InvalidArgument,
            Self::Precondition(_) | Self::DiskFull(_) => Code::FailedPrecondition,
            Self::Service(error) => service_code(error),
            Self::Network(error) => network_code(error),
            Self::Secret(error) | Self::Stack(stack::Error::Payload { error, .. }) => {
                payload_code(error)
            }
            Self::Container(error) => container_code(error),
            Self::Stack(stack::Error::Network { error, .. }) => network_code(error),
            Self::Stack(stack::Error::NotFound { .. }) => Code::NotFound,
            Self::Stack(stack::Error::Service { error, .. }) => service_code(error),
            Self::Stack(_) => Code::InvalidArgument,
            Self::Refused(refusal) | Self::WhatIf(whatif::Error::Refused(refusal)) => {
                refusal_code(refusal)
            }
            Self::WhatIf(whatif::Error::TooLarge { .. }) => Code::ResourceExhausted,
            Self::NoQuorum(_)
            | Self::Unconfirmed { .. }
            | Self::Unsure(_)
            | Self::Propose(_)
            | Self::Read(_) => Code::Unavailable,
        }
    }
}

fn refusal_code(refusal: &Refusal) -> Code {
    match refusal {
        Refusal::OutOfSequence { .. } => Code::Aborted,
        Refusal::NotFound { .. } => Code::NotFound,
        Refusal::NameTaken { .. } => Code::AlreadyExists,
        Refusal::PortInUse { .. } => Code::InvalidArgument, // As SwarmKit.
        Refusal::AddressInUse { .. } | Refusal::VniInUse { .. } => Code::Aborted,
        Refusal::NetworkInUse { .. }
        | Refusal::SecretInUse { .. }
        | Refusal::ConfigInUse { .. }
        | Refusal::LevelTooHigh { .. } => Code::FailedPrecondition,
        Refusal::NetworkNotFound { .. } | Refusal::PayloadNotFound { .. } => Code::NotFound,
        Refusal::NodeNumbersExhausted => Code::ResourceExhausted,
    }
}

fn payload_code(error: &secrets::Error) -> Code {
    match error {
        secrets::Error::Invalid(_) => Code::InvalidArgument,
        secrets::Error::NameTaken { .. } => Code::AlreadyExists,
        secrets::Error::InUse { .. } | secrets::Error::TooManyUsers { .. } => {
            Code::FailedPrecondition
        }
    }
}

fn container_code(error: &container::Error) -> Code {
    match error {
        container::Error::Invalid(_) | container::Error::Ambiguous { .. } => Code::InvalidArgument,
        container::Error::Network(error) => network_code(error),
        container::Error::NotAttachable { .. } | container::Error::Running { .. } => {
            Code::FailedPrecondition
        }
        container::Error::NameTaken { .. } => Code::AlreadyExists,
        container::Error::NotFound { .. } => Code::NotFound,
        container::Error::Exhausted(_) => Code::ResourceExhausted,
    }
}

fn network_code(error: &network::Error) -> Code {
    match error {
        network::Error::Invalid(_) => Code::InvalidArgument,
        network::Error::NameTaken { .. } => Code::AlreadyExists,
        network::Error::NotFound { .. } => Code::NotFound,
        network::Error::InUse { .. }
        | network::Error::Predefined { .. }
        | network::Error::Reserved { .. } => Code::FailedPrecondition,
        network::Error::Exhausted(_) => Code::ResourceExhausted,
    }
}

fn service_code(error: &service::Error) -> Code {
    match error {
        service::Error::Network(error) => network_code(error),
        service::Error::Invalid(_) | service::Error::Port(_) => Code::InvalidArgument, // As SwarmKit.
        service::Error::NameTaken { .. } => Code::AlreadyExists,
        service::Error::Rename | service::Error::ModeChange => Code::Unimplemented,
        service::Error::NoPreviousSpec { .. }
        | service::Error::NoSuchRevision { .. }
        | service::Error::BeingRemoved { .. } => Code::FailedPrecondition,
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = skep_runtime::telemetry::Chain(&error).to_string();
        Self::new(error.code(), text)
    }
}

/// The kind that a word names.
pub fn kind_of(name: &str) -> Result<Kind, Error> {
    let all = [
        Kind::Cluster,
        Kind::Node,
        Kind::Service,
        Kind::Task,
        Kind::Network,
        Kind::Secret,
        Kind::Config,
        Kind::Stack,
        Kind::Image,
    ];
    let found = all.into_iter().find(|kind| kind.name() == name);
    found.ok_or_else(|| Error::Invalid(format!("there is no kind of object named {name:?}")))
}
