//! Backends that refuse or do not answer are left out by the node that saw it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::helper::Request;
use crate::lab::{Lab, N, TARGET_PORT, count, node_address, node_address6, underlay6};
use crate::machine::{can_run, skip};
use crate::{ALL, PORT};

/// Within which time of its first failure a backend gets no more connections.
const LIMIT_MS: u64 = 300;

/// A request that takes longer was sent again: the first time after a second.
const SLOW_MS: u64 = 900;

/// How long a loaded machine may take for something that is sure to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of a request of a steady stream of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// When it began, since the stream did.
    pub(crate) at_ms: u64,
    pub(crate) took_ms: u64,
    /// The answer, or the kind of error.
    pub(crate) answer: String,
}

impl Sent {
    fn is_refused(&self) -> bool {
        self.answer.starts_with("Connection")
    }

    fn is_slow(&self) -> bool {
        self.took_ms >= SLOW_MS
    }
}

/// A lab with the addresses of node 1, whose table is applied on all nodes.
fn lab() -> (Lab, Vec<SocketAddr>) {
    let mut lab = Lab::bare();
    let mut addresses = vec![node_address(1, PORT).into()];
    if skep_worker::net::host_has_ipv6() {
        lab.ipv6 = (1..=N).map(|n| (n, BTreeSet::from([underlay6(n)]))).collect();
        addresses.push(node_address6(1, PORT));
    } else {
        skip("this machine has no IPv6");
    }
    for number in 1..=N {
        lab.start(number);
        lab.attach(number);
    }
    lab.publish(&[(PORT, ALL)]);
    (lab, addresses)
}

/// A steady stream of requests, during which `act` happens to the lab.
fn stream(lab: &mut Lab, address: SocketAddr, act: impl FnOnce(&mut Lab)) -> Vec<Sent> {
    lab.client.ask(&Request::StartStream { address, count: 150, every_ms: 10 });
    act(lab);
    let sent = lab.client.ask(&Request::EndStream);
    serde_json::from_value(sent).expect("what became of each")
}

/// Asserts that all that failed, or was slow, began soon after the first that did.
#[track_caller]
fn assert_soon_over(sent: &[Sent], is_failure: impl Fn(&Sent) -> bool) {
    let failures: Vec<&Sent> = sent.iter().filter(|sent| is_failure(sent)).collect();
    let (Some(first), Some(last)) = (failures.first(), failures.last()) else {
        panic!("nothing failed: {sent:?}")
    };
    println!("{} of {} failed, in {} ms", failures.len(), sent.len(), last.at_ms - first.at_ms);
    assert!(last.at_ms - first.at_ms < LIMIT_MS, "{failures:?}");
    assert!(sent.last() != Some(*last), "the stream goes on after that: {failures:?}");
}

/// Waits until each of these nodes' tasks, and no other, answers in turn.
#[track_caller]
fn await_turns(lab: &mut Lab, address: SocketAddr, nodes: &[u16]) {
    let started = skep_runtime::clock::monotonic();
    loop {
        let answers = lab.client.get_any(address, 2 * nodes.len());
        let expect = nodes.iter().map(|number| (number.to_string(), 2)).collect();
        if count(&answers) == expect {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{answers:?}");
    }
}

#[test]
fn a_task_that_refuses_is_left_out_until_it_accepts_again() {
    if !can_run() {
        return;
    }
    let (mut lab, addresses) = lab();
    for address in addresses {
        await_turns(&mut lab, address, ALL);
        let sent = stream(&mut lab, address, |lab| {
            lab.node(2).task.ask(&Request::Refuse { port: TARGET_PORT });
        });
        assert_soon_over(&sent, Sent::is_refused);
        assert!(sent.iter().all(|sent| sent.is_refused() || !sent.is_slow()), "{sent:?}");
        await_turns(&mut lab, address, &[1, 3]);
        lab.node(2).task.ask(&Request::Accept { name: "2".into(), port: TARGET_PORT });
        await_turns(&mut lab, address, ALL);
    }
}

fn silence(address: SocketAddr) -> Request {
    match address {
        SocketAddr::V4(_) => Request::DropForwarded,
        SocketAddr::V6(_) => Request::DropForwardedIpv6,
    }
}

#[test]
fn a_task_that_is_silent_is_left_out_and_who_asked_it_gets_another() {
    if !can_run() {
        return;
    }
    let (mut lab, addresses) = lab();
    for address in addresses {
        await_turns(&mut lab, address, ALL);
        let sent = stream(&mut lab, address, |lab| {
            lab.node(3).host.ask(&silence(address));
        });
        assert_soon_over(&sent, Sent::is_slow);
        let is_answered = |sent: &Sent| !sent.answer.starts_with(char::is_alphabetic);
        assert!(
            sent.iter().all(is_answered),
            "all are answered when they are sent again: {sent:?}"
        );
        await_turns(&mut lab, address, &[1, 2]);
        // The same table again lets forwarded packets through.
        lab.publish(&[(PORT, ALL)]);
        await_turns(&mut lab, address, ALL);
    }
}

/// Looks twice at what the first node's tasks did not answer, with no time in between: what this asks is not
/// answered at all.
fn settle(lab: &mut Lab) {
    let are_needed = [(); 2].map(|()| lab.node(1).daemon.ask(&Request::Settle));
    assert_eq!(are_needed, [true, false]);
}

#[test]
fn a_request_that_was_lost_goes_elsewhere_when_its_task_is_withdrawn() {
    if !can_run() {
        return;
    }
    let (mut lab, addresses) = lab();
    for address in addresses {
        // The only task of a port is never left out for its silence.
        lab.publish(&[(PORT, &[2])]);
        lab.node(2).host.ask(&silence(address));
        let sent = stream(&mut lab, address, |lab| {
            lab.version += 1;
            let table = lab.table(1, &[(PORT, &[1])]);
            lab.node(1).daemon.ask(&Request::Apply(table));
            settle(lab);
        });
        assert!(sent.first().is_some_and(Sent::is_slow), "it was lost: {sent:?}");
        assert!(sent.iter().all(|sent| sent.answer.starts_with("1 ")), "{sent:?}");
    }
}

#[test]
fn the_last_tasks_of_a_port_are_kept() {
    if !can_run() {
        return;
    }
    let (mut lab, addresses) = lab();
    let address = addresses[0];
    for number in 1..=N {
        lab.node(number).task.ask(&Request::Refuse { port: TARGET_PORT });
        stream(&mut lab, address, |_| {});
    }
    let answers = lab.client.get_any(address, 6);
    assert_eq!(answers, ["ConnectionRefused"; 6], "as without ejection");
    lab.node(2).task.ask(&Request::Accept { name: "2".into(), port: TARGET_PORT });
    await_turns(&mut lab, address, &[2]);
    for number in [1, 3] {
        let name = number.to_string();
        lab.node(number).task.ask(&Request::Accept { name, port: TARGET_PORT });
    }
    await_turns(&mut lab, address, ALL);
}
