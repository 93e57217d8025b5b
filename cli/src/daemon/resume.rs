//! How this machine takes up its part in its swarm when the daemon starts, and what becomes of it when it
//! cannot, or must not go on.
//!
//! Driven by [`Machine::open`], once, and by [`keep`] for as long as the daemon runs.
//!
//! # Invariants
//!
//! - A machine that cannot take part serves its socket all the same, and says why: its operator can have it
//!   forget the swarm. Its containers live on until then.
//! - A node that is given another role takes it up as a restarted daemon would: its containers, its mesh and
//!   its files stay.
//! - Only what may go away by itself is tried again; everything else waits for its operator.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skep_common::spec::NodeRole;
use skep_manager::consensus::StopReason;
use skep_manager::recovery::switch;
use skep_manager::space;
use skep_runtime::clock;
use skep_runtime::identity::Stored;
use skep_runtime::telemetry::Chain;
use tonic::{Code, Status};

use super::address;
use super::machine::{Machine, Membership};
use super::node::{Node, Parts, Passing};
use super::options::Options;
use super::record::RecordFile;
use super::{join, role};

/// An address that comes up while the machine boots is there within seconds.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Looking costs next to nothing, and an operator who has freed the port should not wait for long.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// Why this machine takes no part in the swarm that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Obstacle {
    /// What is wrong, where, and what to do.
    pub(super) sentence: String,
    /// Whether it may go away by itself, so that it is tried again.
    may_pass: bool,
    /// Whether the swarm went on without this manager: what it has is of no use to anybody.
    pub(super) is_superseded: bool,
}

impl Obstacle {
    fn of(error: &anyhow::Error) -> Self {
        Self::new(&format!("{error:#}"), error.is::<Passing>())
    }

    fn new(why: &str, may_pass: bool) -> Self {
        let remedy = if may_pass {
            "it is tried again by itself"
        } else {
            "put that right and restart the daemon"
        };
        let sentence = format!(
            "this node cannot take part in its swarm: {why}; {remedy}, or give the swarm up with `skep swarm leave --force`"
        );
        Self { sentence, may_pass, is_superseded: false }
    }

    /// Of a manager that the swarm went on without, and what became of its containers.
    fn superseded(why: &str, removed: Result<(), Status>) -> Self {
        let containers = match removed {
            Ok(()) => "its containers were stopped".to_owned(),
            Err(status) => {
                format!("some of its containers may still run ({})", status.message())
            }
        };
        let sentence = format!(
            "this manager is not in its swarm any more: {why}; {containers}, `skep swarm leave` here and join again"
        );
        Self { sentence, may_pass: false, is_superseded: true }
    }

    /// What a request gets that needs the swarm.
    pub(super) fn status(&self) -> Status {
        Status::failed_precondition(&*self.sentence)
    }
}

/// Takes up this machine's part in its swarm, if it is in one. A failure is remembered, and told once.
pub(super) async fn resume(machine: &Machine) {
    let membership = match start(machine).await {
        Ok(membership) => membership,
        Err(error) => Membership::Failed(Arc::new(Obstacle::of(&error))),
    };
    match (machine.membership(), &membership) {
        (Membership::Failed(before), Membership::Failed(now)) if before == *now => return,
        (_, Membership::Failed(now)) => {
            tracing::error!(why = %now.sentence, "this machine is not in its swarm");
        }
        (_, Membership::Locked(_)) => {
            tracing::warn!("this manager is locked: unlock it with `skep swarm unlock`");
        }
        (Membership::Failed(_) | Membership::Locked(_), Membership::Member(_)) => {
            tracing::info!("this machine is in its swarm again");
        }
        _ => {}
    }
    machine.set_membership(membership);
}

