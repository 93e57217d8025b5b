//! Users: they write and read through the control API of all managers, and remember what they were told.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skep_common::Service;
use skep_common::spec::{ContainerSpec, Replicated, ServiceMode, ServiceSpec, TaskSpec};
use skep_proto::control_client::ControlClient;
use skep_proto::{
    CreateServiceRequest, GetRequest, ListRequest, RemoveServiceRequest, UpdateServiceRequest,
};
use skep_runtime::transport::{ChannelPool, Peer, Tls};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::history::{Call, Operation, Outcome};
use crate::ledger::{Ledger, Phase};
use crate::machines::{Machines, machine_of};
use crate::network::address_of;

/// The label that says which write a value is of.
const LABEL: &str = "mark";
/// Services that all clients write.
const N_KEYS: u64 = 3;
/// A client does not wait for ever.
const PATIENCE: Duration = Duration::from_millis(1500);
/// In the end every request is answered well within this: no election is due.
const PROMPT: Duration = Duration::from_secs(5);
/// Writes through each manager in the end.
const N_PROOFS: u64 = 3;

/// Names of services that must exist in the end, and of those that must not.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    /// Created and acknowledged, and not asked to be removed.
    pub(crate) exist: Vec<String>,
    /// Their removal was acknowledged.
    pub(crate) gone: Vec<String>,
}

/// One user.
#[derive(Debug)]
pub(crate) struct Client {
    number: u64,
    machines: Arc<Machines>,
    rng: StdRng,
    pool: ChannelPool,
    ledger: Arc<Ledger>,
    owed: Arc<Mutex<Owed>>,
    /// Own services that exist for sure.
    own: BTreeMap<String, String>,
    n_own: u64,
    n_marks: u64,
}

