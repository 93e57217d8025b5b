//! `network check`: two nodes probe the way between them at the same time, and this manager says what
//! that means.
//!
//! Both observe before either sends, and both have sent before either reports: no clock is compared.
//! What that means for encrypted networks is in `secure`; nodes that balance in user space have no tunnel,
//! and are in `passages`.

mod passages;
mod secure;

use std::time::Duration;

use skep_common::{Kind, Node, NodeId};
use skep_proto::check_path_request::Step;
use skep_proto::peer_client::PeerClient;
use skep_proto::{CheckNetworkRequest, CheckPathRequest, NetworkCheck, PathReport, ProbeCount};
use skep_runtime::transport::Peer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::error::Error;
use super::{ControlService, parse_id};

/// For each of a check's steps, which take a second at most.
const STEP_DEADLINE: Duration = Duration::from_secs(10);
/// Steps of a check.
const N_STEPS: usize = 3;

pub(super) async fn check(
    control: &ControlService,
    request: &CheckNetworkRequest,
) -> Result<Vec<NetworkCheck>, Error> {
    let state = control.read().await?;
    let node = |id: &str| -> Result<&Node, Error> {
        let node_id = NodeId(parse_id(Kind::Node, id)?);
        let missing = || Error::NotFound { kind: "node", reference: id.to_owned() };
        state.node(node_id).map(|node| &**node).ok_or_else(missing)
    };
    let (from, to) = (node(&request.from)?, node(&request.to)?);
    if from.id == to.id {
        return Err(Error::Invalid("name two nodes: there is no network between one".to_owned()));
    }
    if [from, to].into_iter().any(passages::are_the_way_of) {
        return Ok(passages::check(control, from, to).await);
    }
    let token = rand::random::<u64>() >> 1; // The highest bit is that of echoes.
    let (one, other) =
        tokio::join!(Side::open(control, from, to, token), Side::open(control, to, from, token));
    let mut checks = Vec::new();
    let (mut one, mut other) = match (one, other) {
        (Ok(one), Ok(other)) => (one, other),
        (one, other) => {
            let failures = [one.err().map(|why| (from, why)), other.err().map(|why| (to, why))];
            checks.extend(failures.into_iter().flatten().map(|(node, why)| silent(node, &why)));
            return Ok(checks);
        }
    };
    let mut reports = (PathReport::default(), PathReport::default());
    for step in [Step::Send, Step::Report] {
        let (first, second) = tokio::join!(one.step(step), other.step(step));
        match (first, second) {
            (Ok(first), Ok(second)) => reports = (first, second),
            (first, second) => {
                let failures =
                    [first.err().map(|why| (from, why)), second.err().map(|why| (to, why))];
                checks.extend(failures.into_iter().flatten().map(|(node, why)| silent(node, &why)));
                return Ok(checks);
            }
        }
    }
    for node in [from, to] {
        checks.push(passed("daemon", (node.hostname(), ""), "it answers"));
    }
    checks.extend(judge((from.hostname(), &reports.0), (to.hostname(), &reports.1)));
    Ok(checks)
}

/// One node's part in a check.
struct Side {
    requests: mpsc::Sender<CheckPathRequest>,
    reports: Streaming<PathReport>,
}

impl Side {
    /// Has a node observe.
    async fn open(
        control: &ControlService,
        node: &Node,
        peer: &Node,
        token: u64,
    ) -> Result<Self, Status> {
        let channel = control.inner.pool.fresh(&node.address(), Peer::Node(node.id));
        let (requests, stream) = mpsc::channel(N_STEPS);
        let first = CheckPathRequest {
            step: Step::Observe.into(),
            peer_underlay: peer.status.addr.clone(),
            peer_number: peer.number.into(),
            self_number: node.number.into(),
            token,
            ..CheckPathRequest::default()
        };
        let _ = requests.try_send(first); // It has room for every step.
        let mut client = PeerClient::new(channel);
        let asked = client.check_path(ReceiverStream::new(stream));
        let answer = tokio::time::timeout(STEP_DEADLINE, asked).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded("it does not answer"))?;
        let mut side = Self { requests, reports: answer?.into_inner() };
        side.answer().await?;
        Ok(side)
    }

    async fn step(&mut self, step: Step) -> Result<PathReport, Status> {
        let request = CheckPathRequest { step: step.into(), ..CheckPathRequest::default() };
        let _ = self.requests.try_send(request); // The stream says why it ended.
        self.answer().await
    }

    async fn answer(&mut self) -> Result<PathReport, Status> {
        let answer = tokio::time::timeout(STEP_DEADLINE, self.reports.message()).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded("it does not answer"))?;
        answer?.ok_or_else(|| Status::unavailable("it ended the check"))
    }
}

