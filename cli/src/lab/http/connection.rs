//! One HTTP/1.1 connection, as little of it as a load client needs.
//!
//! # Sources
//!
//! RFC 9112: message parsing (2), body length (6.3), chunked coding (7.1), persistence (9.3).

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, bind, connect,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::read_bounded;

/// Longest line of a head, and most lines of it.
const LINE_LENGTH_MAX: u64 = 16 << 10;
const N_HEADERS_MAX: usize = 200;
/// Longest body that is kept.
const BODY_LENGTH_MAX: u64 = 64 << 20;

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// `Connect`, `Timeout`, `Reset`, `Closed`, `BadAnswer`, or `Other`.
    pub kind: &'static str,
    pub message: String,
}

impl Failure {
    fn new(kind: &'static str, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The connection that was to be kept is gone already.
    pub(super) fn lost() -> Self {
        Self::new("Closed", "the connection was lost before")
    }

    fn bad(message: impl Into<String>) -> Self {
        Self::new("BadAnswer", message)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "Timeout",
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
                "Reset"
            }
            ErrorKind::UnexpectedEof => "Closed",
            _ => "Other",
        };
        Self::new(kind, error.to_string())
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    pub body: String,
    /// The connection takes another request.
    pub can_go_on: bool,
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
    server: SocketAddr,
}

/// How to connect.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    /// From which port; without it the kernel chooses.
    pub port: Option<u16>,
    pub timeout: Duration,
}

/// Connects from a port.
fn connect_from(port: u16, server: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let (family, own, server): (_, Box<dyn SockaddrLike>, Box<dyn SockaddrLike>) = match server {
        SocketAddr::V4(server) => {
            let own = SockaddrIn::new(0, 0, 0, 0, port);
            (AddressFamily::Inet, Box::new(own), Box::new(SockaddrIn::from(server)))
        }
        SocketAddr::V6(server) => {
            let own = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
            let own = SockaddrIn6::from(own);
            (AddressFamily::Inet6, Box::new(own), Box::new(SockaddrIn6::from(server)))
        }
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // It bounds the time to connect, too.
    let time = TimeVal::new(timeout.as_secs().cast_signed(), timeout.subsec_micros().into());
    setsockopt(&socket, sockopt::SendTimeout, &time)?;
    bind(socket.as_raw_fd(), &*own)?;
    match connect(socket.as_raw_fd(), &*server) {
        Ok(()) => Ok(TcpStream::from(socket)),
        Err(Errno::EINPROGRESS) => Err(ErrorKind::TimedOut.into()),
        Err(error) => Err(error.into()),
    }
}

impl Connection {
    pub(super) fn open(server: SocketAddr, how: How) -> Result<Self, Failure> {
        let How { port, timeout } = how;
        let open = || -> io::Result<TcpStream> {
            let stream = match port {
                Some(port) => connect_from(port, server, timeout)?,
                None => TcpStream::connect_timeout(&server, timeout)?,
            };
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        match open() {
            Ok(stream) => Ok(Self { stream: BufReader::new(stream), server }),
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                Err(Failure::new("Timeout", "connect: no answer"))
            }
            Err(error) => Err(Failure::new("Connect", format!("connect: {error}"))),
        }
    }

    pub(super) fn get(&mut self, path: &str, keep_alive: bool) -> Result<Answer, Failure> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: {connection}\r\n\r\n",
            self.server
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_answer(&mut self.stream)
    }
}

fn read_answer(stream: &mut impl BufRead) -> Result<Answer, Failure> {
    let status_line = read_line(stream)?;
    let mut words = status_line.split(' ');
    let version = words.next().unwrap_or_default();
    let status = words.next().and_then(|word| word.parse().ok());
    let (Some(status), true) = (status, version.starts_with("HTTP/1.")) else {
        return Err(Failure::bad(format!("status line {status_line:?}")));
    };
    let mut length: Option<u64> = None;
    let (mut is_chunked, mut can_go_on) = (false, version == "HTTP/1.1");
    for n_headers in 0.. {
        let line = read_line(stream)?;
        if line.is_empty() {
            break;
        }
        if n_headers == N_HEADERS_MAX {
            return Err(Failure::bad("too many headers"));
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let number = value.parse().map_err(|_| Failure::bad(line.clone()))?;
                length = Some(number);
            }
            "transfer-encoding" => is_chunked = value.eq_ignore_ascii_case("chunked"),
            "connection" if value.eq_ignore_ascii_case("close") => can_go_on = false,
            "connection" if value.eq_ignore_ascii_case("keep-alive") => can_go_on = true,
            _ => {}
        }
    }
    let body = match (status, is_chunked, length) {
        (204 | 304, ..) => Vec::new(),
        (_, true, _) => read_chunks(stream)?,
        (_, false, Some(length)) => read_exactly(stream, length)?,
        (_, false, None) => {
            can_go_on = false;
            read_bounded(stream, BODY_LENGTH_MAX)?
        }
    };
    Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned(), can_go_on })
}

fn read_chunks(stream: &mut impl BufRead) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    loop {
        let line = read_line(stream)?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = u64::from_str_radix(size, 16).map_err(|_| Failure::bad("chunk size"))?;
        if size == 0 {
            // Trailers end as a head does.
            while !read_line(stream)?.is_empty() {}
            return Ok(body);
        }
        if body.len() as u64 + size > BODY_LENGTH_MAX {
            return Err(Failure::bad("the body is too long"));
        }
        body.extend(read_exactly(stream, size)?);
        if !read_line(stream)?.is_empty() {
            return Err(Failure::bad("no line end behind a chunk"));
        }
    }
}

fn read_exactly(stream: &mut impl BufRead, length: u64) -> Result<Vec<u8>, Failure> {
    if length > BODY_LENGTH_MAX {
        return Err(Failure::bad("the body is too long"));
    }
    let bytes = read_bounded(stream, length)?;
    match bytes.len() as u64 == length {
        true => Ok(bytes),
        false => Err(Failure::new("Closed", "closed in the middle of the body")),
    }
}

/// Reads a line without its end.
fn read_line(stream: &mut impl BufRead) -> Result<String, Failure> {
    let mut line = Vec::new();
    stream.by_ref().take(LINE_LENGTH_MAX).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return match line.len() as u64 + 1 >= LINE_LENGTH_MAX {
            true => Err(Failure::bad("a line is too long")),
            false => Err(Failure::new("Closed", "closed in the middle of the head")),
        };
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole_or_fail() {
        let check = |bytes: &str, expect: &str| {
            let mut stream = bytes.as_bytes();
            let found = match read_answer(&mut stream) {
                Ok(a) => format!("{} {:?} {} +{}", a.status, a.body, a.can_go_on, stream.len()),
                Err(failure) => failure.kind.to_owned(),
            };
            assert_eq!(found, expect, "{bytes:?}");
        };
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhixx", r#"200 "hi" true +2"#);
        check("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", "Closed");
        check("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi", r#"200 "hi" false +0"#);
        check("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", r#"200 "hi" false +0"#);
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nhi\r\n1\r\n!\r\n0\r\n\r\nrest",
            r#"200 "hi!" true +4"#,
        );
        check("HTTP/1.1 204 No Content\r\n\r\n", r#"204 "" true +0"#);
        check("HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", r#"503 "" true +0"#);
        check("", "Closed");
        check("HTTP/1.1 200 OK\r\n", "Closed");
        check("SSH-2.0\r\n\r\n", "BadAnswer");
        check("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "BadAnswer");
    }
}
