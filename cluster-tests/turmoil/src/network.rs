//! The network of the simulation, as managers and clients find it.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, Stream};
use rand::RngExt as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::Timestamp;
use skep_common::spec::NodeRole;
use skep_runtime::access::Caller;
use skep_runtime::simulation::{Bytes, Dialled, Machine};
use turmoil::net::{TcpListener, TcpStream};

use crate::machines::Machines;

/// The one port of a manager.
const PORT: u16 = 2377;
/// Wall-clock time at which every run begins.
const EPOCH: Timestamp = Timestamp::from_secs(1_800_000_000);

thread_local! {
    static CHANCE: RefCell<StdRng> = RefCell::new(StdRng::seed_from_u64(0));
}

/// Has this thread's managers find the simulated machine, with chance of this seed.
pub(crate) fn install(seed: u64) {
    CHANCE.set(StdRng::seed_from_u64(seed));
    skep_runtime::simulation::install(Machine {
        now: || {
            let elapsed = turmoil::sim_elapsed().unwrap_or(Duration::ZERO);
            EPOCH.after(elapsed)
        },
        dial,
        chance: || CHANCE.with_borrow_mut(|rng| rng.random()),
    });
}

fn dial(address: &str) -> Dialled {
    let parsed = address.parse::<SocketAddr>();
    async move {
        let address = parsed.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        if !turmoil::in_simulation() {
            return Err(io::Error::other("the machine is gone"));
        }
        let stream: Box<dyn Bytes> = Box::new(TcpStream::connect(address).await?);
        Ok(stream)
    }
    .boxed()
}

/// The address of machine `number`.
pub(crate) fn ip_of(number: u64) -> IpAddr {
    let last = u8::try_from(number).expect("there are few managers");
    IpAddr::V4(Ipv4Addr::new(192, 168, 77, last))
}

/// Where it is reached, as a manager: `ip:port`.
pub(crate) fn address_of(number: u64) -> String {
    format!("{}:{PORT}", ip_of(number))
}

/// Waits for connections.
pub(crate) async fn listen() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await
}

/// Connections to a manager, each with who is at its other end: a machine with a certificate or without, or a user.
pub(crate) fn connections(
    listener: TcpListener,
    machines: Arc<Machines>,
) -> impl Stream<Item = (Box<dyn Bytes>, Caller)> {
    futures::stream::unfold((listener, machines), async |(listener, machines)| {
        let (stream, peer) = listener.accept().await.ok()?;
        let machine = machines.numbers().find(|number| ip_of(*number) == peer.ip());
        let caller = match machine.map(|number| machines.identity(number)) {
            Some(Some(identity)) => Caller::Node(identity.node_id, NodeRole::Manager),
            Some(None) => Caller::Anonymous,
            None => Caller::Local { uid: None, pid: None },
        };
        let stream: Box<dyn Bytes> = Box::new(stream);
        Some(((stream, caller), (listener, machines)))
    })
}
