//! Published ports of SCTP. What the rules do with packets is tried with packets made by hand, so that
//! the kernel need not have SCTP itself; it must be able to translate its ports.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket as sys;
use skep_worker_core::mesh::Protocol;

use crate::helper::Request;
use crate::lab::{Lab, N, TARGET_PORT, client_address, count, node_address};
use crate::machine::{can_run, skip};
use crate::{ALL, OTHER, PORT};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const IPV4_HEADER_LENGTH: usize = 20;
const LENGTH: usize = 32;

/// Sees every packet of SCTP that comes in, with its header of IPv4.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    let (family, raw) = (sys::AddressFamily::Inet, sys::SockType::Raw);
    let sctp = Some(sys::SockProtocol::Sctp);
    let socket = sys::socket(family, raw, sys::SockFlag::SOCK_CLOEXEC, sctp)?;
    Ok(socket)
}

/// What a packet with one INIT or INIT ACK says.
struct Packet {
    source: SocketAddrV4,
    destination_port: u16,
    kind: u8,
    /// What answers must carry in their header.
    tag: u32,
    /// Its window, which is used for what the answering one knows of the other.
    window: u32,
}

impl Packet {
    fn receive(socket: &OwnedFd) -> io::Result<Self> {
        let mut buffer = [0; 200];
        loop {
            let length = sys::recv(socket.as_raw_fd(), &mut buffer, sys::MsgFlags::empty())?;
            let Some(sctp) = buffer[..length].get(IPV4_HEADER_LENGTH..) else { continue };
            let Some(sctp) = sctp.first_chunk::<LENGTH>() else { continue };
            let mut unsigned = *sctp;
            unsigned[8..12].fill(0);
            assert_eq!(
                sctp[8..12],
                checksum(&unsigned).to_le_bytes(),
                "translated with its checksum"
            );
            let number = |at: usize| u32::from_be_bytes(*sctp[at..].first_chunk().expect("inside"));
            let port = |at: usize| u16::from_be_bytes([sctp[at], sctp[at + 1]]);
            let address = Ipv4Addr::from(*buffer[12..].first_chunk::<4>().expect("inside"));
            return Ok(Self {
                source: SocketAddrV4::new(address, port(0)),
                destination_port: port(2),
                kind: sctp[12],
                tag: number(16),
                window: number(20),
            });
        }
    }

    /// Sends it to `to`; its source is where answers go.
    fn send(&self, socket: &OwnedFd, to: SocketAddrV4, tag_of_other: u32) -> io::Result<()> {
        let mut packet = [0; LENGTH];
        packet[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        packet[2..4].copy_from_slice(&to.port().to_be_bytes());
        packet[4..8].copy_from_slice(&tag_of_other.to_be_bytes());
        packet[12..16].copy_from_slice(&[self.kind, 0, 0, 20]);
        packet[16..20].copy_from_slice(&self.tag.to_be_bytes());
        packet[20..24].copy_from_slice(&self.window.to_be_bytes());
        packet[24..28].copy_from_slice(&[0, 1, 0, 1]);
        let sum = checksum(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        let to = sys::SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
        sys::sendto(socket.as_raw_fd(), &packet, &to, sys::MsgFlags::empty())?;
        Ok(())
    }
}

/// CRC32c (RFC 9260, appendix A).
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| match sum & 1 {
            1 => sum >> 1 ^ 0x82f6_3b78,
            _ => sum >> 1,
        })
    })
}

/// Answers with the server's number and the client's address.
pub(crate) fn serve(socket: &OwnedFd, number: u32) {
    while let Ok(init) = Packet::receive(socket) {
        if (init.kind, init.destination_port) != (INIT, TARGET_PORT) {
            continue;
        }
        let own = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, TARGET_PORT);
        let window = u32::from(*init.source.ip());
        let ack = Packet { source: own, kind: INIT_ACK, tag: number, window, ..init };
        drop(ack.send(socket, init.source, init.tag));
    }
}

/// The server's number, and the client's address as the server saw it.
pub(crate) fn ask(address: SocketAddrV4) -> io::Result<String> {
    static PORTS: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(20_000);
    let port = PORTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let socket = socket()?;
    let patience = nix::sys::time::TimeVal::new(3, 0);
    sys::setsockopt(&socket, sys::sockopt::ReceiveTimeout, &patience)?;
    // Only a socket that is connected hears that it is refused.
    let to = sys::SockaddrIn::from(SocketAddrV4::new(*address.ip(), 0));
    sys::connect(socket.as_raw_fd(), &to)?;
    let source = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    let init = Packet { source, destination_port: 0, kind: INIT, tag: 77, window: 1500 };
    init.send(&socket, address, 0)?;
    loop {
        let answer = Packet::receive(&socket)?;
        if (answer.kind, answer.source, answer.destination_port) == (INIT_ACK, address, port) {
            return Ok(format!("{} {}", answer.tag, Ipv4Addr::from(answer.window)));
        }
    }
}

#[test]
fn associations_of_an_outside_client_reach_every_task_through_every_node() {
    if !can_run() {
        return;
    }
    let tracked = "/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_closed";
    if !std::path::Path::new(tracked).exists() {
        return skip("the kernel does not track SCTP (CONFIG_NF_CT_PROTO_SCTP)");
    }
    let mut lab = Lab::new();
    lab.protocol = Protocol::Sctp;
    for number in 1..=N {
        lab.node(number).task.ask(&Request::ServeAssociations { number: number.into() });
    }
    let conditions = lab.publish(&[(PORT, ALL), (OTHER, &[])]);
    let has_sctp = std::path::Path::new("/proc/net/sctp").exists();
    let expect = if has_sctp { 0 } else { 2 * usize::from(N) };
    assert_eq!(conditions.len(), expect, "{conditions:?}");
    let lacks = |text: &String| text.contains("/sctp could not be taken: this kernel has no SCTP");
    assert!(conditions.iter().all(lacks), "{conditions:?}");

    for through in 1..=N {
        let ask = |port| Request::Associate { address: node_address(through, port), count: 6 };
        let answers: Vec<String> = serde_json::from_value(lab.client.ask(&ask(PORT))).unwrap();
        let expect = (1..=N).map(|number| (number.to_string(), 2)).collect();
        assert_eq!(count(&answers), expect, "through {through}: {answers:?}");
        let own = client_address().to_string();
        assert!(answers.iter().all(|answer| answer.ends_with(&own)), "{answers:?}");
        let answers: Vec<String> = serde_json::from_value(lab.client.ask(&ask(OTHER))).unwrap();
        assert_eq!(answers, ["ConnectionRefused"; 6], "no healthy task");
    }
    // The next daemon takes the ports over as they are.
    lab.start(1);
    let ask = Request::Associate { address: node_address(1, PORT), count: 3 };
    let answers: Vec<String> = serde_json::from_value(lab.client.ask(&ask)).unwrap();
    assert_eq!(count(&answers).len(), usize::from(N), "{answers:?}");
}
