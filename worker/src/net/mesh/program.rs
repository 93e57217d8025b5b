//! Which program holds a port.

use std::fmt;
use std::fs;
use std::path::Path;

use skep_worker_core::mesh::{PortKey, Protocol};

/// The socket state `TCP_LISTEN` in `/proc/net/tcp`, which sockets of UDP never have.
const LISTEN: &str = "0A";

/// A command line in a message is cut to this length.
const COMMAND_LENGTH_MAX: usize = 120;

/// A program that holds a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its process id, as this node counts.
    pub pid: u32,
    /// Its command line, or its name where it shows none.
    pub command: String,
    /// Its socket's number on this node.
    pub socket: u64,
}

impl Program {
    /// Whether it still has that socket.
    pub(super) fn holds_still(&self) -> bool {
        has_open(self.pid, &link_of(self.socket))
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

/// The program that holds a port in the calling thread's network namespace.
///
/// `None` where the kernel does not show it: a socket that is bound and does not listen is in no
/// list, and a socket of the kernel itself belongs to no process.
pub(super) fn holder_of(port: PortKey) -> Option<Program> {
    let inodes = socket_inodes(port);
    if inodes.is_empty() {
        return None;
    }
    let mut processes: Vec<u32> = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    processes.sort_unstable();
    inodes.iter().find_map(|inode| {
        let wanted = link_of(*inode);
        let pid = processes.iter().copied().find(|pid| has_open(*pid, &wanted))?;
        Some(Program { pid, command: command_of(pid), socket: *inode })
    })
}

/// The same, where it was `known` before: all processes are looked through only if that has let go of it.
pub(super) fn holder_after(port: PortKey, known: Option<&Program>) -> Option<Program> {
    let known = known.filter(|known| known.holds_still()).cloned();
    known.or_else(|| holder_of(port))
}

/// Inodes of the sockets on a local port, those that listen first.
fn socket_inodes(port: PortKey) -> Vec<u64> {
    let mut found = Vec::new();
    if port.protocol == Protocol::Sctp {
        let text = fs::read_to_string("/proc/thread-self/net/sctp/eps").unwrap_or_default();
        let inodes = text.lines().skip(1).filter_map(|line| endpoint_of(line, port.port));
        return inodes.filter(|inode| *inode != 0).collect();
    }
    for family in ["", "6"] {
        let table = format!("/proc/thread-self/net/{}{family}", port.protocol);
        let text = fs::read_to_string(table).unwrap_or_default();
        found.extend(text.lines().skip(1).filter_map(|line| socket_of(line, port.port)));
    }
    found.sort_by_key(|(is_listening, _)| !is_listening);
    found.into_iter().map(|(_, inode)| inode).filter(|inode| *inode != 0).collect()
}

/// Whether the socket in a line of `/proc/net/tcp`, or of a table of that form, listens, and its inode, if it is on `port`.
fn socket_of(line: &str, port: u16) -> Option<(bool, u64)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
    if u16::from_str_radix(local_port, 16).ok()? != port {
        return None;
    }
    Some((*fields.get(3)? == LISTEN, fields.get(9)?.parse().ok()?))
}

/// The inode of the socket in a line of `/proc/net/sctp/eps`, if it is on `port`.
fn endpoint_of(line: &str, port: u16) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let is_on_port = fields.get(5)?.parse() == Ok(port);
    fields.get(7)?.parse().ok().filter(|_| is_on_port)
}

fn link_of(socket: u64) -> String {
    format!("socket:[{socket}]")
}

fn has_open(pid: u32, wanted: &str) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let mut targets = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    targets.any(|target| target == Path::new(wanted))
}

fn command_of(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    if words.is_empty() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        return printable(name.trim());
    }
    printable(&words.join(" "))
}

/// The beginning of a program's own words, which must not be obeyed by the terminal that shows them.
fn printable(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
    shown.take(COMMAND_LENGTH_MAX).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_line_of_the_socket_table_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  \
                    1000        0 123456 1 0000000000000000 100 0 0 10 0";
        assert_eq!(socket_of(line, 8080), Some((true, 123_456)));
        assert_eq!(socket_of(line, 8081), None);
        assert_eq!(socket_of("nonsense", 8080), None);

        // The columns: ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS.
        let line = "ffff8881 ffff8882 2   10  29   5000    0 123457 127.0.0.1 10.0.0.1 ";
        assert_eq!(endpoint_of(line, 5000), Some(123_457));
        assert_eq!(endpoint_of(line, 5001), None);
        assert_eq!(endpoint_of("nonsense", 5000), None);
    }

    #[test]
    fn what_a_program_calls_itself_moves_no_cursor() {
        assert_eq!(
            printable("nginx -g \u{1b}[2Jx\r\ny\u{9b}1m"),
            "nginx -g \u{fffd}[2Jx\u{fffd}\u{fffd}y\u{fffd}1m"
        );
        assert_eq!(printable(&"é".repeat(500)).chars().count(), COMMAND_LENGTH_MAX);
    }

    #[test]
    fn this_test_is_found_as_a_holder() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket =
            UdpSocket::bind("[::1]:0").or_else(|_| UdpSocket::bind("127.0.0.1:0")).unwrap();
        let holder = |protocol, address: std::io::Result<std::net::SocketAddr>| {
            let program = holder_of(PortKey { protocol, port: address.unwrap().port() }).unwrap();
            assert_eq!(program.pid, std::process::id(), "{protocol}");
            assert!(program.command.contains("skep_worker"), "{program}");
            program
        };
        holder(Protocol::Udp, socket.local_addr());
        let program = holder(Protocol::Tcp, listener.local_addr());
        assert!(program.holds_still());
        let port = listener.local_addr().unwrap().port();
        let known = Program { command: "as it was".into(), ..program.clone() };
        let after = |known| holder_after(PortKey { protocol: Protocol::Tcp, port }, known);
        assert_eq!(after(Some(&known)), Some(known.clone()), "not looked for again");
        assert_eq!(after(None), Some(program.clone()));
        drop(listener);
        assert!(!program.holds_still());
        assert_eq!(after(Some(&known)), None);
    }
}
