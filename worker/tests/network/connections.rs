//! The kernel's table of connections, as nodes read and change it.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use skep_worker::net::conntrack::{Conntrack, Entry, Unanswered};
use skep_worker_core::network::Connection;

use crate::machine::can_run;

/// Two sockets of the loopback interface, in a network namespace where connections are tracked.
fn sockets() -> (UdpSocket, UdpSocket) {
    unshare(CloneFlags::CLONE_NEWNET).expect("root may");
    let up = ["link", "set", "lo", "up"];
    assert!(Command::new("ip").args(up).status().expect("ip").success());
    // The kernel keeps track only where some rule asks for it.
    let rule = "add table ip t; add chain ip t c { type filter hook output priority 0; }; \
                add rule ip t c ct state new counter";
    assert!(Command::new("nft").arg(rule).status().expect("nft").success());
    let bind = || UdpSocket::bind("127.0.0.1:0").expect("a port");
    (bind(), bind())
}

/// Runs a test with two sockets, client and server, and the table of their network namespace.
fn in_namespace(test: impl FnOnce(UdpSocket, UdpSocket, Conntrack) + Send + 'static) {
    if !can_run() {
        return;
    }
    let run = || {
        let (client, server) = sockets();
        test(client, server, Conntrack::open().expect("a channel"));
    };
    std::thread::spawn(run).join().expect("an end");
}

/// The one entry of the table.
#[track_caller]
fn only(entries: Vec<Entry>) -> Entry {
    let [entry] = <[Entry; 1]>::try_from(entries).expect("one entry");
    entry
}

#[test]
fn what_was_answered_since_it_was_listed_is_kept() {
    in_namespace(|client, server, mut connections| {
        let server_address = server.local_addr().expect("bound");
        client.send_to(b"question", server_address).expect("sent");
        let listed = only(connections.list_unanswered().expect("a list"));
        let SocketAddr::V4(address) = server_address else { panic!("of IPv4") };
        assert_eq!(listed.connection.destination_port, address.port());

        let from = server.recv_from(&mut [0; 8]).expect("the question").1;
        server.send_to(b"answer", from).expect("sent");
        assert_eq!(connections.list_unanswered().expect("a list"), []);
        assert!(!connections.delete_unanswered(&listed).expect("looked at"), "it was answered");
        let kept = only(connections.list().expect("a list"));
        assert!(kept.is_answered);

        connections.delete(&kept).expect("deleted");
        assert!(!connections.delete_unanswered(&listed).expect("looked at"), "there is none");
        client.send_to(b"question", server_address).expect("sent");
        let listed = only(connections.list_unanswered().expect("a list"));
        assert!(connections.delete_unanswered(&listed).expect("deleted"));
        assert_eq!(connections.list().expect("a list"), []);
    });
}

#[test]
fn a_request_is_forgotten_when_it_is_found_unanswered_twice() {
    in_namespace(|client, server, mut connections| {
        let server_address = server.local_addr().expect("bound");
        let mut unanswered = Unanswered::default();
        let mut look = |connections: &mut Conntrack| {
            let port = server_address.port();
            let is_astray = |connection: &Connection| connection.destination_port == port;
            connections.forget_unanswered(&mut unanswered, is_astray).expect("looked");
            connections.list().expect("a list").len()
        };
        let ask = || client.send_to(b"question", server_address).expect("sent");

        ask();
        assert_eq!(look(&mut connections), 1, "an answer may be under way");
        assert_eq!(look(&mut connections), 0);
        ask();
        assert_eq!(look(&mut connections), 1, "it is another one than before");
        let from = server.recv_from(&mut [0; 8]).expect("a question").1;
        server.send_to(b"answer", from).expect("sent");
        assert_eq!(look(&mut connections), 1, "it was answered in between");

        let other = UdpSocket::bind("127.0.0.1:0").expect("a port");
        client.send_to(b"question", other.local_addr().expect("bound")).expect("sent");
        let n_left = [(); 2].map(|()| look(&mut connections));
        assert_eq!(n_left, [2, 2], "what does not go astray may wait");
    });
}
