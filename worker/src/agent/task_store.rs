//! The node's memory of its tasks: what it was asked and what came of it, one JSON file a task.
//!
//! With it a restarted daemon goes on without asking anybody: it finds its tasks, then its containers.
//! Files are replaced by renaming and not synced: a killed daemon loses nothing, and after a power loss
//! the containers are gone too and managers say again what to run. Syncing here would compete with the
//! Raft log on the same disk.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use skep_common::object::TaskStatus;
use skep_common::{Task, TaskId};

/// One remembered task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Remembered {
    /// As last assigned.
    pub task: Task,
    /// As last reached on this node.
    pub status: TaskStatus,
    /// Managers have forgotten it: it is to be stopped and erased.
    pub removed: bool,
}

/// Why the memory fails.
#[derive(Debug, thiserror::Error)]
#[error("failed to {verb} {path}")]
pub struct Error {
    verb: &'static str,
    path: String,
    #[source]
    source: io::Error,
}

/// The directory with the files.
#[derive(Debug)]
pub struct TaskStore {
    directory: PathBuf,
}

impl TaskStore {
    /// Opens or makes the directory.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(directory).map_err(|source| error("make", directory, source))?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Every remembered task. A file that a power loss left unreadable is reported and skipped.
    pub fn load(&self) -> Result<Vec<Remembered>, Error> {
        let mut tasks: Vec<Remembered> = Vec::new();
        let entries = std::fs::read_dir(&self.directory);
        for entry in entries.map_err(|source| error("read", &self.directory, source))? {
            let path = entry.map_err(|source| error("read", &self.directory, source))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = std::fs::read(&path).map_err(|source| error("read", &path, source))?;
            match serde_json::from_slice(&bytes) {
                Ok(remembered) => tasks.push(remembered),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "forgetting a task whose file cannot be read");
                }
            }
        }
        tasks.sort_by_key(|remembered| remembered.task.id);
        Ok(tasks)
    }

    /// Stores one task.
    pub fn store(&self, remembered: &Remembered) -> Result<(), Error> {
        let path = self.path(remembered.task.id);
        let beside = path.with_extension("tmp");
        let bytes =
            serde_json::to_vec(remembered).expect("a record has string keys and no failing parts");
        std::fs::write(&beside, bytes).map_err(|source| error("write", &beside, source))?;
        std::fs::rename(&beside, &path).map_err(|source| error("write", &path, source))
    }

    /// Erases one task; one that is not there is no error.
    pub fn erase(&self, task_id: TaskId) -> Result<(), Error> {
        let path = self.path(task_id);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(error("remove", &path, source))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, task_id: TaskId) -> PathBuf {
        self.directory.join(format!("{task_id}.json"))
    }
}

fn error(verb: &'static str, path: &Path, source: io::Error) -> Error {
    Error { verb, path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skep_common::{Meta, ServiceId, TaskState, Version};

    fn remembered(id: u128) -> Remembered {
        let task = Task {
            id: TaskId(id),
            meta: Meta::default(),
            spec: skep_common::spec::TaskSpec::default().into(),
            spec_version: Version::default(),
            service_id: ServiceId(1),
            slot: 1,
            node_id: None,
            status: TaskStatus::default(),
            desired_state: TaskState::Running,
            networks_attachments: Vec::new(),
            service_name: "web".into(),
            start_after: None,
            host_ports: Vec::new(),
            standalone: None,
            job_iteration: None,
            preset_node: None,
            assigned_generic_resources: Vec::new(),
            service_labels: None,
        };
        Remembered { task, status: TaskStatus::default(), removed: false }
    }

    #[test]
    fn what_is_stored_is_there_after_a_restart_and_what_is_erased_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let store = TaskStore::open(directory.path()).unwrap();
        store.store(&remembered(1)).unwrap();
        store.store(&remembered(2)).unwrap();
        store.erase(TaskId(1)).unwrap();
        store.erase(TaskId(1)).unwrap();
        let again = TaskStore::open(directory.path()).unwrap();
        assert_eq!(again.load().unwrap(), [remembered(2)]);
    }

    #[test]
    fn a_file_that_a_power_loss_emptied_is_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let store = TaskStore::open(directory.path()).unwrap();
        store.store(&remembered(2)).unwrap();
        std::fs::write(directory.path().join("0000000000000000000000001.json"), b"").unwrap();
        assert_eq!(store.load().unwrap(), [remembered(2)]);
    }
}
