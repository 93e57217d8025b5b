//! What the reports of two nodes mean for the WireGuard between them.

use skep_proto::{NetworkCheck, PathReport, SecureReport};

use super::{blocked, failed, passed};

const NAME: &str = "wireguard";

/// A row a direction, or one where no encrypted network has tasks on both; none where a node's version does
/// not look at it.
pub(super) fn judge(one: (&str, &PathReport), other: (&str, &PathReport)) -> Vec<NetworkCheck> {
    let (Some(of_one), Some(of_other)) = (&one.1.secure, &other.1.secure) else {
        return Vec::new();
    };
    let (one, other) = ((one.0, of_one), (other.0, of_other));
    if !of_one.is_shared && !of_other.is_shared {
        let detail = "no encrypted network has tasks on both";
        return vec![passed(NAME, (one.0, other.0), detail)];
    }
    vec![direction(one, other), direction(other, one)]
}

/// Whether what the one sends is heard by the other.
fn direction(from: (&str, &SecureReport), to: (&str, &SecureReport)) -> NetworkCheck {
    let ends = (from.0, to.0);
    for ((name, report), other) in [(from, to.0), (to, from.0)] {
        if !report.is_shared {
            let detail =
                format!("{name} does not know of an encrypted network with tasks on {other}");
            let remedy = format!("check again; if it stays so, read the log of skep on {name}");
            return failed(NAME, ends, detail, remedy);
        }
        if report.peer_port.is_none() {
            let detail = format!("{name} knows no key of {other}");
            let remedy = format!("see what `skep node inspect {other}` says of encryption");
            return failed(NAME, ends, detail, remedy);
        }
    }
    let port = from.1.peer_port.unwrap_or_default();
    if !to.1.has_heard {
        let places = (&to.1.obstacles[..], &from.1.outgoing_obstacles[..]);
        return blocked(NAME, ends, port, to.1.arrived > 0, places);
    }
    let Some(age) = from.1.handshake_age_millis else {
        let detail = format!("UDP {port} gets through, and there is no session");
        return match from.1.has_heard {
            // The other direction is what fails.
            false => passed(NAME, ends, detail),
            true => failed(NAME, ends, detail, format!("read the log of skep on {}", from.0)),
        };
    };
    let detail = format!(
        "UDP {port} gets through; last handshake {} s ago, {} bytes sent, {} received",
        age / 1000,
        from.1.sent,
        from.1.received
    );
    passed(NAME, ends, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> SecureReport {
        SecureReport {
            is_shared: true,
            own_port: 4790,
            peer_port: Some(4791),
            handshake_age_millis: Some(12_345),
            sent: 148,
            received: 92,
            has_heard: true,
            arrived: 3,
            ..SecureReport::default()
        }
    }

    fn lines(one: SecureReport, other: SecureReport) -> Vec<String> {
        let report = |secure| PathReport { secure: Some(secure), ..PathReport::default() };
        let checks = judge(("a", &report(one)), ("b", &report(other)));
        assert!(checks.iter().all(|check| check.ok == check.remedy.is_empty()));
        let line = |check: NetworkCheck| {
            let word = if check.ok { "ok" } else { "failed" };
            assert_eq!(check.name, "wireguard");
            format!("{} {} {word}: {}", check.from, check.to, check.detail)
        };
        checks.into_iter().map(line).collect()
    }

    const SESSION: &str =
        "UDP 4791 gets through; last handshake 12 s ago, 148 bytes sent, 92 received";

    #[test]
    fn a_session_is_shown_as_each_side_sees_it() {
        let other = SecureReport { sent: 92, received: 148, peer_port: Some(4790), ..healthy() };
        let expect = [
            format!("a b ok: {SESSION}"),
            "b a ok: UDP 4790 gets through; last handshake 12 s ago, 92 bytes sent, 148 received"
                .to_owned(),
        ];
        assert_eq!(lines(healthy(), other), expect);
    }

    #[test]
    fn nodes_without_a_network_in_common_are_fine() {
        let none = SecureReport::default();
        assert_eq!(lines(none.clone(), none), ["a b ok: no encrypted network has tasks on both"]);
        let old = ("b", &PathReport::default());
        let new = PathReport { secure: Some(healthy()), ..PathReport::default() };
        assert_eq!(judge(("a", &new), old), []);
    }

    #[test]
    fn what_is_in_the_way_of_one_direction_is_named_there() {
        let deaf = SecureReport { has_heard: false, handshake_age_millis: None, ..healthy() };
        let rule = || vec!["a rule drops UDP 4791".to_owned()];
        let half = SecureReport { handshake_age_millis: None, ..healthy() };
        let open = "b a ok: UDP 4791 gets through, and there is no session";
        let dropped = "a b failed: UDP 4791 arrives at the interface and is dropped there";
        let other = SecureReport { obstacles: rule(), ..deaf.clone() };
        let expect = [format!("{dropped}: on b, a rule drops UDP 4791"), open.to_owned()];
        assert_eq!(lines(half.clone(), other), expect);
        assert_eq!(lines(half.clone(), deaf.clone()), [dropped.to_owned(), open.to_owned()]);
        let one = SecureReport { outgoing_obstacles: rule(), ..half };
        let lost =
            "a b failed: UDP 4791 does not arrive at the interface: on a, a rule drops UDP 4791";
        let other = SecureReport { arrived: 0, ..deaf };
        assert_eq!(lines(one, other), [lost, open]);
    }

    #[test]
    fn what_a_node_does_not_know_is_said() {
        let strange = SecureReport { peer_port: None, ..healthy() };
        assert_eq!(
            lines(healthy(), strange),
            ["a b failed: b knows no key of a", "b a failed: b knows no key of a"]
        );
        let late = SecureReport::default();
        let unknown = "b does not know of an encrypted network with tasks on a";
        let expect = [format!("a b failed: {unknown}"), format!("b a failed: {unknown}")];
        assert_eq!(lines(healthy(), late), expect);
        let half = SecureReport { handshake_age_millis: None, ..healthy() };
        let without = "failed: UDP 4791 gets through, and there is no session";
        assert_eq!(lines(half.clone(), half), [format!("a b {without}"), format!("b a {without}")]);
    }
}
