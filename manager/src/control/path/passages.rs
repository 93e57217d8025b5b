//! The ways between two nodes of which one balances in user space: no tunnel, but TCP to the other one's daemon.

use skep_common::Node;
use skep_proto::check_path_request::Step;
use skep_proto::peer_client::PeerClient;
use skep_proto::{CheckPathRequest, NetworkCheck, PassageReport};
use skep_runtime::transport::Peer;
use tonic::Status;

use super::super::ControlService;
use super::{STEP_DEADLINE, failed, passed, silent};

/// Whether no tunnel ends on the node.
pub(super) fn are_the_way_of(node: &Node) -> bool {
    node.description.as_ref().is_some_and(|description| description.is_in_user_space())
}

/// Has each node connect to the other one's daemon.
pub(super) async fn check(control: &ControlService, from: &Node, to: &Node) -> Vec<NetworkCheck> {
    let (one, other) = tokio::join!(ask(control, from, to), ask(control, to, from));
    judge((from, one), (to, other))
}

async fn ask(control: &ControlService, node: &Node, peer: &Node) -> Result<PassageReport, Status> {
    let channel = control.inner.pool.fresh(&node.address(), Peer::Node(node.id));
    let request = CheckPathRequest {
        step: Step::Observe.into(),
        // For a version that knows no passages: it observes, and its report has none.
        peer_underlay: peer.status.addr.clone(),
        peer_number: peer.number.into(),
        self_number: node.number.into(),
        peer_daemon: peer.address(),
        ..CheckPathRequest::default()
    };
    let mut client = PeerClient::new(channel);
    let asked = async {
        let answer = client.check_path(tokio_stream::once(request)).await?;
        answer.into_inner().message().await
    };
    let report = tokio::time::timeout(STEP_DEADLINE, asked).await;
    let report = report.map_err(|_| Status::deadline_exceeded("it does not answer"))??;
    let report = report.ok_or_else(|| Status::unavailable("it ended the check"))?;
    report.passage.ok_or_else(|| Status::unimplemented("its version does not check passages"))
}

type Asked<'a> = (&'a Node, Result<PassageReport, Status>);

fn judge(one: Asked<'_>, other: Asked<'_>) -> Vec<NetworkCheck> {
    let mut checks = Vec::new();
    for (node, answer) in [&one, &other] {
        checks.push(match answer {
            Ok(_) => passed("daemon", (node.hostname(), ""), "it answers"),
            Err(why) => silent(node, why),
        });
        checks.extend(balancer(node));
    }
    for ((from, answer), (to, _)) in [(&one, &other), (&other, &one)] {
        checks.extend(answer.as_ref().ok().map(|report| passage(from, to, report)));
    }
    checks
}

/// That there is no tunnel to the node, which is no failure.
fn balancer(node: &Node) -> Option<NetworkCheck> {
    let ingress = node.description.as_ref().filter(|_| are_the_way_of(node))?.ingress.as_ref()?;
    let detail = format!("balances in user space ({})", ingress.reason);
    Some(passed("balancer", (node.hostname(), ""), detail))
}

fn passage(from: &Node, to: &Node, report: &PassageReport) -> NetworkCheck {
    let ends = (from.hostname(), to.hostname());
    let address = to.address();
    if report.failure.is_empty() {
        #[expect(clippy::cast_precision_loss, reason = "it takes far less than 2^52 ns")]
        let millis = report.connect_nanos as f64 / 1e6;
        return passed("passage", ends, format!("TCP to {address} gets through in {millis:.3} ms"));
    }
    let detail = format!("TCP to {address} does not get through: {}", report.failure);
    failed("passage", ends, detail, format!("let TCP through to {address} from {}", ends.0))
}

#[cfg(test)]
mod tests {
    use skep_common::object::{IngressBalancer, IngressDescription};

    use super::super::tests::node;
    use super::*;

    fn in_user_space(name: &str, reason: &str) -> Node {
        let mut node = node(name);
        let description = node.description.as_mut().unwrap();
        let reason = reason.into();
        let balancer = IngressBalancer::UserSpace;
        description.ingress = Some(IngressDescription { balancer, reason });
        node
    }

    #[test]
    fn there_is_no_tunnel_and_each_daemon_is_tried_from_the_other_node() {
        let (mut a, mut b) = (node("a"), in_user_space("b", "no VXLAN"));
        (a.status.addr, b.status.addr) = ("192.0.2.1".into(), "192.0.2.2".into());
        assert_eq!([&a, &b].map(are_the_way_of), [false, true]);
        let open = || Ok(PassageReport { connect_nanos: 250_000, ..PassageReport::default() });
        let closed = || {
            let failure = "connection refused".to_owned();
            Ok(PassageReport { failure, ..PassageReport::default() })
        };
        let gone = || Err(Status::unavailable("no connection"));
        let answers = ["daemon a  ok: it answers", "daemon b  ok: it answers"];
        let says = "balancer b  ok: balances in user space (no VXLAN)";
        let back = "passage b a ok: TCP to 192.0.2.1:2377 gets through in 0.250 ms";
        for (of_a, of_b, expect) in [
            (
                open(),
                open(),
                vec![
                    answers[0],
                    answers[1],
                    says,
                    "passage a b ok: TCP to 192.0.2.2:2377 gets through in 0.250 ms",
                    back,
                ],
            ),
            (
                closed(),
                open(),
                vec![
                    answers[0],
                    answers[1],
                    says,
                    "passage a b let TCP through to 192.0.2.2:2377 from a: TCP to 192.0.2.2:2377 does not get through: connection refused",
                    back,
                ],
            ),
            (
                gone(),
                open(),
                vec![
                    "daemon a  start skep on a and let TCP through to 192.0.2.1:2377 from the managers: no answer: no connection",
                    answers[1],
                    says,
                    back,
                ],
            ),
        ] {
            let line = |check: NetworkCheck| {
                let result = if check.ok { "ok".to_owned() } else { check.remedy };
                format!("{} {} {} {result}: {}", check.name, check.from, check.to, check.detail)
            };
            let checks = judge((&a, of_a), (&b, of_b));
            assert_eq!(checks.into_iter().map(line).collect::<Vec<_>>(), expect);
        }
    }
}
