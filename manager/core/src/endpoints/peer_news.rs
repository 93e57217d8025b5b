//! When nodes are told of other nodes alone.
//!
//! Every node is told of every other one: where a thousand join one after the other, that makes a million messages if
//! each is told at once, and the managers are too busy to hear who lives. Few wait for such news: with the first
//! task that is balanced to on another node comes a change of ports or networks, which is told at once and brings
//! all else. Only a node that just joined and balances to tasks that are there already gets no answers until then. So a
//! round to all nodes is followed by a pause as long as the round is big, and the next one tells of all that changed
//! meanwhile. The first after a pause is told at once, in a swarm of any size.

use std::ops::Range;
use std::time::Duration;

use skep_common::Timestamp;

/// The pause for each node that was told: a thousand are told at most twice a second. Leader and node take a twentieth
/// of a millisecond of processor time each for the message and its acknowledgement.
const PAUSE: Duration = Duration::from_micros(500);

/// The rounds of a leader.
#[derive(Debug)]
pub struct PeerNews {
    /// The clock may be set back, out of it: then the pause is over.
    pause: Range<Timestamp>,
    is_awaited: bool,
}

/// One pass over all nodes, which tells of peers alone or not.
#[derive(Debug)]
pub struct Round {
    is_due: bool,
    n_told: u32,
    is_awaited: bool,
}

impl Default for PeerNews {
    fn default() -> Self {
        Self { pause: Timestamp(0)..Timestamp(0), is_awaited: false }
    }
}

impl PeerNews {
    /// Begins a pass.
    pub fn begin(&mut self, now: Timestamp) -> Round {
        self.is_awaited = false;
        Round { is_due: !self.pause.contains(&now), n_told: 0, is_awaited: false }
    }

    /// The pass is over.
    pub fn end(&mut self, round: &Round, now: Timestamp) {
        self.is_awaited = round.is_awaited;
        if round.n_told > 0 {
            self.pause = now..now.after(PAUSE * round.n_told);
        }
    }

    /// When nodes that wait for the next round are to be told.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.is_awaited.then_some(self.pause.end)
    }
}

impl Round {
    /// Whether a node for which there is news is told now; `is_of_peers_alone` says of what they are.
    pub fn tells(&mut self, is_of_peers_alone: bool) -> bool {
        let is_told = self.is_due || !is_of_peers_alone;
        self.n_told += u32::from(is_of_peers_alone && is_told);
        self.is_awaited |= !is_told;
        is_told
    }
}
