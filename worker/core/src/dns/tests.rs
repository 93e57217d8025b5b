//! Tables of questions, and messages as clients send them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use skep_common::{NetworkId, ServiceId, TaskId};

use super::*;
use crate::network::{EndpointEntry, NamedPort, NetworkTable, NetworkTables, ServiceEntry};

const FRONT: NetworkId = NetworkId(1);
const BACK: NetworkId = NetworkId(2);
/// Small ids begin alike: this one has a short id of its own.
const SECOND: TaskId = TaskId(u128::MAX / 2);

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| address(text)).collect()
}

fn service(name: &str, aliases: &[&str], virtual_ips: &[&str]) -> ServiceEntry {
    ServiceEntry {
        name: name.into(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
        virtual_ips: addresses(virtual_ips),
        ports: Vec::new(),
    }
}

fn endpoint(service: u128, name: &str, serving: bool, own: &[&str]) -> EndpointEntry {
    EndpointEntry {
        service_id: ServiceId(service),
        name: name.into(),
        hostname: None,
        addresses: addresses(own),
        node_number: 1,
        serving,
    }
}

/// `front`: `web` with addresses of both families, the alias `www`, the port `Http` and two hosts in its
/// second slot, and others whose hosts are named like it, and single containers that are named like its slots; `db`, dnsrr, of whose tasks one does not serve; `idle`, dnsrr, without tasks; `www2` with the alias `www` too. `back`: another `db`.
fn directory(internal: bool) -> Directory {
    let http = NamedPort { name: "Http".into(), protocol: "tcp".into(), target_port: 8080 };
    let web = service("web", &["www"], &["10.0.1.2", "fd00:1::2"]);
    let named = |name: &str, serving, own: &str| EndpointEntry {
        hostname: Some("Host-2".into()),
        ..endpoint(1, name, serving, &[own])
    };
    let named_like = |hostname: &str, own: &str| EndpointEntry {
        hostname: Some(hostname.into()),
        ..endpoint(9, "other.1", false, &[own])
    };
    let front = NetworkTable {
        name: "Front".into(),
        internal,
        subnets: vec!["10.0.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        services: BTreeMap::from([
            (ServiceId(1), ServiceEntry { ports: vec![http], ..web }),
            (ServiceId(2), service("db", &["Store"], &[])),
            (ServiceId(3), service("idle", &[], &[])),
            (ServiceId(4), service("www2", &["www"], &["10.0.1.3"])),
        ]),
        endpoints: BTreeMap::from([
            (TaskId(11), endpoint(1, "web.1.11", true, &["10.0.1.11", "fd00:1::11"])),
            (TaskId(12), named(&format!("web.2.{}", TaskId(12)), false, "10.0.1.12")),
            (TaskId(13), named(&format!("web.2.{}", TaskId(13)), true, "10.0.1.13")),
            (TaskId(14), endpoint(1, &format!("web.3.{}", TaskId(14)), false, &["10.0.1.14"])),
            (TaskId(21), endpoint(2, "db.1.21", true, &["10.0.1.21"])),
            (SECOND, endpoint(2, "db.2.22", true, &["10.0.1.22"])),
            (TaskId(23), endpoint(2, "db.3.23", true, &["10.0.1.23"])),
            (TaskId(24), endpoint(2, "db.4.24", false, &["10.0.1.24"])),
            (TaskId(25), named_like("Web", "10.0.1.25")),
            (TaskId(26), named_like("tasks.www", "10.0.1.26")),
            (TaskId(31), endpoint(31, "Probe.1", true, &["10.0.1.31"])),
            (TaskId(32), endpoint(32, "web.2", true, &["10.0.1.32"])),
            (TaskId(33), endpoint(33, "web.3.front", true, &["10.0.1.33"])),
        ]),
        ..NetworkTable::default()
    };
    let back = NetworkTable {
        name: "back".into(),
        internal,
        subnets: vec!["10.0.2.0/24".parse().unwrap()],
        services: BTreeMap::from([(ServiceId(5), service("db", &[], &["10.0.2.5"]))]),
        ..NetworkTable::default()
    };
    let networks = BTreeMap::from([(FRONT, Arc::new(front)), (BACK, Arc::new(back))]);
    Directory::default().follow(&NetworkTables { networks, ..Default::default() })
}

