//! A manager that goes on alone: with the data of one that lost the others for good, or with a backup.
//!
//! What is made lies beside the manager's data until it is whole, and takes its place by names alone: whatever
//! ends in between leaves the one or the other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use skep_common::object::{ManagerStatus, Node};
use skep_common::{NodeId, Timestamp};
use skep_manager_core::{State, node_name, recovery};
use skep_runtime::identity::RaftKey;

use crate::consensus::DataKey;
use crate::consensus::anew::{self, Data};
use crate::consensus::backup::Backup;

/// Holds the Raft id that a directory was made for, once it is whole.
const READY: &str = "made-for";

/// Why a manager does not go on alone. What was there is as it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See there for the remedy.
    #[error(transparent)]
    Data(#[from] anew::Error),
    /// See there for the remedy.
    #[error(transparent)]
    Core(#[from] recovery::Error),
    /// The file system refused.
    #[error("failed to write {}", path.display())]
    File {
        /// What was to be written.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// A manager that is to go on alone with its own data.
#[derive(Debug)]
pub struct Alone {
    /// The node.
    pub node_id: NodeId,
    /// Where its data is.
    pub raft_dir: PathBuf,
    /// Seals it.
    pub raft_key: RaftKey,
    /// The Raft id that it had.
    pub raft_id: u64,
    /// The one that it gets: messages for the former one are not for it.
    pub new_raft_id: u64,
    /// `ip:port` at which other nodes reach it.
    pub address: String,
    /// The highest term that its agent has obeyed.
    pub term_seen: u64,
}

/// What a manager goes on with.
#[derive(Debug)]
pub struct Prepared {
    /// The state.
    pub state: State,
    /// The managers that are none any more: names, with the addresses that they had.
    pub removed: Vec<String>,
}

fn beside(raft_dir: &Path) -> PathBuf {
    raft_dir.with_extension("new")
}

fn data(dir: &Path, raft_id: u64, key: &RaftKey) -> Data {
    Data { raft_id, dir: dir.to_owned(), key: DataKey::new(key.id, key.key) }
}

impl Alone {
    /// Makes the data that it goes on with, beside what it has; [`switch`] puts it into its place.
    pub async fn prepare(&self, now: Timestamp) -> Result<Prepared, Error> {
        remove(&beside(&self.raft_dir))?;
        let (state, term) = data(&self.raft_dir, self.raft_id, &self.raft_key).read().await?;
        let addr = self.address.clone();
        let manager = ManagerStatus { raft_id: self.new_raft_id, addr, ..ManagerStatus::default() };
        let others = recovery::other_managers(&state, self.node_id);
        let removed = others.map(|node| {
            let addr = node.manager_status.as_ref().map_or("no address", |status| &status.addr);
            format!("{} ({addr})", node_name(node))
        });
        let removed = removed.collect();
        let term = anew::first_term(term.max(self.term_seen), now);
        let dir = beside(&self.raft_dir);
        let made = data(&dir, self.new_raft_id, &self.raft_key);
        let state = recovery::alone(state, self.node_id, manager, now)?;
        made.write(&state, &self.address, term).await?;
        mark(&dir, self.new_raft_id)?;
        Ok(Prepared { state, removed })
    }
}

/// A machine that is to be the only manager of the swarm of a backup.
#[derive(Debug)]
pub struct Elsewhere {
    /// Where its data is to be; nothing is there.
    pub raft_dir: PathBuf,
    /// Seals it.
    pub raft_key: RaftKey,
    /// Its Raft id.
    pub raft_id: u64,
    /// The node; its certificate is of the swarm's authority.
    pub node: Node,
    /// `ip:port` at which other nodes reach it.
    pub address: String,
}

impl Elsewhere {
    /// Writes the data that it begins with; gives the swarm's state.
    pub async fn write(self, backup: Backup, now: Timestamp) -> Result<State, Error> {
        let Self { raft_dir, raft_key, raft_id, mut node, address } = self;
        let manager = ManagerStatus { raft_id, addr: address.clone(), ..ManagerStatus::default() };
        node.manager_status = Some(manager);
        let Backup { head, state } = backup;
        let state = recovery::elsewhere(state, node, now)?;
        let term = anew::first_term(head.term, now);
        let data = data(&raft_dir, raft_id, &raft_key);
        data.write(&state, &address, term).await?;
        Ok(state)
    }
}

/// Says that a directory is whole.
fn mark(dir: &Path, raft_id: u64) -> Result<(), Error> {
    let path = dir.join(READY);
    let written = fs::write(&path, format!("{raft_id:x}\n"))
        .and_then(|()| fs::File::open(&path)?.sync_all())
        .and_then(|()| fs::File::open(dir)?.sync_all());
    written.map_err(|source| Error::File { path, source })
}

fn remove(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { path: dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Puts what was made for manager `raft_id` into the place of its data, if there is such; what was made for
/// another one, or is not whole, is removed. For every start of a manager: the one before may have ended in
/// between.
pub fn switch(raft_dir: &Path, raft_id: u64) -> Result<(), Error> {
    let new = beside(raft_dir);
    if !new.exists() {
        return remove(&raft_dir.with_extension("old"));
    }
    let made_for = fs::read_to_string(new.join(READY)).unwrap_or_default();
    if made_for.trim() != format!("{raft_id:x}") {
        return remove(&new);
    }
    let old = raft_dir.with_extension("old");
    let failed = |source| Error::File { path: raft_dir.to_owned(), source };
    if raft_dir.exists() {
        remove(&old)?;
        fs::rename(raft_dir, &old).map_err(failed)?;
    }
    fs::rename(&new, raft_dir).map_err(failed)?;
    let parent = raft_dir.parent().unwrap_or(Path::new("/"));
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)?;
    remove(&old)
}