async fn start(machine: &Machine) -> Result<Membership> {
    let options = &machine.inner.options;
    let files = machine.inner.files.clone();
    let (credentials, raft_key) = match files.load()? {
        Stored::Nothing => return Ok(Membership::Outside),
        Stored::Locked(subject) => return Ok(Membership::Locked(subject.node_id)),
        Stored::Open(credentials, raft_key) => (*credentials, raft_key),
    };
    let subject = credentials.subject().context("this node's certificate cannot be read")?;
    if subject.not_after < clock::now() {
        anyhow::bail!(
            "its certificate expired at {}: correct this machine's clock where that is wrong, otherwise leave and join again",
            subject.not_after
        );
    }
    let file = RecordFile::in_data_dir(&options.data_dir);
    let mut record = file.load()?;
    if subject.role == NodeRole::Manager && record.raft_id.is_none() {
        // The membership by its last Raft id is over.
        role::begin_manager(&options.data_dir)?;
        record = file.load()?;
    }
    let option = options.advertise_addr.as_deref();
    if let Some(settled) = record.settled(option) {
        record = settled;
        file.update(|stored| stored.clone_from(&record))?;
    }
    if let Some(address) = address::moved(&record, option) {
        let before = record.advertise_addr.as_str();
        tracing::info!(before, now = %address, "this machine has another address in its swarm now");
        record = record.moved_to(address, option);
        file.update(|stored| stored.clone_from(&record))?;
    }
    let (is_voter, managers) = (record.is_voter, record.managers.clone());
    if let Some(raft_id) = record.raft_id {
        let switched = switch(&options.data_dir.join("raft"), raft_id);
        switched.context("failed to put this manager's data into its place")?;
    }
    let image_store = machine.inner.image_store.clone();
    let parts = Parts { credentials, raft_key, files, record, image_store };
    let node = Node::start(options, parts).await?;
    let taken_up = async {
        node.serve(options).await?;
        if let (Some(manager), false) = (&node.manager, is_voter) {
            // It was stopped in the middle of joining.
            match manager.join(&managers).await {
                Ok(()) => file.update(|record| record.is_voter = true)?,
                // It is to be no manager any more: the leader tells its agent.
                Err(status) if status.code() == Code::PermissionDenied => {
                    tracing::warn!(why = status.message(), "this node does not join the managers");
                }
                Err(status) => return Err(not_joined(&status)),
            }
        }
        Ok(())
    };
    match taken_up.await {
        Ok(()) => Ok(Membership::Member(Arc::new(node))),
        Err(error) => {
            node.stop().await;
            node.release().await;
            Err(error)
        }
    }
}

fn not_joined(status: &Status) -> anyhow::Error {
    let why = format!("it was not made a voter: {}", status.message());
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded => Passing(why).into(),
        _ => anyhow::anyhow!(why),
    }
}