/// The words of an answer.
fn words(answer: &Answer) -> String {
    match answer {
        Answer::Addresses { addresses, .. } if addresses.is_empty() => "empty".into(),
        Answer::Addresses { addresses, ttl } => {
            let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            format!("{} {ttl}s", texts.join(" "))
        }
        Answer::Name(name) => name.clone(),
        Answer::Locations(places) => {
            let text = |place: &Location| format!("{}:{}", place.target, place.port);
            places.iter().map(text).collect::<Vec<_>>().join(" ")
        }
        Answer::Unknown => "unknown".into(),
        Answer::Forward => "forward".into(),
        Answer::Refuse => "refuse".into(),
    }
}

fn ask(scope: &Scope, directory: &Directory, name: &str, kind: Kind, turn: u32) -> String {
    words(&answer(&Question { name: name.into(), kind, reversed: None }, scope, directory, turn))
}

/// Asks something of addresses.
fn ask_reversed(scope: &Scope, directory: &Directory, net: &str, kind: Kind) -> String {
    let reversed = Some(net.parse().unwrap());
    words(&answer(&Question { name: "x.arpa".into(), kind, reversed }, scope, directory, 0))
}

fn scope(networks: &[NetworkId]) -> Scope {
    Scope { networks: networks.to_vec(), ..Scope::default() }
}

#[test]
fn names_mean_what_the_networks_of_the_container_say() {
    let directory = directory(false);
    let short = SECOND.short();
    let (front, both) = (scope(&[FRONT]), scope(&[FRONT, BACK]));
    let (back_first, none) = (scope(&[BACK, FRONT]), scope(&[]));
    for (what, scope, name, kind, expect) in [
        ("a service", &front, "web", Kind::A, "10.0.1.2 5s"),
        ("its other family", &front, "web", Kind::Aaaa, "fd00:1::2 5s"),
        ("with its network", &front, "web.front", Kind::A, "10.0.1.2 5s"),
        ("with another network", &front, "web.back", Kind::A, "forward"),
        ("a family it has not", &front, "www2", Kind::Aaaa, "empty"),
        ("another kind", &front, "web", Kind::Other, "empty"),
        ("an alias of two services", &front, "www", Kind::A, "10.0.1.2 10.0.1.3 5s"),
        ("serving tasks", &front, "tasks.web", Kind::A, "10.0.1.11 10.0.1.13 0s"),
        ("of an alias", &front, "tasks.www.front", Kind::Aaaa, "fd00:1::11 0s"),
        ("dnsrr", &front, "db", Kind::A, "10.0.1.21 10.0.1.22 10.0.1.23 0s"),
        ("dnsrr by alias", &front, "store", Kind::A, "10.0.1.21 10.0.1.22 10.0.1.23 0s"),
        ("dnsrr without tasks", &front, "idle", Kind::A, "empty"),
        ("no tasks", &front, "tasks.idle", Kind::A, "empty"),
        ("a container", &front, "db.2.22", Kind::A, "10.0.1.22 0s"),
        ("one that does not serve", &front, "db.4.24.front", Kind::A, "10.0.1.24 0s"),
        ("its short id", &front, &short, Kind::A, "10.0.1.22 0s"),
        ("its host name", &front, "host-2", Kind::A, "10.0.1.12 10.0.1.13 0s"),
        ("the task of a slot", &front, "web.2", Kind::A, "10.0.1.13 0s"),
        ("one that is starting", &front, "web.3.front", Kind::A, "10.0.1.14 0s"),
        ("a container that no service made", &front, "probe.1", Kind::A, "10.0.1.31 0s"),
        ("a slot without a task", &front, "web.4", Kind::A, "forward"),
        ("the first network", &both, "db", Kind::A, "10.0.1.21 10.0.1.22 10.0.1.23 0s"),
        ("decides", &back_first, "db", Kind::A, "10.0.2.5 5s"),
        ("unless one is named", &both, "db.back", Kind::A, "10.0.2.5 5s"),
        ("a network it is not on", &none, "web", Kind::A, "forward"),
        ("a foreign name", &front, "example.com", Kind::A, "forward"),
        ("of any kind", &front, "example.com", Kind::Other, "forward"),
    ] {
        assert_eq!(ask(scope, &directory, name, kind, 0), expect, "{what}: {name}");
    }
}

