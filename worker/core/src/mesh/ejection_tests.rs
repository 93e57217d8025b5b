//! Ejection, step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;

const PORT: PortKey = PortKey { protocol: Protocol::Tcp, port: 8080 };

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn endpoint(last: u8) -> Endpoint {
    Endpoint { address: [10, 192, 4, last].into(), port: 80 }
}

fn twin_of(last: u8) -> Endpoint {
    Endpoint { address: twin([10, 192, 4, last].into()).into(), port: 80 }
}

/// A table with one port of TCP and one of UDP, and a task of that generation on each address.
fn table(backends: &[(u8, &str)]) -> MeshTable {
    let port = |protocol| PublishedPort {
        published: 8080,
        protocol,
        service_id: "web".into(),
        service: String::new(),
        proxy_protocol: None,
        backends: backends
            .iter()
            .map(|(last, task_id)| Backend {
                task_id: (*task_id).into(),
                address: [10, 192, 4, *last].into(),
                target_port: 80,
            })
            .collect(),
    };
    MeshTable {
        version: 1,
        self_number: 1,
        pool: MeshTable::default_pool(),
        slice_prefix: MeshTable::default_slice_prefix(),
        peers: vec![Peer { number: 1, underlay: [10, 98, 0, 1].into() }],
        ipv6: BTreeMap::from([(1, BTreeSet::from(["fd00::1".parse().unwrap()]))]),
        daemons: BTreeMap::new(),
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
    }
}

fn learn(ejections: &mut Ejections, backends: &[(u8, &str)]) {
    let table = table(backends);
    let (ipv4, ipv6) = (Objects::of(&table).unwrap(), Objects::twin_of(&table).unwrap().unwrap());
    ejections.learn(&table, [&ipv4, &ipv6]);
}

const THREE: &[(u8, &str)] = &[(1, "a"), (2, "b"), (3, "c")];

fn three() -> Ejections {
    let mut ejections = Ejections::default();
    learn(&mut ejections, THREE);
    ejections
}

fn times(times: &[(Endpoint, u64)]) -> Times {
    times.iter().map(|(endpoint, at)| (*endpoint, ms(*at))).collect()
}

/// Has an attempt to connect to `endpoint` fail, asked at `at`.
fn fail(ejections: &mut Ejections, endpoint: Endpoint, at: u64, reason: Reason) {
    let asked = times(&[(endpoint, at)]);
    assert_eq!(ejections.observe(&asked, &Times::new(), ms(at) + PATIENCE), [endpoint]);
    ejections.conclude(&endpoint, Outcome::Failed(reason), ms(at) + PATIENCE);
}

fn out(ejections: &Ejections) -> Vec<String> {
    ejections.left_out().iter().map(|(key, endpoint)| format!("{key} {endpoint}")).collect()
}

#[test]
fn whoever_answers_is_not_even_tried() {
    let mut ejections = three();
    for at in (1000..5000).step_by(50) {
        // The newest request is under way each time.
        let asked = times(&[(endpoint(1), at), (endpoint(2), at - 3)]);
        let answered = times(&[(endpoint(1), at - 1), (endpoint(2), at - 40)]);
        let to_try = ejections.observe(&asked, &answered, ms(at));
        assert_eq!(to_try, [], "at {at}");
    }
    // One answer is late, but comes.
    ejections.observe(&times(&[(endpoint(1), 6000)]), &Times::new(), ms(6040));
    let answered = times(&[(endpoint(1), 6045)]);
    assert_eq!(ejections.observe(&times(&[(endpoint(1), 6000)]), &answered, ms(6090)), []);
}

#[test]
fn whoever_does_not_answer_is_tried_once_and_left_out_when_that_fails() {
    let mut ejections = three();
    let asked = times(&[(endpoint(1), 990), (endpoint(2), 990)]);
    let answered = times(&[(endpoint(1), 990), (endpoint(2), 900)]);
    assert_eq!(ejections.observe(&asked, &answered, ms(1000)), []);
    assert_eq!(ejections.observe(&asked, &answered, ms(1050)), [endpoint(2)]);
    assert_eq!(ejections.observe(&asked, &answered, ms(1100)), [], "it is being tried");
    assert_eq!(out(&ejections), Vec::<String>::new(), "suspicion alone changes nothing");
    ejections.conclude(&endpoint(2), Outcome::Failed(Reason::Silent), ms(1150));
    assert_eq!(out(&ejections), ["8080/tcp 10.192.4.2:80"]);

    // It is tried again after a while, however often, and comes back with the first success.
    assert_eq!(ejections.observe(&asked, &answered, ms(1600)), []);
    for at in [1650, 2200] {
        assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(at)), [endpoint(2)]);
        ejections.conclude(&endpoint(2), Outcome::Failed(Reason::Refused), ms(at));
    }
    assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(2700)), [endpoint(2)]);
    ejections.conclude(&endpoint(2), Outcome::Accepted, ms(2705));
    assert_eq!(out(&ejections), Vec::<String>::new());
    // At once under observation again, but not for what it was asked before.
    assert_eq!(ejections.observe(&asked, &Times::new(), ms(2800)), []);
    fail(&mut ejections, endpoint(2), 2800, Reason::Refused);
    assert_eq!(out(&ejections).len(), 1);
}

