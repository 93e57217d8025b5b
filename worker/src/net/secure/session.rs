//! What this node has of its WireGuard with one other node, for those who look for a fault.

use std::time::Duration;

/// What has passed between this node and another one, by all their keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// How long ago the last handshake was; `None` where there is no session.
    pub last_handshake: Option<Duration>,
    /// Bytes of UDP to the other node.
    pub sent: u64,
    /// Bytes of UDP from it that a key of it has sealed.
    pub received: u64,
}

impl Activity {
    /// Both together.
    #[must_use]
    pub(super) fn and(self, other: Self) -> Self {
        let last_handshake = match (self.last_handshake, other.last_handshake) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Self {
            last_handshake,
            sent: self.sent + other.sent,
            received: self.received + other.received,
        }
    }
}

/// The WireGuard of this node with another one that tasks of its encrypted networks are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerSession {
    /// The UDP port that the other node sends to.
    pub own_port: u16,
    /// The one that this node sends to; `None` where no key of the other node is known.
    pub peer_port: Option<u16>,
    /// What has passed.
    pub activity: Activity,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_handshakes_the_later_one_counts_and_bytes_add_up() {
        let of = |seconds: Option<u64>, sent, received| Activity {
            last_handshake: seconds.map(Duration::from_secs),
            sent,
            received,
        };
        assert_eq!(of(Some(9), 1, 2).and(of(Some(3), 4, 8)), of(Some(3), 5, 10));
        assert_eq!(of(None, 1, 2).and(of(Some(3), 0, 0)), of(Some(3), 1, 2));
        assert_eq!(Activity::default().and(of(None, 1, 2)), of(None, 1, 2));
    }
}
