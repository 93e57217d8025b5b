//! A state as bytes: the form of snapshots and of the digest that managers compare.
//!
//! One JSON document a line: a header, then every object ordered by kind and id. Two equal states
//! have equal bytes.

use std::io::Write as _;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use skep_common::{Object, Version};

use super::State;
use crate::command::{Expect, FORMAT_LEVEL, Outcome};
use crate::{Action, Command, level};

/// A level at which references between objects are not checked.
const UNCHECKED_LEVEL: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Header {
    level: u32,
    version: Version,
    /// Where it is higher than the level of the objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used_level: Option<u32>,
}

/// Why bytes are not a state.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes are damaged or of another program.
    #[error("line {line} of the state is not a JSON document of the expected form")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What serde says.
        #[source]
        source: serde_json::Error,
    },
    /// Written by a newer skep; upgrade this manager.
    #[error("the state has format level {level}, this program knows {FORMAT_LEVEL}")]
    Level {
        /// Its level.
        level: u32,
    },
    /// Two objects of the state contradict each other.
    #[error("the state contradicts itself at line {line}: {outcome:?}")]
    Inconsistent {
        /// Counted from 1.
        line: usize,
        /// What the store said to the object.
        outcome: Outcome,
    },
}

impl State {
    /// The whole state as bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_with(|level| Some(self.used_level).filter(|used| *used > level))
    }

    fn encode_with(&self, used_level: impl Fn(u32) -> Option<u32>) -> Vec<u8> {
        let mut objects = Vec::new();
        // That of its objects: managers of an earlier version read what does not use what is new.
        let mut level = UNCHECKED_LEVEL;
        for object in self.objects() {
            level = level.max(level::of_object(&object));
            write_line(&mut objects, &object);
        }
        let mut bytes = Vec::new();
        let header = Header { level, version: self.version, used_level: used_level(level) };
        write_line(&mut bytes, &header);
        bytes.append(&mut objects);
        bytes
    }

    /// The format level that the whole of it is understood at.
    pub fn level(&self) -> u32 {
        let levels = self.objects().map(|object| level::of_object(&object));
        levels.fold(UNCHECKED_LEVEL, u32::max)
    }

    /// The format level that a program needs which is given the whole log of this state, or the state.
    ///
    /// It never falls: a command stays in the log when what it made is removed, and a log is as long as each manager
    /// keeps it.
    pub fn level_of_log(&self) -> u32 {
        self.level().max(self.used_level)
    }

    /// Reads what [`State::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut lines =
            bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).enumerate();
        let (_, header) = lines.next().unwrap_or((0, b""));
        let at_line = |line| move |source| DecodeError::Line { line, source };
        let header: Header = serde_json::from_slice(header).map_err(at_line(1))?;
        if header.level > FORMAT_LEVEL {
            return Err(DecodeError::Level { level: header.level });
        }
        let mut state = Self::default();
        for (number, line) in lines {
            let line_number = number + 1;
            let object: Object = serde_json::from_slice(line).map_err(at_line(line_number))?;
            state
                .restore(object)
                .map_err(|outcome| DecodeError::Inconsistent { line: line_number, outcome })?;
        }
        state.version = header.version;
        state.used_level = header.used_level.unwrap_or_default().max(header.level);
        Ok(state)
    }

    /// SHA-256 of the version and all objects in hexadecimal: equal on all managers at one version.
    ///
    /// Without the level that was used: one whose snapshot is of before it was noted has only seen what came after.
    pub fn digest(&self) -> String {
        Sha256::digest(self.encode_with(|_| None))
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Every object, ordered by kind and id.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let clusters = self.cluster.iter().map(|o| Object::Cluster(Box::new((**o).clone())));
        let nodes = self.nodes.values().map(|o| Object::Node(Box::new((**o).clone())));
        let services = self.services.values().map(|o| Object::Service(Box::new((**o).clone())));
        let tasks = self.tasks.values().map(|o| Object::Task(Box::new((**o).clone())));
        let networks = self.networks.values().map(|o| Object::Network(Box::new((**o).clone())));
        let secrets = self.secrets.values().map(|o| Object::Secret(Box::new((**o).clone())));
        let configs = self.configs.values().map(|o| Object::Config(Box::new((**o).clone())));
        let stacks = self.stacks.values().map(|o| Object::Stack(Box::new((**o).clone())));
        let images = self.images.values().map(|o| Object::Image(Box::new((**o).clone())));
        let revisions = self.revisions.values().map(|o| Object::Revision(Box::new((**o).clone())));
        clusters
            .chain(nodes)
            .chain(services)
            .chain(tasks)
            .chain(networks)
            .chain(secrets)
            .chain(configs)
            .chain(stacks)
            .chain(images)
            .chain(revisions)
    }

    /// Puts an object back with the bookkeeping it had.
    fn restore(&mut self, object: Object) -> Result<(), Outcome> {
        let meta = *object.meta();
        let written_by_store = match &object {
            Object::Service(service) => {
                Some((service.id, service.spec_version, service.job_status))
            }
            _ => None,
        };
        let put = Action::Put { object, expect: Expect::Absent };
        // Objects come by kind: what refers to another may come before it.
        let command =
            Command { level: UNCHECKED_LEVEL, ..Command::new(meta.updated_at, vec![put]) };
        let (outcome, changes) = self.apply(meta.version.index, &command);
        let (Outcome::Applied(_), [change]) = (&outcome, changes.as_slice()) else {
            return Err(outcome);
        };
        self.set_created_at(change.kind, change.id, meta.created_at);
        if let Some((service_id, spec_version, job_status)) = written_by_store
            && let Some(service) = self.services.get_mut(&service_id)
        {
            let service = Arc::make_mut(service);
            (service.spec_version, service.job_status) = (spec_version, job_status);
        }
        Ok(())
    }

    fn set_created_at(&mut self, kind: skep_common::Kind, id: u128, at: skep_common::Timestamp) {
        use skep_common::Kind;
        macro_rules! set {
            ($table:ident, $key:ident) => {
                if let Some(object) = self.$table.get_mut(&skep_common::$key(id)) {
                    Arc::make_mut(object).meta.created_at = at;
                }
            };
        }
        match kind {
            Kind::Cluster => {
                if let Some(cluster) = &mut self.cluster {
                    Arc::make_mut(cluster).meta.created_at = at;
                }
            }
            Kind::Node => set!(nodes, NodeId),
            Kind::Service => set!(services, ServiceId),
            Kind::Task => {
                self.edit_task(skep_common::TaskId(id), |task| task.meta.created_at = at);
            }
            Kind::Network => set!(networks, NetworkId),
            Kind::Secret => set!(secrets, SecretId),
            Kind::Config => set!(configs, ConfigId),
            Kind::Stack => set!(stacks, StackId),
            Kind::Image => set!(images, ImageId),
            Kind::Revision => {} // Written once: it was made when it was last written.
        }
    }
}

fn write_line(bytes: &mut Vec<u8>, document: &impl Serialize) {
    serde_json::to_writer(&mut *bytes, document)
        .expect("objects have string keys and no failing parts");
    bytes.write_all(b"\n").expect("a vector takes what it is given");
}
