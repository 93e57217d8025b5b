//! Renews the node's certificate at a random 50 to 80 % of its life, as SwarmKit does.

use std::time::Duration;

use rand::RngExt as _;
use skep_proto::RenewRequest;
use skep_proto::ca_client::CaClient;
use skep_runtime::clock;
use skep_runtime::identity::{Credentials, Csr, Files, RaftKey};
use skep_runtime::telemetry::Chain;
use skep_runtime::transport::{ChannelPool, Peer, Tls};
use skep_worker::agent::Managers;

/// Between attempts that failed.
const RETRY: Duration = Duration::from_secs(30);

/// Runs for as long as the node is in its swarm.
pub(super) async fn run(
    tls: Tls,
    files: Files,
    raft_key: RaftKey,
    managers: Managers,
    pool: ChannelPool,
) {
    loop {
        let subject = tls.subject();
        let life = subject.not_after.since(subject.not_before);
        let due = subject.not_before.after(life.mul_f64(rand::rng().random_range(0.5..0.8)));
        tokio::time::sleep(due.since(clock::now())).await;
        while let Err(why) = renew(&tls, &files, &raft_key, &managers, &pool).await {
            tracing::warn!(why, "failed to renew this node's certificate, trying again");
            tokio::time::sleep(RETRY).await;
        }
        tracing::info!(until = %tls.subject().not_after, "this node's certificate was renewed");
    }
}

pub(super) async fn renew(
    tls: &Tls,
    files: &Files,
    raft_key: &RaftKey,
    managers: &Managers,
    pool: &ChannelPool,
) -> Result<(), String> {
    let text = |error: &(dyn std::error::Error + 'static)| Chain(error).to_string();
    let csr = Csr::generate().map_err(|error| text(&error))?;
    let mut why = "no manager is known".to_owned();
    for manager in managers.all() {
        let mut request = tonic::Request::new(RenewRequest { csr_pem: csr.csr_pem.clone() });
        request.set_timeout(skep_common::limits::RPC_DEADLINE);
        match CaClient::new(pool.channel(&manager, Peer::Manager)).renew(request).await {
            Ok(answer) => {
                let credentials = Credentials {
                    certificate_pem: answer.into_inner().certificate_pem,
                    key_pem: csr.key_pem,
                    root_pem: tls.credentials().root_pem,
                };
                files.store(&credentials, raft_key).map_err(|error| text(&error))?;
                return tls.replace(credentials).map_err(|error| text(&error));
            }
            Err(status) => why = format!("{manager}: {}", status.message()),
        }
    }
    Err(why)
}