#[test]
fn addresses_are_named_and_not_asked_of_others() {
    let (directory, front) = (directory(false), scope(&[FRONT]));
    let web_2 = format!("web.2.{}.Front", TaskId(12));
    for (what, net, kind, expect) in [
        ("a task's address", "10.0.1.12/32", Kind::Ptr, web_2.as_str()),
        ("its other one", "fd00:1::11/128", Kind::Ptr, "web.1.11.Front"),
        ("a service's", "10.0.1.2/32", Kind::Ptr, "web.Front"),
        ("nobody's", "10.0.1.99/32", Kind::Ptr, "unknown"),
        ("another network's", "10.0.2.5/32", Kind::Ptr, "forward"),
        ("a foreign one", "192.0.2.1/32", Kind::Ptr, "forward"),
        ("another kind", "10.0.1.12/32", Kind::A, "empty"),
        ("any kind", "fd00:1::11/128", Kind::Other, "empty"),
        ("nobody's, another kind", "10.0.1.99/32", Kind::Srv, "unknown"),
        ("the whole network", "10.0.1.0/24", Kind::Other, "empty"),
        ("a part of it", "fd00:1::/96", Kind::Ptr, "empty"),
        ("more than it", "10.0.0.0/16", Kind::Other, "forward"),
        ("another kind, a foreign one", "192.0.2.1/32", Kind::A, "forward"),
    ] {
        assert_eq!(ask_reversed(&front, &directory, net, kind), expect, "{what}: {net}");
    }
}

#[test]
fn serving_tasks_are_located_by_port() {
    let (directory, front, both) = (directory(false), scope(&[FRONT]), scope(&[BACK, FRONT]));
    let web_2 = format!("web.2.{}.Front", TaskId(13));
    let both_tasks = |port: u16| format!("web.1.11.Front:{port} {web_2}:{port}");
    let (any, http) = (both_tasks(80), both_tasks(8080));
    for (what, scope, name, kind, expect) in [
        ("a port by number", &front, "_80._tcp.web", Kind::Srv, any.as_str()),
        ("by its name", &front, "_http._tcp.web", Kind::Srv, &http),
        ("of an alias, one of whose services has it", &front, "_http._tcp.www", Kind::Srv, &http),
        ("with the network", &front, "_80._udp.web.front", Kind::Srv, &any),
        (
            "dnsrr",
            &front,
            "_1._tcp.db",
            Kind::Srv,
            "db.1.21.Front:1 db.3.23.Front:1 db.2.22.Front:1",
        ),
        ("nobody serves", &front, "_80._tcp.idle", Kind::Srv, ""),
        ("a name that it has not", &front, "_smtp._tcp.web", Kind::Srv, "unknown"),
        ("another protocol's", &front, "_http._udp.web", Kind::Srv, "unknown"),
        ("no protocol", &front, "_80._icmp.web", Kind::Srv, "unknown"),
        ("no port", &front, "_0._tcp.web", Kind::Srv, "unknown"),
        ("another kind", &front, "_80._tcp.web", Kind::A, "empty"),
        ("the first network that has it", &both, "_80._tcp.web", Kind::Srv, &any),
        ("a service's name alone", &front, "web", Kind::Srv, "empty"),
        ("a foreign service", &front, "_ldap._tcp.example.com", Kind::Srv, "forward"),
    ] {
        assert_eq!(ask(scope, &directory, name, kind, 0), expect, "{what}: {name}");
    }
}

