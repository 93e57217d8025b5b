//! Listens to a wire: which packets go over it, and whether something can be read in them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket as sys;

/// Room for all that a test sends before it looks.
const BUFFER_BYTES: usize = 256 << 20;

/// A socket that gets every packet of an interface, in both directions.
pub(crate) struct Capture {
    socket: OwnedFd,
    interface: usize,
}

impl Capture {
    /// Begins to listen, in the namespace of the calling thread.
    pub(crate) fn start(interface: &str) -> io::Result<Self> {
        let flags = sys::SockFlag::SOCK_CLOEXEC | sys::SockFlag::SOCK_NONBLOCK;
        let all = Some(sys::SockProtocol::EthAll);
        let socket = sys::socket(sys::AddressFamily::Packet, sys::SockType::Raw, flags, all)?;
        sys::setsockopt(&socket, sys::sockopt::RcvBufForce, &BUFFER_BYTES)?;
        let interface = usize::try_from(nix::net::if_::if_nametoindex(interface)?).expect("small");
        Ok(Self { socket, interface })
    }

    /// What came since the last time, by kind.
    pub(crate) fn counts(&self, clear: &[u8]) -> io::Result<BTreeMap<String, usize>> {
        let mut counts = BTreeMap::new();
        let mut frame = vec![0; 1 << 16];
        loop {
            let received = sys::recvfrom::<sys::LinkAddr>(self.socket.as_raw_fd(), &mut frame);
            let (length, from) = match received {
                Err(nix::errno::Errno::EAGAIN) => return Ok(counts),
                received => received?,
            };
            if from.is_some_and(|from| from.ifindex() == self.interface) {
                *counts.entry(kind(&frame[..length], clear)).or_default() += 1;
            }
        }
    }
}

fn kind(frame: &[u8], clear: &[u8]) -> String {
    if frame.windows(clear.len()).any(|part| part == clear) {
        return "clear".to_owned();
    }
    let number = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    match number(12) {
        0x0800 if frame[23] == 17 => format!("udp {}", number(34).min(number(36))),
        0x0800 if frame[23] == 2 => "neighbours".to_owned(), // IGMP.
        0x0800 => format!("ip protocol {}", frame[23]),
        0x0806 => "neighbours".to_owned(),
        0x86dd if [0, 58].contains(&frame[20]) => "neighbours".to_owned(), // ICMPv6, and MLD.
        other => format!("ethernet {other:04x}"),
    }
}
