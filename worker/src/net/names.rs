//! Where the questions of a container for names come to: two sockets in its own namespace.
//!
//! ```text
//! output -100  ip daddr 127.0.0.11 udp dport 53 ──► dnat to 127.0.0.11:PORT, the datagram socket
//!              ip daddr 127.0.0.11 tcp dport 53 ──► dnat to 127.0.0.11:PORT, the listener
//! ```
//!
//! Port 53 itself stays free: an image that is a name server binds it on all addresses. The sockets belong
//! to whoever holds them, in whichever namespace that is. `redirect` would lead to 127.0.0.1.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};

use super::Error;
use super::namespace::Home;
use super::nft::expression as rule;
use super::nft::{Batch, CommitError, Expression, Hook, NftChannel};
use super::thread::KernelThread;

/// The resolver of containers that are on overlay networks; Docker's.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

const PORT: u16 = 53;
const TABLE: &str = "skep-names";
const CHAIN: &str = "output";
const OUTPUT: Hook = Hook { kind: "nat", number: 3, priority: -100, drops_by_default: false };
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The sockets that a container's questions come to. Neither blocks.
#[derive(Debug)]
pub struct NameSockets {
    /// One question a datagram.
    pub udp: UdpSocket,
    /// Questions over streams.
    pub tcp: TcpListener,
}

impl NameSockets {
    /// The same sockets once more.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { udp: self.udp.try_clone()?, tcp: self.tcp.try_clone()? })
    }
}

/// Makes the sockets in a container's namespace, whose loopback is up, and leads its questions there.
pub async fn open(task_id: &str, pid: u32) -> Result<NameSockets, Error> {
    let task_id = task_id.to_owned();
    let open = move || {
        let home = Home::here()?;
        let namespace = home.of_container(&task_id, pid)?;
        home.within(&namespace, open_here)?.map(|sockets| ((), sockets))
    };
    // The thread enters the container's namespace, and ends with its handle.
    let (_, sockets) = KernelThread::start("skep-names", open).await?;
    Ok(sockets)
}

fn open_here() -> Result<NameSockets, Error> {
    let failed = |e: io::Error| Error::kernel(format!("listen for questions on {RESOLVER}"), e);
    let any = SocketAddrV4::new(RESOLVER, 0);
    let udp = UdpSocket::bind(any).map_err(failed)?;
    let tcp = TcpListener::bind(any).map_err(failed)?;
    udp.set_nonblocking(true).and_then(|()| tcp.set_nonblocking(true)).map_err(failed)?;
    let udp_port = udp.local_addr().map_err(failed)?.port();
    let tcp_port = tcp.local_addr().map_err(failed)?.port();
    let mut channel = NftChannel::open()?;
    match channel.commit(&rules(udp_port, tcp_port), None) {
        Ok(()) => Ok(NameSockets { udp, tcp }),
        Err(CommitError::Refused(error)) => Err(error),
        // Only commits that name a generation can be outdated.
        Err(CommitError::Outdated) => Err(Error::Contended { attempts: 1 }),
    }
}

/// The table, also where an earlier attempt left one.
fn rules(udp_port: u16, tcp_port: u16) -> Batch {
    let mut batch = Batch::new();
    batch.add_table(TABLE);
    batch.delete_table(TABLE);
    batch.add_table(TABLE);
    batch.add_chain(TABLE, CHAIN, Some(&OUTPUT));
    for (protocol, port, comment) in [(UDP, udp_port, "names"), (TCP, tcp_port, "names by TCP")] {
        let mut list: Vec<Expression> = rule::destination(RESOLVER).into();
        list.extend(rule::transport_protocol(protocol));
        list.extend(rule::destination_port(PORT));
        list.extend(rule::translate_to(SocketAddr::new(RESOLVER.into(), port)));
        batch.add_rule(TABLE, CHAIN, &list, comment);
    }
    batch
}