#[test]
fn addresses_take_turns() {
    let (directory, scope) = (directory(false), scope(&[FRONT]));
    let first = |turn| ask(&scope, &directory, "db", Kind::A, turn)[..9].to_owned();
    let firsts = [0, 1, 2, 3].map(first);
    assert_eq!(firsts, ["10.0.1.21", "10.0.1.22", "10.0.1.23", "10.0.1.21"]);
}

#[test]
fn what_must_stay_inside_is_not_forwarded() {
    let (open, closed) = (directory(false), directory(true));
    let front = scope(&[FRONT]);
    let with_ndots = Scope { dotless_is_local: true, ..front.clone() };
    for (what, scope, directory, name, kind, expect) in [
        ("internal", &front, &closed, "example.com", Kind::A, "refuse"),
        ("internal, its own", &front, &closed, "web", Kind::A, "10.0.1.2 5s"),
        ("no network at all", &Scope::default(), &closed, "example.com", Kind::A, "forward"),
        ("without a dot", &front, &open, "printer", Kind::A, "forward"),
        ("with ndots", &with_ndots, &open, "printer", Kind::A, "unknown"),
        ("with ndots and a dot", &with_ndots, &open, "printer.lan", Kind::A, "forward"),
    ] {
        assert_eq!(ask(scope, directory, name, kind, 0), expect, "{what}");
    }
    assert_eq!(ask_reversed(&front, &closed, "192.0.2.1/32", Kind::Ptr), "refuse");
}

#[test]
fn a_directory_follows_its_tables() {
    let directory = directory(false);
    let known = scope(&[FRONT, BACK]);
    assert!(directory.knows(&known) && !Directory::default().knows(&known));
    assert!(Directory::default().knows(&Scope::default()), "on no network");

    let mut tables = directory.tables();
    let front = Arc::make_mut(tables.networks.get_mut(&FRONT).unwrap());
    front.services.remove(&ServiceId(3));
    let next = directory.follow(&tables);
    assert_eq!(ask(&known, &next, "idle", Kind::A, 0), "forward");
    assert!(Arc::ptr_eq(&next.networks[&BACK], &directory.networks[&BACK]), "it did not change");
}

