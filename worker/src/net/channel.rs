//! Netlink framing: a blocking socket that sends requests and reads every answer.
//!
//! A channel belongs to the network namespace that its thread was in when it was opened, and
//! stays there. It is used from dedicated threads only, since it blocks; the kernel answers
//! within the call, so the receive timeout is reached only if it lost an answer.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// The length of a netlink message header.
pub const HEADER_LENGTH: usize = 16;

/// How long the kernel may take for one answer.
const ANSWER_TIMEOUT_SECONDS: i64 = 10;

/// How often a dump is repeated that changed while it was being read.
const DUMP_ATTEMPTS: u32 = 20;

/// Room for the answers to a large batch: an answer takes under 1 KiB of accounted memory.
const ANSWER_BUFFER_BYTES: usize = 1 << 10;

/// Requests in one datagram: should all be refused, the answers have room in a socket's buffer.
const REQUESTS_AT_ONCE: usize = 100;

/// One message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The message type.
    pub kind: u16,
    /// The header's flags.
    pub flags: u16,
    /// The number of the request it answers.
    pub sequence: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
}

/// The kernel's refusal of one request.
#[derive(Debug, thiserror::Error)]
pub struct Refusal {
    /// The error number.
    pub error: io::Error,
    /// The kernel's own explanation, where it gave one.
    pub hint: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hint {
            Some(hint) => write!(f, "{} ({hint})", self.error),
            None => write!(f, "{}", self.error),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, hint: None }
    }
}

impl Refusal {
    /// The error number, such as `libc::ENOENT`.
    pub fn errno(&self) -> Option<i32> {
        self.error.raw_os_error()
    }
}

/// A netlink socket of one protocol in one network namespace.
#[derive(Debug)]
pub struct Channel {
    socket: Socket,
    sequence: u32,
}

impl Channel {
    /// Opens a channel of `protocol` in the namespace of the calling thread.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        let timeout = TimeVal::seconds(ANSWER_TIMEOUT_SECONDS);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has the kernel check dump requests, and filter by what they name.
    pub fn set_strict(&self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// Makes room for `bytes` to be sent at once and for `answers` to be received.
    pub fn reserve(&self, bytes: usize, answers: usize) -> io::Result<()> {
        setsockopt(&self.socket, sockopt::SndBufForce, &bytes.max(1 << 18))?;
        let answer_bytes = (answers * ANSWER_BUFFER_BYTES).max(1 << 20);
        setsockopt(&self.socket, sockopt::RcvBufForce, &answer_bytes)?;
        Ok(())
    }

    /// A sequence number that no earlier request had.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Sends messages that are framed already.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.socket.send(bytes, 0)?;
        if sent != bytes.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "netlink message was cut"));
        }
        Ok(())
    }

    /// Receives the next datagram's messages.
    pub fn receive(&self) -> io::Result<Vec<Frame>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        Ok(frames(&bytes))
    }

    /// Sends one request and returns all messages up to its acknowledgement or the dump's end.
    pub fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<Frame>, Refusal> {
        for _ in 0..DUMP_ATTEMPTS {
            let (frames, is_interrupted) = self.request_once(kind, flags, body)?;
            if !is_interrupted {
                return Ok(frames);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the dump kept changing").into())
    }

    fn request_once(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
    ) -> Result<(Vec<Frame>, bool), Refusal> {
        let sequence = self.next_sequence();
        let mut message = Vec::with_capacity(HEADER_LENGTH + body.len());
        push_message(&mut message, kind, flags, sequence, body);
        self.send(&message)?;

        let (mut collected, mut is_interrupted) = (Vec::new(), false);
        loop {
            // Answers to an earlier request that failed half-way are not ours.
            for frame in self.receive()?.into_iter().filter(|f| f.sequence == sequence) {
                is_interrupted |= frame.flags & NLM_F_DUMP_INTR != 0;
                match frame.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        check_answer(&frame)?;
                        return Ok((collected, is_interrupted));
                    }
                    _ => collected.push(frame),
                }
            }
        }
    }

    /// Sends requests that each change one object, and returns the refusals with the number of the request.
    /// A refused one keeps no other from being carried out.
    pub fn request_all(
        &mut self,
        requests: &[(u16, u16, Vec<u8>)],
    ) -> io::Result<Vec<(usize, Refusal)>> {
        let (mut refusals, mut n_sent) = (Vec::new(), 0);
        for part in requests.chunks(REQUESTS_AT_ONCE) {
            let mut bytes = Vec::new();
            let first = self.sequence.wrapping_add(1);
            for (number, (kind, flags, body)) in part.iter().enumerate() {
                let is_last = number + 1 == part.len();
                // Refusals come anyway, and requests are carried out in their order.
                let flags = if is_last { flags | NLM_F_ACK } else { flags & !NLM_F_ACK };
                let sequence = self.next_sequence();
                push_message(&mut bytes, *kind, flags, sequence, body);
            }
            self.send(&bytes)?;
            let mut is_done = false;
            while !is_done {
                for frame in self.receive()?.iter().filter(|frame| frame.kind == NLMSG_ERROR) {
                    let number = frame.sequence.wrapping_sub(first) as usize;
                    if number < part.len() {
                        let refusal = check_answer(frame).err();
                        refusals.extend(refusal.map(|refusal| (n_sent + number, refusal)));
                        is_done |= number + 1 == part.len();
                    }
                }
            }
            n_sent += part.len();
        }
        Ok(refusals)
    }

    /// The raw socket, for options that this type does not cover.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        debug_assert!(self.socket.as_raw_fd() >= 0);
        self.socket.as_fd()
    }
}