fn passed(name: &str, (from, to): (&str, &str), detail: impl Into<String>) -> NetworkCheck {
    NetworkCheck {
        name: name.into(),
        from: from.into(),
        to: to.into(),
        ok: true,
        detail: detail.into(),
        remedy: String::new(),
    }
}

fn failed(name: &str, ends: (&str, &str), detail: String, remedy: String) -> NetworkCheck {
    NetworkCheck { ok: false, remedy, ..passed(name, ends, detail) }
}

fn silent(node: &Node, why: &Status) -> NetworkCheck {
    let (name, address) = (node.hostname(), node.address());
    let remedy = match why.code() {
        Code::ResourceExhausted => format!("wait until the checks that {name} is in have ended"),
        Code::Unimplemented => format!("upgrade skep on {name}"),
        _ => format!("start skep on {name} and let TCP through to {address} from the managers"),
    };
    failed("daemon", (node.hostname(), ""), format!("no answer: {}", why.message()), remedy)
}

/// What the reports of two nodes mean, each direction by itself.
fn judge(one: (&str, &PathReport), other: (&str, &PathReport)) -> Vec<NetworkCheck> {
    let mut checks = Vec::new();
    for (from, to) in [(one, other), (other, one)] {
        let ends = (from.0, to.0);
        let small = smallest(&from.1.sent);
        let (arrived, passes) = (count(&to.1.arrived, small), count(&to.1.passed, small));
        let tunnel = tunnel(from, to, (arrived, passes));
        let is_open = tunnel.ok;
        checks.push(tunnel);
        if is_open {
            checks.push(loss(ends, count(&from.1.sent, small), passes));
        }
        if arrived > 0 {
            checks.push(mtu(ends, from.1, to.1));
        }
    }
    let (name, report) = one;
    if report.echoes > 0 {
        #[expect(clippy::cast_precision_loss, reason = "a round trip is far below 2^52 ns")]
        let millis = report.round_trip_nanos as f64 / 1e6;
        let detail = format!("{millis:.3} ms on average of {}", report.echoes);
        checks.push(passed("round-trip", (name, other.0), detail));
    }
    let ways = [&one.1.encryption, &other.1.encryption];
    let detail =
        if ways[0] == ways[1] { ways[0].clone() } else { format!("{} and {}", ways[0], ways[1]) };
    checks.push(passed("encryption", (name, other.0), detail));
    checks.extend(secure::judge(one, other));
    checks
}

/// The size of the burst.
fn smallest(counts: &[ProbeCount]) -> u32 {
    counts.iter().map(|count| count.size).min().unwrap_or_default()
}

fn count(counts: &[ProbeCount], size: u32) -> u32 {
    counts.iter().find(|count| count.size == size).map_or(0, |count| count.count)
}

fn tunnel(
    from: (&str, &PathReport),
    to: (&str, &PathReport),
    (arrived, passes): (u32, u32),
) -> NetworkCheck {
    if passes > 0 {
        return passed("vxlan", (from.0, to.0), "UDP 4789 gets through");
    }
    let places = (&to.1.obstacles[..], &from.1.outgoing_obstacles[..]);
    blocked("vxlan", (from.0, to.0), 4789, arrived > 0, places)
}

/// Packets to a UDP port get lost, at the interface or behind it, where these obstacles are: those of the
/// receiver and those of the sender.
fn blocked(
    name: &str,
    ends: (&str, &str),
    port: u32,
    is_arrived: bool,
    (incoming, outgoing): (&[String], &[String]),
) -> NetworkCheck {
    let (detail, culprit, obstacles) = match is_arrived {
        false => ("does not arrive at the interface", ends.0, outgoing),
        true => ("arrives at the interface and is dropped there", ends.1, incoming),
    };
    let named = match obstacles.is_empty() {
        true => String::new(),
        false => format!(": on {culprit}, {}", obstacles.join(", and ")),
    };
    let remedy = match (is_arrived, obstacles.is_empty()) {
        (_, false) => format!("let UDP {port} through there, between all nodes of the swarm"),
        (false, true) => format!(
            "look at firewalls and security groups between {} and {}: UDP {port} must pass",
            ends.0, ends.1
        ),
        (true, true) => format!("look at the firewall of {culprit}: UDP {port} must be let in"),
    };
    failed(name, ends, format!("UDP {port} {detail}{named}"), remedy)
}

fn loss(ends: (&str, &str), sent: u32, passes: u32) -> NetworkCheck {
    let lost = sent.saturating_sub(passes);
    let detail = format!("{lost} of {sent} packets lost");
    if lost == 0 {
        return passed("loss", ends, detail);
    }
    failed("loss", ends, detail, "look at the links and switches between the two".to_owned())
}