/// Tries again what may pass, and takes a manager out whose consensus has stopped, until the daemon stops.
pub(super) async fn keep(machine: Machine) {
    let mut changes = machine.inner.membership.subscribe();
    let mut pause = RETRY_FIRST;
    let options = &machine.inner.options;
    loop {
        let membership = changes.borrow_and_update().clone();
        if !matches!(membership, Membership::Failed(_)) {
            pause = RETRY_FIRST;
        }
        tokio::select! {
            () = machine.inner.tasks.token().cancelled_owned() => return,
            _ = changes.changed() => {} // The machine holds the sender: this is no end.
            due = next_step(&membership, options, pause) => {
                let Ok(_changing) = machine.changing().await else { return };
                // Somebody else may have had it leave meanwhile.
                if !changes.has_changed().unwrap_or(true) {
                    due.take(&machine).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }
}

/// What is to be done next.
enum Step {
    Retry,
    TakeOut(Arc<Node>, StopReason),
    ChangeRole(Arc<Node>),
    Move(Arc<Node>),
}

async fn next_step(membership: &Membership, options: &Options, pause: Duration) -> Step {
    let option = options.advertise_addr.as_deref();
    match membership {
        Membership::Failed(obstacle) if obstacle.may_pass => {
            tokio::time::sleep(pause).await;
            return Step::Retry;
        }
        Membership::Member(node) => {
            let stopped = async {
                match &node.manager {
                    Some(manager) => manager.stopped().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                reason = stopped => {
                    if let (StopReason::Storage(_), Some(manager)) = (&reason, &node.manager) {
                        // What it knew is shown until there is room.
                        let seen = manager.space().borrow().clone();
                        space::wait_for_room(&options.data_dir.join("raft"), seen).await;
                    }
                    // A shutdown is the work of whoever changes the membership next.
                    if !matches!(reason, StopReason::Shutdown) {
                        return Step::TakeOut(Arc::clone(node), reason);
                    }
                }
                () = role::differs(node) => return Step::ChangeRole(Arc::clone(node)),
                _ = address::moves(&node.record, option) => return Step::Move(Arc::clone(node)),
            }
        }
        Membership::Failed(_) | Membership::Locked(_) | Membership::Outside => {}
    }
    std::future::pending().await
}

impl Step {
    async fn take(self, machine: &Machine) {
        match self {
            Self::Retry => resume(machine).await,
            Self::ChangeRole(node) => role::change(machine, &node).await,
            // It takes up its part as a restarted daemon would, from its new address.
            Self::Move(node) => {
                node.stop().await;
                node.release().await;
                resume(machine).await;
            }
            Self::TakeOut(node, reason) => {
                node.stop().await;
                let why = Chain(&reason).to_string();
                let obstacle = match reason {
                    StopReason::Superseded(_) => {
                        // The swarm runs them elsewhere, and nobody follows its mesh here.
                        let removed = join::remove_containers(machine).await;
                        node.teardown().await;
                        Obstacle::superseded(&why, removed)
                    }
                    // A disk may be freed; what cannot be applied stays so with this version.
                    reason => {
                        node.release().await;
                        Obstacle::new(&why, matches!(reason, StopReason::Storage(_)))
                    }
                };
                tracing::error!(why = %obstacle.sentence, "this machine is not in its swarm any more");
                machine.set_membership(Membership::Failed(Arc::new(obstacle)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::record::NodeRecord;
    use skep_common::{ClusterId, NodeId, Timestamp};
    use skep_proto::machine_server::Machine as _;
    use skep_proto::{InfoRequest, JoinSwarmRequest, LeaveSwarmRequest};
    use skep_runtime::identity::{Authority, Credentials, Csr, Files, RaftKey};
    use tonic::Request;

    /// Nothing has this address (RFC 5737).
    const NOWHERE: &str = "192.0.2.1:2377";

    /// A worker's data, with a certificate of so many seconds from `begin` on.
    fn store_member(data_dir: &std::path::Path, begin: Timestamp, life: Duration) {
        let authority = Authority::generate(begin).unwrap();
        let csr = Csr::generate().unwrap();
        let (node, cluster) = (NodeId(7), ClusterId(8));
        let certificate =
            authority.sign(&csr.csr_pem, node, NodeRole::Worker, cluster, begin, life).unwrap();
        let credentials = Credentials {
            certificate_pem: certificate,
            key_pem: csr.key_pem,
            root_pem: authority.root_pem().to_owned(),
        };
        Files::in_data_dir(data_dir).store(&credentials, &RaftKey::generate()).unwrap();
        let record = NodeRecord {
            advertise_addr: NOWHERE.to_owned(),
            written: Some(NOWHERE.to_owned()),
            listen_addr: NOWHERE.to_owned(),
            ..NodeRecord::default()
        };
        RecordFile::in_data_dir(data_dir).store(&record).unwrap();
    }

    /// Opens a machine on a member's data after `damage`; gives why it takes no part.
    async fn obstacle(begin: Timestamp, damage: impl FnOnce(&std::path::Path)) -> Obstacle {
        let directory = tempfile::tempdir().unwrap();
        store_member(directory.path(), begin, Duration::from_secs(3600));
        damage(directory.path());
        let machine = Machine::open(Options::for_test(directory.path()), Vec::new()).await.unwrap();
        let Membership::Failed(obstacle) = machine.membership() else { panic!("it takes part") };

        let info = machine.info(Request::new(InfoRequest {})).await.unwrap().into_inner();
        assert_eq!((info.error.as_str(), info.node_id.as_str()), (&*obstacle.sentence, ""));
        let join = machine.join_swarm(Request::new(JoinSwarmRequest::default())).await;
        assert_eq!(join.unwrap_err().message(), obstacle.sentence);
        machine.stop().await;
        (*obstacle).clone()
    }

    #[track_caller]
    fn check(obstacle: &Obstacle, may_pass: bool, words: &[&str]) {
        let remedy = match obstacle.is_superseded {
            true => "`skep swarm leave`", // It is in no Raft group.
            false => "`skep swarm leave --force`",
        };
        for word in words.iter().chain(&[remedy]) {
            assert!(obstacle.sentence.contains(word), "{word:?} in {}", obstacle.sentence);
        }
        assert_eq!(obstacle.may_pass, may_pass, "{}", obstacle.sentence);
    }

    #[tokio::test]
    async fn what_keeps_a_machine_out_is_told_with_its_remedy() {
        let now = clock::now();
        let nothing = |_: &std::path::Path| {};
        check(&obstacle(now, nothing).await, true, &["192.0.2.1", "tried again"]);
        let past = Timestamp(now.0 - 7200 * 1_000_000_000);
        check(&obstacle(past, nothing).await, false, &["certificate expired", "clock", "restart"]);
        let damaged = obstacle(now, |dir| std::fs::write(dir.join("node.json"), "{").unwrap());
        check(&damaged.await, false, &["node.json", "damaged", "backup"]);
        let key = "certificates/swarm-node.key";
        let damaged = obstacle(now, |dir| std::fs::write(dir.join(key), "?").unwrap());
        check(&damaged.await, false, &[key, "backup"]);
    }

    #[test]
    fn a_superseded_manager_says_what_became_of_its_containers() {
        let stopped = Obstacle::superseded("the swarm began anew", Ok(()));
        check(&stopped, false, &["began anew", "its containers were stopped"]);
        let failure = Status::internal("the runtime does not answer");
        let left = Obstacle::superseded("the swarm began anew", Err(failure));
        check(&left, false, &["may still run", "the runtime does not answer"]);
        assert!(!left.sentence.contains("were stopped"), "{}", left.sentence);
        assert!(stopped.is_superseded && left.is_superseded);
    }

    #[tokio::test]
    async fn a_swarm_that_may_count_on_this_machine_is_left_by_force_only() {
        let directory = tempfile::tempdir().unwrap();
        store_member(directory.path(), clock::now(), Duration::from_secs(3600));
        std::fs::write(directory.path().join("node.json"), "{").unwrap();
        let machine = Machine::open(Options::for_test(directory.path()), Vec::new()).await.unwrap();
        let leave = LeaveSwarmRequest { force: false };
        let refused = machine.leave_swarm(Request::new(leave)).await.unwrap_err();
        assert!(refused.message().contains("--force"), "{refused}");
        assert!(matches!(machine.membership(), Membership::Failed(_)));
        machine.stop().await;
    }
}