#[test]
fn an_attempt_that_succeeds_is_trusted_for_a_while() {
    let mut ejections = three();
    for outcome in [Outcome::Accepted, Outcome::Unknown] {
        let mut ejections = ejections.clone();
        let asked = times(&[(endpoint(1), 1000)]);
        assert_eq!(ejections.observe(&asked, &Times::new(), ms(1050)), [endpoint(1)]);
        ejections.conclude(&endpoint(1), outcome, ms(1060));
        assert_eq!(out(&ejections), Vec::<String>::new());
        let later = times(&[(endpoint(1), 1300)]);
        assert_eq!(ejections.observe(&later, &Times::new(), ms(1360)), []);
        let later = times(&[(endpoint(1), 1600)]);
        assert_eq!(ejections.observe(&later, &Times::new(), ms(1660)), [endpoint(1)]);
    }
    // Whoever is out stays out when the node could not try.
    fail(&mut ejections, endpoint(1), 1000, Reason::Silent);
    assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(2000)), [endpoint(1)]);
    ejections.conclude(&endpoint(1), Outcome::Unknown, ms(2000));
    assert_eq!(out(&ejections).len(), 1);
    assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(2500)), [endpoint(1)]);
}

#[test]
fn the_last_backend_of_a_port_stays_and_so_all_do() {
    let mut ejections = three();
    fail(&mut ejections, endpoint(1), 1000, Reason::Refused);
    let one = ejections.left_out();
    fail(&mut ejections, endpoint(2), 1100, Reason::Silent);
    let two = ejections.left_out();
    let expect = [Change::LeftOut(PORT, endpoint(2), Reason::Silent)];
    assert_eq!(ejections.changes(&one, &two), expect);
    fail(&mut ejections, endpoint(3), 1200, Reason::Refused);
    let all = ejections.left_out();
    assert_eq!(all, BTreeSet::new());
    assert_eq!(ejections.changes(&two, &all), [Change::NoneAnswers(PORT)]);

    // The first that accepts is the one that all go to.
    assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(1550)), [endpoint(1)]);
    ejections.conclude(&endpoint(1), Outcome::Accepted, ms(1550));
    assert_eq!(out(&ejections), ["8080/tcp 10.192.4.2:80", "8080/tcp 10.192.4.3:80"]);
    let two = ejections.left_out();
    assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(1650)), [endpoint(2)]);
    ejections.conclude(&endpoint(2), Outcome::Accepted, ms(1650));
    let taken_back = [Change::TakenBack(PORT, endpoint(2))];
    assert_eq!(ejections.changes(&two, &ejections.left_out()), taken_back);
}

#[test]
fn the_versions_of_ip_are_judged_apart() {
    let mut ejections = three();
    fail(&mut ejections, twin_of(1), 1000, Reason::Refused);
    fail(&mut ejections, twin_of(2), 1000, Reason::Refused);
    fail(&mut ejections, endpoint(3), 1000, Reason::Refused);
    let left_out: Vec<Endpoint> = ejections.left_out().into_iter().map(|(_, e)| e).collect();
    assert_eq!(left_out, [endpoint(3), twin_of(1), twin_of(2)]);
    fail(&mut ejections, twin_of(3), 1100, Reason::Refused);
    assert_eq!(out(&ejections), ["8080/tcp 10.192.4.3:80"], "all of IPv6 are kept");
    assert_eq!(ejections.task_id(&twin_of(2)), "b");
}

#[test]
fn what_the_table_says_anew_is_trusted_again() {
    let mut before = three();
    fail(&mut before, endpoint(1), 1000, Reason::Refused);
    for (name, table, expect) in [
        ("the same", THREE, 1),
        ("another one comes", &[(1, "a"), (2, "b"), (3, "c"), (4, "d")][..], 1),
        ("another one goes", &[(1, "a"), (3, "c")], 1),
        ("it is alone", &[(1, "a")], 0),
        ("it goes", &[(2, "b"), (3, "c")], 0),
        ("another task has its address", &[(1, "e"), (2, "b"), (3, "c")], 0),
    ] {
        let mut ejections = before.clone();
        learn(&mut ejections, table);
        assert_eq!(out(&ejections).len(), expect, "{name}");
        assert_eq!(ejections.is_idle(), table.len() < 2, "{name}");
    }
    // It goes and comes again; an attempt that began before says nothing.
    let mut ejections = before.clone();
    assert_eq!(ejections.observe(&Times::new(), &Times::new(), ms(2000)), [endpoint(1)]);
    learn(&mut ejections, &[(2, "b"), (3, "c")]);
    let left = ejections.changes(&before.left_out(), &ejections.left_out());
    assert_eq!(left, [], "its end is its task's, not news");
    learn(&mut ejections, THREE);
    ejections.conclude(&endpoint(1), Outcome::Failed(Reason::Silent), ms(2100));
    assert_eq!(out(&ejections), Vec::<String>::new());
}

#[test]
fn ports_go_without_what_is_left_out_and_datagrams_do_not() {
    let mut ejections = three();
    fail(&mut ejections, endpoint(2), 1000, Reason::Refused);
    let mut ports = Objects::of(&table(THREE)).unwrap().ports;
    leave_out(&mut ports, &ejections.left_out());
    assert_eq!(ports[&PORT], [endpoint(1), endpoint(3)]);
    let udp = PortKey { protocol: Protocol::Udp, ..PORT };
    assert_eq!(ports[&udp].len(), 3);
}
