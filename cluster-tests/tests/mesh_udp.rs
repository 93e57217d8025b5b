//! Published ports of UDP on a real swarm: turns, the client's own address, and flows that move on.

#![expect(clippy::unwrap_used, reason = "a test's helpers panic as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skep_cluster_tests::{Lab, LabOptions, SETTLES_WITHIN, Whoami, is_root_or_skip, wait_until};

const PORT: u16 = 5300;
const SERVICE: &str = "echo_echo";
const N_TASKS: usize = 3;
/// A busy machine answers late; what is lost is not answered at all.
const PATIENCE: Duration = Duration::from_secs(5);

const STACK: &str = r#"
services:
  echo:
    image: IMAGE
    ports: ["5300:8080/udp"]
    environment:
      TASK_SLOT: "{{.Task.Slot}}"
      SERVICE_NAME: "{{.Service.Name}}"
    healthcheck:
      test: ["CMD", "/whoami", "healthcheck"]
      interval: 1s
      timeout: 20s
      retries: 5
    deploy:
      replicas: 3
      restart_policy: {delay: 1s}
"#;

#[test]
fn datagrams_take_turns_and_move_on_when_their_task_is_gone() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    lab.deploy_whoami("echo", STACK);
    lab.wait_until_settled("n1", SERVICE, N_TASKS);
    turns_through_every_node(&lab);
    a_killed_task_loses_its_clients_to_others(&lab);
    lab.wait_until_settled("n1", SERVICE, N_TASKS);
    a_drained_task_loses_its_clients_to_others(&lab);
    nobody_is_left(&lab);
    lab.down();
}

/// A client with a port of its own.
struct Sender(UdpSocket);

impl Sender {
    fn to(address: Ipv4Addr) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect(SocketAddrV4::new(address, PORT)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    /// The lines of the answer to a datagram of the given number.
    fn ask(&self, number: usize) -> std::io::Result<BTreeMap<String, String>> {
        let mut buffer = [0; 2000];
        self.0.send(number.to_string().as_bytes())?;
        loop {
            let length = self.0.recv(&mut buffer)?;
            let text = String::from_utf8_lossy(&buffer[..length]);
            let pairs = text.lines().filter_map(|line| line.split_once(": "));
            let answer: BTreeMap<String, String> =
                pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            if answer["Path"] == number.to_string() {
                return Ok(answer);
            }
        }
    }
}

fn turns_through_every_node(lab: &Lab) {
    let own = lab.client().address().to_string();
    for node in ["n1", "n2", "n3"] {
        let address = lab.node(node).address();
        let answers: Vec<BTreeMap<String, String>> = lab.in_network_of_client(move || {
            (0..2 * N_TASKS).map(|number| Sender::to(address).ask(number).unwrap()).collect()
        });
        let mut slots: BTreeMap<&str, usize> = BTreeMap::new();
        for answer in &answers {
            *slots.entry(&answer["Slot"]).or_default() += 1;
        }
        assert_eq!(slots, BTreeMap::from([("1", 2), ("2", 2), ("3", 2)]), "{node}: {answers:#?}");
        let clients: BTreeSet<&str> =
            answers.iter().map(|a| a["Client"].rsplit_once(':').unwrap().0).collect();
        assert_eq!(clients, BTreeSet::from([own.as_str()]), "what tasks see through {node}");
    }
}

/// The task that has the slot, on whichever node.
fn task_of(lab: &Lab, slot: &str) -> Whoami {
    let mut tasks = lab.whoamis_of(SERVICE).into_iter();
    tasks.find(|task| task.environment["TASK_SLOT"] == slot).unwrap()
}

/// Messages of ICMP that a destination was not reached, in the calling thread's network.
fn unreachable_count() -> usize {
    let table = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Icmp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "InDestUnreachs").unwrap().1.parse().unwrap()
}

/// Sends from one port until another task than the first one answers, then still more, all of which
/// that one must answer. `act` makes the first one go. Gives how many were lost.
fn keep_sending(lab: &Lab, through: &str, act: impl FnOnce(&str) + Send) -> usize {
    let address = lab.node(through).address();
    lab.in_network_of_client(move || {
        let sender = Sender::to(address);
        let first = sender.ask(0).unwrap()["Slot"].clone();
        assert_eq!(sender.ask(1).unwrap()["Slot"], first, "one client stays with one task");
        let before = unreachable_count();
        act(&first);
        // What is lost is lost soon, and must not keep the rest.
        sender.0.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let (mut number, mut n_lost) = (1, 0);
        let second = wait_until(SETTLES_WITHIN, "another task answers", || {
            number += 1;
            let answer = sender.ask(number);
            n_lost += usize::from(answer.is_err());
            let other = answer.as_ref().ok().map(|a| &a["Slot"]).filter(|slot| **slot != first);
            (other.cloned(), format!("{n_lost} lost, the last answer: {answer:?}"))
        });
        sender.0.set_read_timeout(Some(PATIENCE)).unwrap();
        for _ in 0..100 {
            number += 1;
            assert_eq!(sender.ask(number).unwrap()["Slot"], second, "it stays with the other one");
        }
        let n_errors = unreachable_count() - before;
        assert!(n_errors <= n_lost, "{n_errors} ICMP errors for {n_lost} lost datagrams");
        n_lost
    })
}

fn a_killed_task_loses_its_clients_to_others(lab: &Lab) {
    let kill_it = |slot: &str| {
        let pid = i32::try_from(task_of(lab, slot).pid).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    };
    let n_lost = keep_sending(lab, "n1", kill_it);
    eprintln!("-- {n_lost} datagrams were lost with a task that was killed");
}

fn a_drained_task_loses_its_clients_to_others(lab: &Lab) {
    let n_lost = keep_sending(lab, "n2", |slot| {
        // The task's node is drained: its task is withdrawn, and ended when all nodes know.
        let node = task_of(lab, slot).node;
        lab.node("n1").skep(&["node", "update", "--availability", "drain", &node]).ok();
    });
    assert!(n_lost <= 1, "{n_lost} datagrams were lost; only one is under way at a time");
}

fn nobody_is_left(lab: &Lab) {
    let address = lab.node("n2").address();
    lab.node("n1").skep(&["service", "scale", "--detach", &format!("{SERVICE}=0")]).ok();
    lab.in_network_of_client(move || {
        let sender = Sender::to(address);
        wait_until(SETTLES_WITHIN, "the port refuses", || {
            let error = sender.ask(0).err().map(|error| error.kind());
            let is_refused = error == Some(std::io::ErrorKind::ConnectionRefused);
            (is_refused.then_some(()), format!("{error:?}"))
        });
    });
}