/// Appends one message with its header, padded to 4 bytes.
pub fn push_message(to: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[u8]) {
    let length = u32::try_from(HEADER_LENGTH + body.len()).expect("a message is under 4 GiB");
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(flags.to_ne_bytes());
    to.extend(sequence.to_ne_bytes());
    to.extend([0; 4]); // The kernel fills in the port.
    to.extend(body);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// What an error or end-of-dump message says.
pub fn check_answer(frame: &Frame) -> Result<(), Refusal> {
    let code = frame.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 {
        return Ok(());
    }
    // The request's header follows the code, and the request itself unless it was left out.
    let mut attributes = None;
    if frame.kind == NLMSG_ERROR && frame.flags & NLM_F_ACK_TLVS != 0 {
        let length = frame.payload.get(4..8).and_then(|l| l.first_chunk());
        let request = match frame.flags & NLM_F_CAPPED {
            0 => length.map_or(HEADER_LENGTH, |l| u32::from_ne_bytes(*l) as usize),
            _ => HEADER_LENGTH,
        };
        attributes = frame.payload.get(4 + request.next_multiple_of(4)..);
    }
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let hint = attributes.and_then(|bytes| super::nft::find(bytes, NLMSGERR_ATTR_MSG));
    let hint = hint.and_then(super::nft::text).map(str::to_owned);
    Err(Refusal { error: io::Error::from_raw_os_error(code.saturating_abs()), hint })
}

fn frames(mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER_LENGTH>() {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let Some(payload) = bytes.get(HEADER_LENGTH..length) else { break };
        frames.push(Frame {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload: payload.to_vec(),
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_back_as_written() {
        let mut bytes = Vec::new();
        push_message(&mut bytes, 7, 1, 42, b"hello");
        push_message(&mut bytes, 8, 0, 43, b"");
        let read = frames(&bytes);
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].kind, read[0].flags, read[0].sequence), (7, 1, 42));
        assert_eq!(read[0].payload, b"hello");
        assert_eq!((read[1].kind, read[1].payload.len()), (8, 0));
    }

    #[test]
    fn a_cut_or_lying_length_ends_the_reading() {
        let mut bytes = Vec::new();
        push_message(&mut bytes, 7, 1, 42, b"hello");
        assert!(frames(&bytes[..18]).is_empty());
        bytes[0] = 3; // Shorter than its own header.
        assert!(frames(&bytes).is_empty());
    }

    #[test]
    fn a_refusal_carries_the_hint_of_the_kernel() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        push_message(&mut payload, 10, 0, 1, b""); // The request's header.
        payload.extend([9, 0, 1, 0]);
        payload.extend(b"oops\0\0\0\0");
        let flags = NLM_F_ACK_TLVS | NLM_F_CAPPED;
        let frame = Frame { kind: NLMSG_ERROR, flags, sequence: 1, payload };
        let refusal = check_answer(&frame).unwrap_err();
        assert_eq!(refusal.errno(), Some(libc::EINVAL));
        assert_eq!(refusal.hint.as_deref(), Some("oops"));
    }
}
