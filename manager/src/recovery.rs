//! A manager that goes on alone: with the data of one that lost the others for good, or with a backup.
//!
//! What is made lies beside the manager's data until it is whole, and takes its place by names alone: whatever
//! ends in between leaves the one or the other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use skep_common::object::{ManagerStatus, Node};
use skep_common::{NodeId, Timestamp};
use skep_manager_core::{State, node_name, quorum, recovery};
use skep_proto::raft_client::RaftClient;
use skep_proto::{RaftStatusRequest, RaftStatusResponse};
use skep_runtime::identity::RaftKey;
use skep_runtime::transport::{ChannelPool, Peer};
use tonic::{Code, Request, Response, Status};

use crate::consensus::DataKey;
use crate::consensus::anew::{self, Data};
use crate::consensus::backup::Backup;

/// Holds the Raft id that a directory was made for, once it is whole.
const READY: &str = "made-for";

/// Between two rounds of asking others.
const ASK_PERIOD: Duration = Duration::from_millis(500);
/// A manager that takes longer to answer does not count in that round.
const ASK_DEADLINE: Duration = Duration::from_secs(2);

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

/// What other managers say of a swarm that this one does not take part in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Others {
    /// One of them leads, at that `ip:port`.
    Lead(String),
    /// They refuse this node: it was removed, or is no manager any more.
    Refuse(String),
    /// None that answered leads.
    AreWithoutLeader,
}

/// Asks the managers at `addresses`, with this node's certificate, for a leader for so long.
pub async fn ask_others(pool: &ChannelPool, addresses: &[String], patience: Duration) -> Others {
    let looking = async {
        loop {
            let asked = addresses.iter().map(|addr| ask(pool, addr));
            let said = futures::future::join_all(asked).await;
            if let Some(found) = said.into_iter().flatten().next() {
                return found;
            }
            tokio::time::sleep(ASK_PERIOD).await;
        }
    };
    match addresses {
        [] => Others::AreWithoutLeader,
        _ => tokio::time::timeout(patience, looking).await.unwrap_or(Others::AreWithoutLeader),
    }
}

/// What one says that settles it.
async fn ask(pool: &ChannelPool, addr: &str) -> Option<Others> {
    let mut client = RaftClient::new(pool.channel(addr, Peer::Manager));
    let mut request = Request::new(RaftStatusRequest { brief: true });
    request.set_timeout(ASK_DEADLINE);
    let answer = tokio::time::timeout(ASK_DEADLINE, client.status(request)).await.ok()?;
    judge(addr, answer.map(Response::into_inner))
}

fn judge(addr: &str, answer: Result<RaftStatusResponse, Status>) -> Option<Others> {
    match answer {
        Ok(answer) => {
            let answered = answer.heard.iter().map(|peer| Duration::from_millis(peer.millis_ago));
            let answered: Vec<Duration> = answered.collect();
            quorum::leads(&answered).then(|| Others::Lead(addr.to_owned()))
        }
        Err(status) if status.code() == Code::PermissionDenied => {
            Some(Others::Refuse(status.message().to_owned()))
        }
        Err(_) => None,
    }
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

/// Whether a directory holds what a manager could go on with.
fn has_data(raft_dir: &Path) -> bool {
    let mut segments = fs::read_dir(raft_dir.join("log")).into_iter().flatten();
    raft_dir.join("snapshot").exists() || segments.next().is_some()
}

/// Puts what was made for manager `raft_id` into the place of its data, if there is such; what was made for
/// another one, or is not whole, is removed. For every start of a manager, and before its data is read: the one
/// before may have ended in between. What it had before goes once something is in its place.
pub fn switch(raft_dir: &Path, raft_id: u64) -> Result<(), Error> {
    let (new, old) = (beside(raft_dir), raft_dir.with_extension("old"));
    if !new.exists() {
        return if has_data(raft_dir) { remove(&old) } else { Ok(()) };
    }
    let made_for = fs::read_to_string(new.join(READY)).unwrap_or_default();
    if made_for.trim() != format!("{raft_id:x}") {
        return remove(&new);
    }
    let failed = |source| Error::File { path: raft_dir.to_owned(), source };
    // An empty directory is what a look at the data has left: it does not take the place of what was there.
    if has_data(raft_dir) {
        remove(&old)?;
        fs::rename(raft_dir, &old).map_err(failed)?;
    } else {
        remove(raft_dir)?;
    }
    fs::rename(&new, raft_dir).map_err(failed)?;
    let parent = raft_dir.parent().unwrap_or(Path::new("/"));
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)?;
    remove(&old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skep_proto::PeerHeard;

    /// What lies in a data directory, by the names of the directories; each holds its word.
    fn lay(data_dir: &Path, words: &str) {
        for word in words.split_whitespace() {
            let (name, holds) = word.split_once(':').unwrap();
            let dir = data_dir.join(name);
            fs::create_dir_all(dir.join("log")).unwrap();
            match holds {
                "empty" => {}
                "ready" => {
                    fs::write(dir.join("log/1.segment"), holds).unwrap();
                    mark(&dir, 7).unwrap();
                }
                _ => fs::write(dir.join("log/1.segment"), holds).unwrap(),
            }
        }
    }

    fn found(data_dir: &Path) -> String {
        let words = ["raft", "raft.new", "raft.old"].into_iter().filter_map(|name| {
            let dir = data_dir.join(name);
            let holds = fs::read_to_string(dir.join("log/1.segment"));
            dir.exists().then(|| format!("{name}:{}", holds.unwrap_or_else(|_| "empty".into())))
        });
        words.collect::<Vec<String>>().join(" ")
    }

    #[test]
    fn what_another_manager_says_settles_it_or_not() {
        let heard = |times: &[u64]| {
            let heard =
                times.iter().map(|time| PeerHeard { millis_ago: *time, ..Default::default() });
            Ok(RaftStatusResponse { heard: heard.collect(), ..RaftStatusResponse::default() })
        };
        let lead = Some(Others::Lead("there".into()));
        for (name, answer, expect) in [
            ("a leader", heard(&[40, 90_000]), lead),
            ("one that follows, or elects", heard(&[]), None),
            ("one without a majority", heard(&[9000, 90_000]), None),
            ("nobody", Err(Status::unavailable("no answer")), None),
            (
                "one that knows better",
                Err(skep_runtime::gate::removed(NodeId(7))),
                Some(Others::Refuse(skep_runtime::gate::removed(NodeId(7)).message().into())),
            ),
        ] {
            assert_eq!(judge("there", answer), expect, "{name}");
        }
    }

    #[test]
    fn whatever_ends_in_between_leaves_a_copy() {
        for (before, after) in [
            ("raft:former", "raft:former"),
            ("raft:former raft.new:half", "raft:former"),
            ("raft:former raft.new:ready", "raft:ready"),
            ("raft:former raft.new:ready raft.old:older", "raft:ready"),
            ("raft.new:ready raft.old:former", "raft:ready"),
            ("raft:empty raft.new:ready raft.old:former", "raft:ready"),
            ("raft:ready raft.old:former", "raft:ready"),
            // Only what it had before is left: it stays.
            ("raft.old:former", "raft.old:former"),
            ("raft:empty raft.old:former", "raft:empty raft.old:former"),
            ("raft:empty raft.new:half raft.old:former", "raft:empty raft.old:former"),
        ] {
            let data_dir = tempfile::tempdir().unwrap();
            lay(data_dir.path(), before);
            switch(&data_dir.path().join("raft"), 7).unwrap();
            assert_eq!(found(data_dir.path()), after, "{before}");
        }
    }
}