fn mtu(ends: (&str, &str), from: &PathReport, to: &PathReport) -> NetworkCheck {
    let full = from.full_size;
    if count(&to.arrived, full) > 0 {
        return passed("mtu", ends, format!("packets of {full} bytes arrive whole"));
    }
    let largest = to.arrived.iter().filter(|seen| seen.count > 0).map(|seen| seen.size).max();
    let largest = largest.unwrap_or_default();
    let next = from.sent.iter().map(|probes| probes.size).filter(|size| *size > largest).min();
    let detail = format!(
        "packets of {full} bytes do not arrive, of {largest} do, of {} do not",
        next.unwrap_or(full)
    );
    let remedy = format!(
        "raise the MTU of the links between {} and {} to {full}, or give networks the option com.docker.network.driver.mtu={}",
        ends.0,
        ends.1,
        largest.saturating_sub(50)
    );
    failed("mtu", ends, detail, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn node(name: &str) -> Node {
        let hostname = name.into();
        Node {
            id: NodeId(1),
            meta: skep_common::Meta::default(),
            spec: skep_common::spec::NodeSpec::default(),
            description: Some(skep_common::object::NodeDescription {
                hostname,
                ..Default::default()
            }),
            status: skep_common::object::NodeStatus::default(),
            manager_status: None,
            number: 1,
            role: None,
        }
    }

    fn counts(of: &[(u32, u32)]) -> Vec<ProbeCount> {
        of.iter().map(|(size, count)| ProbeCount { size: *size, count: *count }).collect()
    }

    fn healthy() -> PathReport {
        let all = counts(&[(1500, 3), (1400, 3), (128, 50)]);
        PathReport {
            full_size: 1500,
            sent: all.clone(),
            arrived: all.clone(),
            passed: all,
            echoes: 50,
            round_trip_nanos: 250_000,
            obstacles: Vec::new(),
            outgoing_obstacles: Vec::new(),
            encryption: "none".into(),
            secure: None,
            passage: None,
        }
    }

    /// A line a check, `name from to ok|failed: detail`.
    fn lines(one: &PathReport, other: &PathReport) -> Vec<String> {
        let checks = judge(("a", one), ("b", other));
        assert!(checks.iter().all(|check| check.ok == check.remedy.is_empty()));
        let line = |check: NetworkCheck| {
            let word = if check.ok { "ok" } else { "failed" };
            format!("{} {} {} {word}: {}", check.name, check.from, check.to, check.detail)
        };
        checks.into_iter().map(line).collect()
    }

    #[test]
    fn a_healthy_pair_is_ok_in_all() {
        let expect = [
            "vxlan a b ok: UDP 4789 gets through",
            "loss a b ok: 0 of 50 packets lost",
            "mtu a b ok: packets of 1500 bytes arrive whole",
            "vxlan b a ok: UDP 4789 gets through",
            "loss b a ok: 0 of 50 packets lost",
            "mtu b a ok: packets of 1500 bytes arrive whole",
            "round-trip a b ok: 0.250 ms on average of 50",
            "encryption a b ok: none",
        ];
        assert_eq!(lines(&healthy(), &healthy()), expect);
    }

    #[test]
    fn the_remedy_of_a_node_that_takes_no_part_is_that_of_its_reason() {
        let node = node("a");
        for (why, expect) in [
            (Status::resource_exhausted("busy"), "wait until the checks that a is in have ended"),
            (Status::unimplemented(""), "upgrade skep on a"),
            (
                Status::unavailable(""),
                "start skep on a and let TCP through to :2377 from the managers",
            ),
        ] {
            assert_eq!(silent(&node, &why).remedy, expect, "{why:?}");
        }
    }

    #[test]
    fn what_fails_is_said_with_who_is_in_the_way() {
        let failures = |one: &PathReport, other: &PathReport| -> Vec<String> {
            lines(one, other).into_iter().filter(|line| line.contains(" failed: ")).collect()
        };
        let mut other = healthy();
        other.passed.clear();
        other.obstacles = vec!["a rule of chain x drops UDP 4789".into()];
        assert_eq!(
            failures(&healthy(), &other),
            [
                "vxlan a b failed: UDP 4789 arrives at the interface and is dropped there: on b, a rule of chain x drops UDP 4789"
            ]
        );
        other.arrived.clear();
        let mut one = healthy();
        one.outgoing_obstacles = vec!["chain output has the policy drop".into()];
        one.obstacles = vec!["chain input has the policy drop".into()];
        assert_eq!(
            failures(&one, &other),
            [
                "vxlan a b failed: UDP 4789 does not arrive at the interface: on a, chain output has the policy drop"
            ]
        );
        let mut other = healthy();
        other.arrived = counts(&[(1400, 3), (128, 50)]);
        other.passed = counts(&[(1400, 3), (128, 47)]);
        assert_eq!(
            failures(&healthy(), &other),
            [
                "loss a b failed: 3 of 50 packets lost",
                "mtu a b failed: packets of 1500 bytes do not arrive, of 1400 do, of 1500 do not",
            ]
        );
    }
}
