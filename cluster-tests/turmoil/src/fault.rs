//! What goes wrong, as data.

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Messages between two managers vanish; a connection that lost one hangs until it is given up.
    Loss,
    /// Messages take up to a third of a second.
    Delay,
    /// Messages between two managers wait, and come all at once.
    Hold,
    /// Two managers do not hear each other.
    Cut,
    /// A manager does not hear another, which hears it.
    HalfCut,
    /// The leader does not hear the others, nor they it.
    IsolateLeader,
    /// The leader does not hear the others, which hear it.
    DeafLeader,
    /// A manager stands still for longer than a lease: nothing reaches it nor leaves it, and its disk waits. Then
    /// all that was sent meanwhile comes at once.
    Pause,
    /// A manager's process is killed: the machine has what was written.
    Kill,
    /// A manager's machine loses power, and with it what was not synced.
    PowerLoss,
    /// The same in the middle of a sync.
    CrashAtSync,
    /// Syncs take up to a quarter of a second.
    SlowDisk,
    /// Nothing new finds room on a manager's disk, and the last write is cut short.
    FullDisk,
    /// A sync fails.
    BrokenSync,
}

impl Fault {
    /// All of them.
    pub(crate) const ALL: [Self; 14] = [
        Self::Loss,
        Self::Delay,
        Self::Hold,
        Self::Cut,
        Self::HalfCut,
        Self::IsolateLeader,
        Self::DeafLeader,
        Self::Pause,
        Self::Kill,
        Self::PowerLoss,
        Self::CrashAtSync,
        Self::SlowDisk,
        Self::FullDisk,
        Self::BrokenSync,
    ];

    /// Draws one: crashes more often than others, since each is over at once.
    pub(crate) fn draw(rng: &mut StdRng) -> Self {
        let crashes = [Self::Kill, Self::PowerLoss, Self::CrashAtSync];
        match rng.random_range(0..3) {
            0 => crashes[rng.random_range(0..crashes.len())],
            _ => Self::ALL[rng.random_range(0..Self::ALL.len())],
        }
    }

    /// How long it lasts, or how long the manager is away.
    pub(crate) fn length(self, rng: &mut StdRng) -> Duration {
        let millis = match self {
            Self::Pause | Self::IsolateLeader | Self::DeafLeader => rng.random_range(800..3500),
            Self::Kill | Self::PowerLoss | Self::CrashAtSync => rng.random_range(50..2000),
            _ => rng.random_range(300..2500),
        };
        Duration::from_millis(millis)
    }

    /// Until the next one begins.
    pub(crate) fn pause(rng: &mut StdRng) -> Duration {
        Duration::from_millis(rng.random_range(200..1800))
    }
}
