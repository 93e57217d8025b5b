//! This node's certificate and the roots that it trusts, as they change while it runs.
//!
//! The certificate is renewed at a random 50 to 80 % of its life, as SwarmKit does, and when the leader says so.
//!
//! # Invariants
//!
//! - What is used is on disk first: a restarted daemon knows what this node has told of itself.
//! - One change at a time: a certificate that was asked for earlier never takes a newer one's place.
//! - A node trusts the root that signed its own certificate.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use skep_proto::ca_client::CaClient;
use skep_proto::{RenewRequest, RenewResponse};
use skep_runtime::clock;
use skep_runtime::identity::{Credentials, Csr, Files, RaftKey, is_trusted_by};
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{ChannelPool, Peer, Tls};
use skep_worker::agent::Managers;
use tokio::sync::Mutex;

/// Between attempts that failed.
const RETRY: Duration = Duration::from_secs(5);

/// This node's identity, in use and on disk. Clones are the same.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) tls: Tls,
    files: Files,
    raft_key: RaftKey,
    changing: Arc<Mutex<()>>,
}

fn text(error: &(dyn std::error::Error + 'static)) -> String {
    Chain(error).to_string()
}

impl Identity {
    pub(super) fn new(tls: Tls, files: Files, raft_key: RaftKey) -> Self {
        Self { tls, files, raft_key, changing: Arc::default() }
    }

    /// Gets another certificate, for the role that the managers give this node. By which Raft id it is a manager,
    /// 0: by none; `None` where the manager asked does not say so.
    pub(super) async fn renew(
        &self,
        managers: &Managers,
        pool: &ChannelPool,
    ) -> Result<Option<u64>, String> {
        let _changing = self.changing.lock().await;
        let csr = Csr::generate().map_err(|error| text(&error))?;
        let mut why = "no manager is known".to_owned();
        for manager in managers.all() {
            let mut request = tonic::Request::new(RenewRequest { csr_pem: csr.csr_pem.clone() });
            request.set_timeout(skep_common::limits::RPC_DEADLINE);
            match CaClient::new(pool.channel(&manager, Peer::Manager)).renew(request).await {
                Ok(answer) => {
                    let RenewResponse { certificate_pem, raft_id, .. } = answer.into_inner();
                    let root_pem = self.tls.credentials().root_pem;
                    self.take(Credentials { certificate_pem, key_pem: csr.key_pem, root_pem })?;
                    return Ok(raft_id);
                }
                Err(status) => why = format!("{manager}: {}", status.message()),
            }
        }
        Err(why)
    }

    /// Trusts these roots from now on.
    async fn trust(&self, root_pem: &str) -> Result<(), String> {
        let _changing = self.changing.lock().await;
        let held = self.tls.credentials();
        if held.root_pem == root_pem {
            return Ok(());
        }
        self.take(Credentials { root_pem: root_pem.to_owned(), ..held })?;
        tracing::info!("this node trusts other roots now");
        Ok(())
    }

    fn take(&self, credentials: Credentials) -> Result<(), String> {
        let roots = &credentials.root_pem;
        let is_trusted = is_trusted_by(&credentials.certificate_pem, roots);
        if !is_trusted.map_err(|error| text(&error))? {
            return Err("its certificate would be of a root that it does not trust".to_owned());
        }
        self.files.store(&credentials, &self.raft_key).map_err(|error| text(&error))?;
        self.tls.replace(credentials).map_err(|error| text(&error))
    }
}

/// Renews the certificate for as long as the node is in its swarm.
pub(super) async fn run(identity: Identity, managers: Managers, pool: ChannelPool) {
    let mut told = managers.renewals();
    loop {
        let subject = identity.tls.subject();
        let life = subject.not_after.since(subject.not_before);
        let due = subject.not_before.after(life.mul_f64(rand::rng().random_range(0.5..0.8)));
        tokio::select! {
            () = tokio::time::sleep(due.since(clock::now())) => {}
            changed = told.changed() => if changed.is_err() {
                return; // The node ends.
            },
        }
        while let Err(why) = identity.renew(&managers, &pool).await {
            tracing::warn!(why, "failed to renew this node's certificate, trying again");
            tokio::time::sleep(RETRY).await;
        }
        let until = identity.tls.subject().not_after;
        tracing::info!(%until, "this node's certificate was renewed");
    }
}

/// Trusts what the leader says for as long as the node is in its swarm.
pub(super) async fn follow_trust(identity: Identity, managers: Managers) {
    let mut told = managers.told_trust();
    while told.changed().await.is_ok() {
        let pem = told.borrow_and_update().clone();
        let Ok(pem) = std::str::from_utf8(&pem) else {
            tracing::warn!("the leader's roots are no text: they are ignored");
            continue;
        };
        while let Err(why) = identity.trust(pem).await {
            tracing::warn!(why, "failed to trust the roots that the leader names");
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                _ = told.changed() => { told.mark_changed(); break }
            }
        }
    }
}