impl Client {
    /// User `number` of the swarm of these machines.
    pub(crate) fn new(
        number: u64,
        machines: Arc<Machines>,
        seed: u64,
        tls: Tls,
        ledger: Arc<Ledger>,
        owed: Arc<Mutex<Owed>>,
    ) -> Self {
        let rng = StdRng::seed_from_u64(seed ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let pool = ChannelPool::new(tls);
        let (own, n_own, n_marks) = (BTreeMap::new(), 0, 0);
        Self { number, machines, rng, pool, ledger, owed, own, n_own, n_marks }
    }

    /// Works as long as things fail, and proves in the end that all is well.
    pub(crate) async fn run(mut self) -> turmoil::Result {
        self.wait_for(Phase::Faults).await;
        while self.ledger.phase() == Phase::Faults {
            let manager = self.manager_drawn();
            match self.rng.random_range(0..10) {
                0..5 => self.update(manager).await,
                5..7 => {
                    let key = self.key_drawn();
                    self.read(manager, key).await;
                }
                7..9 => self.create(manager).await,
                _ => self.remove(manager).await,
            }
            let pause = Duration::from_millis(self.rng.random_range(5..120));
            tokio::time::sleep(pause).await;
        }
        self.wait_for(Phase::Proof).await;
        match Box::pin(self.prove()).await {
            Ok(()) => self.ledger.proved(self.number),
            Err(why) => self.ledger.violate(12, why),
        }
        Ok(())
    }

    async fn wait_for(&self, phase: Phase) {
        while self.ledger.phase() < phase {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn control(&self, manager: u64) -> ControlClient<Channel> {
        ControlClient::new(self.pool.channel(&address_of(manager), Peer::Manager))
    }

    /// The number of a machine whose manager was a voter: it may be none any more, and not know it.
    fn manager_drawn(&mut self) -> u64 {
        let voters = self.machines.voters();
        voters.get(self.rng.random_range(0..voters.len().max(1))).copied().unwrap_or(1)
    }

    fn key_drawn(&mut self) -> String {
        format!("key-{}", self.rng.random_range(0..N_KEYS))
    }

    /// Reads a key through a manager; none where there was no answer.
    async fn read(&self, manager: u64, key: String) -> Option<Option<Service>> {
        let called = self.ledger.moment();
        let request = GetRequest { kind: "service".into(), reference: key.clone() };
        let answer = asked(PATIENCE, self.control(manager).get(request)).await;
        let answered = self.ledger.moment();
        let found = match answer {
            // What a manager without a quorum last knew, as it says.
            Ok(document) if !document.get_ref().stale.is_empty() => return None,
            Ok(document) => {
                Some(serde_json::from_str::<Service>(&document.into_inner().json).ok()?)
            }
            Err(status) if status.code() == Code::NotFound => None,
            Err(_) => return None,
        };
        self.ledger.count(|counts| counts.n_reads += 1);
        let seen = found.as_ref().map(|service| (service.meta.version.index, mark_of(service)));
        self.note(manager, &format!("read {key} {seen:?}"));
        self.ledger.operation(Operation { key, called, answered, call: Call::Read(seen) });
        Some(found)
    }

    /// Makes a key, or gives it another value, by what is read through one manager and written through another.
    async fn update(&mut self, manager: u64) {
        let key = self.key_drawn();
        let Some(found) = self.read(manager, key.clone()).await else { return };
        let manager = self.manager_drawn();
        self.write(manager, key, found, PATIENCE).await;
    }

    async fn write(
        &mut self,
        manager: u64,
        key: String,
        found: Option<Service>,
        time: Duration,
    ) -> Outcome {
        self.n_marks += 1;
        let mark = self.number * 1_000_000 + self.n_marks;
        let mut spec = found.as_ref().map_or_else(|| spec(&key, 0), |service| service.spec.clone());
        spec.labels.get_or_insert_default().insert(LABEL.into(), mark.to_string());
        let spec_json = serde_json::to_string(&spec).expect("a spec has no failing parts");
        let mut control = self.control(manager);
        let called = self.ledger.moment();
        let written = match &found {
            None => {
                let request = CreateServiceRequest { spec_json };
                asked(time, control.create_service(request))
                    .await
                    .map(|made| made.into_inner().version)
            }
            Some(service) => {
                let request = UpdateServiceRequest {
                    id: service.id.to_string(),
                    version: service.meta.version.index,
                    spec_json,
                    ..UpdateServiceRequest::default()
                };
                asked(time, control.update_service(request))
                    .await
                    .map(|made| made.into_inner().version)
            }
        };
        let answered = self.ledger.moment();
        let outcome = match written {
            Ok(version) => Outcome::Done(version),
            Err(status) => outcome_of(&status),
        };
        self.count(outcome);
        let replaces = found.map(|service| service.meta.version.index);
        self.note(manager, &format!("write {key} {replaces:?} {mark} {outcome:?}"));
        let call = Call::Write { replaces, mark, outcome };
        self.ledger.operation(Operation { key, called, answered, call });
        outcome
    }

    /// Makes a service of this client's own.
    async fn create(&mut self, manager: u64) {
        self.n_own += 1;
        let name = format!("own-{}-{}", self.number, self.n_own);
        let replicas = self.rng.random_range(0..3);
        let spec_json =
            serde_json::to_string(&spec(&name, replicas)).expect("it has no failing parts");
        let request = CreateServiceRequest { spec_json };
        let made = asked(PATIENCE, self.control(manager).create_service(request)).await;
        let outcome = match &made {
            Ok(_) => Outcome::Done(0),
            Err(status) => outcome_of(status),
        };
        self.count(outcome);
        self.note(manager, &format!("create {name} {outcome:?}"));
        match made {
            Ok(made) => {
                self.owed().exist.push(name.clone());
                self.own.insert(name, made.into_inner().id);
            }
            Err(status) if outcome == Outcome::Refused => {
                self.ledger
                    .violate(1, format!("{name}, which nobody else makes, is refused: {status}"));
            }
            Err(_) => {}
        }
    }

    /// Removes one of this client's own services.
    async fn remove(&mut self, manager: u64) {
        let Some((name, id)) = self.own.pop_first() else { return };
        // Once it is asked for, nobody may count on the service.
        self.owed().exist.retain(|other| *other != name);
        let request = RemoveServiceRequest { id };
        let removed = asked(PATIENCE, self.control(manager).remove_service(request)).await;
        let outcome = match &removed {
            Ok(_) => Outcome::Done(0),
            Err(status) => outcome_of(status),
        };
        self.count(outcome);
        self.note(manager, &format!("remove {name} {outcome:?}"));
        match removed {
            Ok(_) => self.owed().gone.push(name),
            Err(status) if outcome == Outcome::Refused => {
                self.ledger
                    .violate(1, format!("{name} was acknowledged and cannot be removed: {status}"));
            }
            Err(_) => {}
        }
    }

    /// Writes and reads through every manager: all must succeed, at once.
    async fn prove(&mut self) -> Result<(), String> {
        let key = format!("proof-{}", self.number);
        let mut found = None;
        let members = self.ledger.members().unwrap_or_default();
        let managers: Vec<u64> = members.into_iter().map(machine_of).collect();
        for round in 0..N_PROOFS {
            for (at, manager) in managers.iter().copied().enumerate() {
                let outcome = self.write(manager, key.clone(), found, PROMPT).await;
                let Outcome::Done(version) = outcome else {
                    return Err(format!(
                        "write {round} through manager {manager} of a swarm without faults: {outcome:?}"
                    ));
                };
                let reader = managers[(at + 1) % managers.len()];
                found = self.read(reader, key.clone()).await.flatten();
                if found.as_ref().is_none_or(|service| service.meta.version.index != version) {
                    return Err(format!(
                        "manager {reader} does not have {key} of version {version}"
                    ));
                }
            }
        }
        for manager in managers {
            self.settle_up(manager).await?;
        }
        Ok(())
    }

    /// All that was acknowledged, to whomever, is there, and what was removed is not.
    async fn settle_up(&self, manager: u64) -> Result<(), String> {
        let mut missing = Vec::new();
        // The leader deletes what is removed once its tasks are gone.
        for _ in 0..50 {
            let request = ListRequest { kind: "service".into(), ..ListRequest::default() };
            let list = asked(PROMPT, self.control(manager).list(request)).await;
            let list =
                list.map_err(|status| format!("list through manager {manager}: {status}"))?;
            let names: Vec<String> = list
                .into_inner()
                .json
                .iter()
                .filter_map(|json| serde_json::from_str::<Service>(json).ok())
                .map(|service| service.spec.name)
                .collect();
            let remains = {
                let owed = self.owed();
                let is_missing = |name: &&String| !names.contains(name);
                missing = owed.exist.iter().filter(is_missing).cloned().collect();
                owed.gone.iter().any(|name| names.contains(name))
            };
            if missing.is_empty() && !remains {
                return Ok(());
            }
            if !missing.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if missing.is_empty() {
            return Err(format!("manager {manager} still has services that were removed"));
        }
        self.ledger.violate(
            1,
            format!("manager {manager} has lost {}, which was acknowledged", missing.join(", ")),
        );
        Ok(())
    }

    fn owed(&self) -> std::sync::MutexGuard<'_, Owed> {
        self.owed.lock().expect("nothing panics while it holds what is owed")
    }

    fn count(&self, outcome: Outcome) {
        self.ledger.count(|counts| match outcome {
            Outcome::Done(_) => counts.n_acknowledged += 1,
            Outcome::Unknown => counts.n_unknown += 1,
            Outcome::Refused => {}
        });
    }

    fn note(&self, manager: u64, what: &str) {
        self.ledger.note(&format!("client {} at {manager}: {what}", self.number));
    }
}

async fn asked<T>(
    time: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(time, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded("the client waits no longer")),
    }
}

/// Whether a write that brought this error may still take effect.
fn outcome_of(status: &Status) -> Outcome {
    match status.code() {
        Code::Aborted
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::NotFound => Outcome::Refused,
        _ => Outcome::Unknown,
    }
}

fn mark_of(service: &Service) -> u64 {
    let mark = service.spec.labels.as_ref().and_then(|labels| labels.get(LABEL));
    mark.and_then(|mark| mark.parse().ok()).unwrap_or(0)
}

fn spec(name: &str, replicas: u64) -> ServiceSpec {
    ServiceSpec {
        name: name.to_owned(),
        mode: Some(ServiceMode {
            replicated: Some(Replicated { replicas: Some(replicas) }),
            ..ServiceMode::default()
        }),
        task_template: TaskSpec {
            container_spec: Some(ContainerSpec {
                image: "none".into(),
                ..ContainerSpec::default()
            }),
            ..TaskSpec::default()
        },
        ..ServiceSpec::default()
    }
}
