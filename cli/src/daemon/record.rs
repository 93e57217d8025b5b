//! What a daemon must know to resume its part in the swarm, beside its certificate: `node.json`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use skep_worker::agent::TermKeeper;

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NodeRecord {
    /// `ip:port` at which other nodes reach this one.
    pub(super) advertise_addr: String,
    /// What was written for that, when it was chosen: an address, an interface, or nothing. `None` where an older
    /// daemon did not keep it: then the address stays.
    #[serde(default)]
    pub(super) written: Option<String>,
    /// The daemon's option for it at the time.
    #[serde(default)]
    pub(super) option: Option<String>,
    /// `ip:port` where it listens.
    pub(super) listen_addr: String,
    /// `ip:port` of the managers last known.
    pub(super) managers: Vec<String>,
    /// Its Raft id, where it is a manager.
    pub(super) raft_id: Option<u64>,
    /// Whether it is a voter already: a manager that stopped in the middle of joining asks again.
    pub(super) is_voter: bool,
    /// The highest term of a leader that it has obeyed.
    #[serde(default)]
    pub(super) term_seen: u64,
}

impl NodeRecord {
    /// Of a worker that has obeyed no leader yet.
    pub(super) fn at(advertise: impl ToString, listen: impl ToString) -> Self {
        let (advertise_addr, listen_addr) = (advertise.to_string(), listen.to_string());
        Self { advertise_addr, listen_addr, ..Self::default() }
    }

    /// The same where an older daemon did not keep what was written: the address counts as written, with the option
    /// of today, until another one is. `None` where it is known.
    pub(super) fn settled(&self, option: Option<&str>) -> Option<Self> {
        let unknown = self.written.is_none();
        unknown.then(|| Self {
            written: Some(self.advertise_addr.clone()),
            option: option.map(str::to_owned),
            ..self.clone()
        })
    }

    /// The same of a machine that has another address now, as `written` says where the daemon's option is another
    /// one than before.
    #[must_use]
    pub(super) fn moved_to(&self, address: SocketAddr, option: Option<&str>) -> Self {
        let mut moved = self.clone();
        moved.advertise_addr = address.to_string();
        for manager in moved.managers.iter_mut().filter(|manager| **manager == self.advertise_addr)
        {
            manager.clone_from(&moved.advertise_addr);
        }
        let of = |text: &str| text.parse::<SocketAddr>().ok();
        if let (Some(before), Some(listen)) = (of(&self.advertise_addr), of(&self.listen_addr))
            && before.ip() == listen.ip()
        {
            moved.listen_addr = SocketAddr::new(address.ip(), listen.port()).to_string();
        }
        if let Some(option) = option.filter(|_| option != self.option.as_deref()) {
            moved.written = Some(option.to_owned());
            moved.option = Some(option.to_owned());
        }
        moved
    }
}

static UPDATING: Mutex<()> = Mutex::new(());

/// The file in a data directory.
#[derive(Debug, Clone)]
pub(super) struct RecordFile(PathBuf);

impl RecordFile {
    pub(super) fn in_data_dir(data_dir: &Path) -> Self {
        Self(data_dir.join("node.json"))
    }

    pub(super) fn load(&self) -> Result<NodeRecord> {
        let text = std::fs::read_to_string(&self.0)
            .with_context(|| format!("failed to read {}", self.0.display()))?;
        serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is damaged: restore it from a backup, or leave the swarm and join again",
                self.0.display()
            )
        })
    }

    pub(super) fn store(&self, record: &NodeRecord) -> Result<()> {
        let beside = self.0.with_extension("tmp");
        let text = serde_json::to_vec_pretty(record).context("a record has no failing parts")?;
        std::fs::write(&beside, text)
            .and_then(|()| std::fs::File::open(&beside)?.sync_all())
            .and_then(|()| std::fs::rename(&beside, &self.0))
            .with_context(|| format!("failed to write {}", self.0.display()))
    }

    /// Changes the stored record. Several tasks of the daemon do: one at a time.
    pub(super) fn update(&self, change: impl FnOnce(&mut NodeRecord)) -> Result<()> {
        let _one_at_a_time = UPDATING.lock().expect("nothing panics while it changes the record");
        let mut record = self.load()?;
        change(&mut record);
        self.store(&record)
    }

    pub(super) fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("failed to remove {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }
}

impl TermKeeper for RecordFile {
    fn keep(&self, term: u64) -> Result<(), String> {
        let keep = |record: &mut NodeRecord| record.term_seen = term.max(record.term_seen);
        self.update(keep).map_err(|error| format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_term_outlives_the_daemon_and_is_absent_of_older_ones() {
        let directory = tempfile::tempdir().unwrap();
        let file = RecordFile::in_data_dir(directory.path());
        file.store(&NodeRecord::default()).unwrap();
        let text = std::fs::read_to_string(&file.0).unwrap();
        let older = text.replace(",\n  \"TermSeen\": 0", "");
        assert_ne!(older, text);
        std::fs::write(&file.0, older).unwrap();
        assert_eq!(file.load().unwrap().term_seen, 0);
        file.keep(7).unwrap();
        file.keep(5).unwrap();
        assert_eq!(file.load().unwrap().term_seen, 7);
    }

    #[test]
    fn an_older_record_keeps_its_address_until_another_one_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let file = RecordFile::in_data_dir(directory.path());
        let older = r#"{"AdvertiseAddr": "10.0.0.1:2377", "ListenAddr": "0.0.0.0:2377", "Managers": [], "RaftId": 1, "IsVoter": true}"#;
        std::fs::write(&file.0, older).unwrap();
        let record = file.load().unwrap();
        assert_eq!(record.written, None);
        let settled = record.settled(Some("eth0")).unwrap();
        assert_eq!(settled.written.as_deref(), Some("10.0.0.1:2377"));
        assert_eq!(settled.option.as_deref(), Some("eth0"));
        assert_eq!(settled.settled(None), None);
    }

    #[test]
    fn changes_from_several_threads_are_all_kept() {
        let directory = tempfile::tempdir().unwrap();
        let file = RecordFile::in_data_dir(directory.path());
        file.store(&NodeRecord::default()).unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let file = &file;
                scope.spawn(move || {
                    file.update(|record| record.managers.push(format!("10.0.0.{number}:2377")))
                        .unwrap();
                });
            }
        });
        assert_eq!(file.load().unwrap().managers.len(), 8);
    }
}
