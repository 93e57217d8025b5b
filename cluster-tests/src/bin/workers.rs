//! Many workers in one process, for benchmarks of managers: real agents with certificates of their own, which run
//! nothing and balance nothing.
//!
//! ```text
//! skep-workers ADDRESS TOKEN COUNT DIR
//! ```
//!
//! They join through the manager at ADDRESS and keep their tasks below DIR. Whenever an agent has a session, a line
//! says `session NUMBER NANOSECONDS`, with the time of the clock. They end with the program.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use skep_common::object::NodeDescription;
use skep_common::spec::{Platform, Resources};
use skep_proto::ca_client::CaClient;
use skep_proto::{IssueRequest, RootRequest};
use skep_runtime::identity::{Credentials, Csr, JoinToken, root_digest};
use skep_runtime::transport::{ChannelPool, Tls, connect_unverified, connect_with_root};
use skep_runtime::{TaskSet, clock, telemetry};
use skep_worker::agent::{Agent, AgentOptions, Beats, Managers, Payloads, ToldRole};
use skep_worker::executor_none::NoContainers;
use tokio::sync::watch;
use tonic::transport::Channel;

/// Joining at the same time: each makes a key here and has a certificate signed there.
const N_JOINING: usize = 32;
/// The first of the addresses that the workers say they have: nobody answers there, and nobody asks.
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

fn main() -> ExitCode {
    telemetry::init();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = runtime
        .context("failed to start the runtime")
        .and_then(|runtime| runtime.block_on(run(&words)));
    if let Err(error) = result {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

async fn run(words: &[String]) -> Result<()> {
    let [address, token, count, dir] = words else {
        bail!("usage: skep-workers ADDRESS TOKEN COUNT DIR");
    };
    let count: u32 = count.parse().context("COUNT is no number")?;
    let token: JoinToken = token.parse().context("TOKEN is no join token")?;
    let unverified = connect_unverified(address)?;
    let root_pem = CaClient::new(unverified).root(RootRequest {}).await?.into_inner().root_pem;
    if root_digest(&root_pem)? != token.root_digest {
        bail!("the token is for another swarm");
    }
    let channel = connect_with_root(address, &root_pem)?;
    let swarm = Swarm { channel, root_pem, token: token.to_string(), tasks: TaskSet::new() };
    let joining = futures::stream::iter(0..count).map(|number| swarm.join(number, Path::new(dir)));
    joining.buffer_unordered(N_JOINING).try_collect::<Vec<()>>().await?;
    println!("joined");
    std::future::pending().await
}

/// What all workers join.
struct Swarm {
    channel: Channel,
    root_pem: String,
    token: String,
    tasks: TaskSet,
}

impl Swarm {
    async fn join(&self, number: u32, dir: &Path) -> Result<()> {
        let csr = Csr::generate()?;
        let hostname = format!("w{number}");
        let addr = format!("{}:2377", Ipv4Addr::from(u32::from(FIRST_ADDRESS) + number));
        let request = IssueRequest {
            token: self.token.clone(),
            csr_pem: csr.csr_pem,
            availability: "active".to_owned(),
            advertise_addr: addr.clone(),
            hostname: hostname.clone(),
        };
        let issued = CaClient::new(self.channel.clone()).issue(request).await;
        let issued = issued.with_context(|| format!("{hostname} could not join"))?.into_inner();
        let credentials = Credentials {
            certificate_pem: issued.certificate_pem,
            key_pem: csr.key_pem,
            root_pem: self.root_pem.clone(),
        };
        let managers = Managers::new(issued.managers);
        self.say_when_there_is_a_session(number, managers.told_role());
        let options = AgentOptions {
            // Its sender is gone: a description that does not change.
            description: watch::channel(description(hostname)).1,
            addr,
            tasks_dir: dir.join(number.to_string()),
            executor: Arc::new(NoContainers::default()),
            images: None,
            payloads: Payloads::default(),
            balancers: None,
            managers,
            pool: ChannelPool::new(Tls::new(credentials)?),
            beats: Beats::AsTask,
            tasks: self.tasks.clone(),
        };
        Agent::start(options).await.context("an agent did not start")
    }

    /// Leaders tell the role with each welcome.
    fn say_when_there_is_a_session(&self, number: u32, mut told: watch::Receiver<ToldRole>) {
        self.tasks.spawn("sessions", async move {
            while told.changed().await.is_ok() {
                println!("session {number} {}", clock::now().0);
            }
        });
    }
}

fn description(hostname: String) -> NodeDescription {
    NodeDescription {
        hostname,
        platform: Platform {
            architecture: std::env::consts::ARCH.to_owned(),
            os: "linux".to_owned(),
        },
        resources: Resources {
            nano_cpus: Some(4_000_000_000),
            memory_bytes: Some(8 << 30),
            ..Resources::default()
        },
        ..NodeDescription::default()
    }
}