fn message(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn read(message: &Message, transport: Transport) -> Request {
    match Request::read(&message.to_vec().unwrap(), transport) {
        Received::Question(request) => request,
        other => panic!("{other:?}"),
    }
}

fn many(count: u8) -> Answer {
    let addresses = (0..count).map(|n| IpAddr::from([10, 0, 1, n])).collect();
    Answer::Addresses { addresses, ttl: 0 }
}

fn decode(bytes: Option<Vec<u8>>) -> Message {
    Message::from_vec(&bytes.unwrap()).unwrap()
}

#[test]
fn questions_are_read_as_clients_write_them() {
    for (name, kind, expect_name, expect) in [
        ("WEB.", RecordType::A, "web", Kind::A),
        ("_x.web.", RecordType::AAAA, "_x.web", Kind::Aaaa),
        ("web\\.front.", RecordType::A, "web\\.front", Kind::A),
        ("web.", RecordType::HTTPS, "web", Kind::Other),
        ("_80._tcp.Web.", RecordType::SRV, "_80._tcp.web", Kind::Srv),
        ("web.", RecordType::PTR, "web", Kind::Ptr),
    ] {
        let request = read(&message(name, kind), Transport::Udp);
        let question = Question { name: expect_name.into(), kind: expect, reversed: None };
        assert_eq!(request.question(), &question, "{name}");
    }
    for (name, kind, expect, net) in [
        ("2.1.0.10.in-addr.arpa.", RecordType::PTR, Kind::Ptr, "10.0.1.2/32"),
        ("1.0.10.in-addr.arpa.", RecordType::A, Kind::A, "10.0.1.0/24"),
        ("1.0.0.0.0.0.d.f.ip6.arpa.", RecordType::SOA, Kind::Other, "fd00:1::/32"),
    ] {
        let request = read(&message(name, kind), Transport::Udp);
        let Question { kind, reversed, .. } = request.question();
        assert_eq!((*kind, *reversed), (expect, net.parse().ok()), "{name}");
    }
}

#[test]
fn replies_repeat_the_question_and_say_the_answer() {
    let asked = read(&message("Web.", RecordType::A), Transport::Udp);
    let reply = decode(asked.reply(&many(2)));
    assert_eq!((reply.id, reply.message_type), (7, MessageType::Response));
    assert!(reply.recursion_desired && reply.recursion_available && !reply.truncation);
    assert_eq!(reply.queries[0].name.to_ascii(), "Web.", "as it was written");
    assert_eq!(reply.answers.len(), 2);
    assert_eq!(reply.edns, None);
    for (answer, code) in [
        (Answer::Unknown, ResponseCode::NXDomain),
        (Answer::Refuse, ResponseCode::Refused),
        (many(0), ResponseCode::NoError),
    ] {
        let reply = decode(asked.reply(&answer));
        assert_eq!((reply.response_code, reply.answers.len()), (code, 0), "{answer:?}");
    }
    assert_eq!(asked.reply(&Answer::Forward), None);
    assert_eq!(decode(Some(asked.failure())).response_code, ResponseCode::ServFail);

    let asked = read(&message("2.1.0.10.in-addr.arpa.", RecordType::PTR), Transport::Udp);
    let reply = decode(asked.reply(&Answer::Name("web.front".into())));
    match &reply.answers[0].data {
        RData::PTR(name) => assert_eq!(name.0.to_ascii(), "web.front."),
        other => panic!("{other:?}"),
    }
    let reply = decode(asked.reply(&Answer::Name(format!("web.{}", "x".repeat(64)))));
    assert_eq!(reply.answers.len(), 0, "a label has 63 bytes at most");
}

#[test]
fn replies_have_the_size_that_is_asked_for() {
    let plain = message("db.", RecordType::A);
    let mut large = plain.clone();
    large.edns.insert(Edns::new()).set_max_payload(1232);
    for (what, message, transport, expect, is_cut) in [
        ("a datagram of old", &plain, Transport::Udp, 30, true),
        ("with EDNS", &large, Transport::Udp, 75, true),
        ("a stream", &plain, Transport::Tcp, 200, false),
    ] {
        let asked = read(message, transport);
        let bytes = asked.reply(&many(200)).unwrap();
        assert!(bytes.len() <= asked.limit(), "{what}");
        let reply = decode(Some(bytes));
        assert_eq!((reply.answers.len(), reply.truncation), (expect, is_cut), "{what}");
        assert_eq!(reply.edns.is_some(), message.edns.is_some(), "{what}");
    }
    let mut boundless = plain.clone();
    boundless.edns.insert(Edns::new()).set_max_payload(u16::MAX);
    assert_eq!(read(&boundless, Transport::Udp).limit(), 65_507, "no datagram has more");
    // A long name, more often than the encoder abbreviates it.
    let many = |count: u32| {
        let addresses = (0..count).map(|n| IpAddr::from(n.to_be_bytes())).collect();
        Answer::Addresses { addresses, ttl: 0 }
    };
    let mut long = message(&format!("{}.", "x".repeat(63)), RecordType::A);
    long.edns.insert(Edns::new()).set_max_payload(4096);
    for (transport, count, is_cut) in [(Transport::Udp, 250, true), (Transport::Tcp, 5000, false)] {
        let asked = read(&long, transport);
        let bytes = asked.reply(&many(count)).unwrap();
        let room = asked.limit() - bytes.len();
        assert!(room < 80, "one more would have fitted: {room}");
        let reply = decode(Some(bytes));
        assert!(reply.answers.len() > 120 && reply.answers.len() < count as usize);
        assert_eq!((reply.truncation, reply.edns.is_some()), (is_cut, true));
    }
}

#[test]
fn places_come_with_their_addresses_where_there_is_room() {
    let places = |count: u8| {
        let place = |n: u8| Location {
            target: format!("web.{n}.front"),
            port: 80,
            addresses: vec![IpAddr::from([10, 0, 1, n]), address("fd00:1::1")],
        };
        Answer::Locations((0..count).map(place).collect())
    };
    let asked = read(&message("_80._tcp.web.", RecordType::SRV), Transport::Udp);
    let reply = decode(asked.reply(&places(2)));
    let RData::SRV(first) = &reply.answers[0].data else { panic!("{:?}", reply.answers) };
    assert_eq!((first.port, first.target.to_ascii().as_str()), (80, "web.0.front."));
    assert_eq!((first.priority, first.weight, reply.answers[0].ttl), (0, 0, 0));
    let owners: Vec<String> = reply.additionals.iter().map(|one| one.name.to_ascii()).collect();
    assert_eq!(owners, ["web.0.front.", "web.0.front.", "web.1.front.", "web.1.front."]);
    for (count, expect, is_cut) in [(8, 8, false), (40, 15, true)] {
        let bytes = asked.reply(&places(count)).unwrap();
        assert!(bytes.len() <= 512);
        let reply = decode(Some(bytes));
        let counts = (reply.answers.len(), reply.additionals.len(), reply.truncation);
        assert_eq!(counts, (expect, 0, is_cut), "{count} places");
    }
}

#[test]
fn what_is_no_question_gets_an_error_or_nothing() {
    let good = message("web.", RecordType::A);
    let code = |bytes: &[u8]| match Request::read(bytes, Transport::Udp) {
        Received::Question(_) => "question".to_owned(),
        Received::Wrong(reply) => format!("{:?}", decode(Some(reply)).response_code),
        Received::Nothing => "nothing".to_owned(),
    };
    let edited = |edit: fn(&mut Message)| {
        let mut message = good.clone();
        edit(&mut message);
        message.to_vec().unwrap()
    };
    let bytes = edited(|_| ());
    // Code 16 has two names: here it is BADVERS.
    for (what, bytes, expect) in [
        ("a question", bytes.clone(), "question"),
        ("a cut header", bytes[..11].to_vec(), "nothing"),
        ("a cut question", bytes[..bytes.len() - 1].to_vec(), "FormErr"),
        ("a reply", edited(|m| m.metadata.message_type = MessageType::Response), "nothing"),
        ("an update", edited(|m| m.metadata.op_code = OpCode::Update), "NotImp"),
        ("two questions", edited(|m| m.queries.push(m.queries[0].clone())), "FormErr"),
        ("another class", edited(|m| m.queries[0].query_class = DNSClass::CH), "NotImp"),
        (
            "a later EDNS",
            edited(|m| {
                m.edns.insert(Edns::new()).set_version(1);
            }),
            "BADSIG",
        ),
        ("nothing", Vec::new(), "nothing"),
    ] {
        assert_eq!(code(&bytes), expect, "{what}");
    }
    // Announces 65535 questions.
    let mut lying = bytes;
    lying[4..6].fill(0xff);
    assert_eq!(code(&lying), "FormErr");
}

#[test]
fn foreign_replies_are_checked_and_cut() {
    let asked = message("example.com.", RecordType::A);
    let request = read(&asked, Transport::Udp);
    let asked = asked.to_vec().unwrap();
    let reply = request.reply(&many(20)).unwrap();
    assert!(answers(&reply, &asked) && !answers(&asked, &asked));
    assert!(!answers(&with_id(reply.clone(), 8), &asked), "another id");
    assert!(answers(&with_id(with_id(reply.clone(), 8), 7), &asked));
    let mut other = reply.clone();
    other[14] = b'y';
    assert!(!answers(&other, &asked), "another name");
    let bare = Message::error_msg(7, OpCode::Query, ResponseCode::Refused).to_vec().unwrap();
    assert!(answers(&bare, &asked), "it repeats no question");
    assert!(is_failure(&bare) && !is_failure(&reply));

    assert_eq!(cut(reply.clone(), 512), reply);
    let short = decode(Some(cut(reply.clone(), 100)));
    assert!(short.truncation && short.answers.is_empty());
    assert_eq!(short.queries, decode(Some(reply)).queries);
}
