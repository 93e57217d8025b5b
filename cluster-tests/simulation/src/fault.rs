//! What goes wrong, as data: each seed draws which faults it has, and how often.

use std::fmt;

use rand::RngExt;
use rand::rngs::StdRng;

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A message is lost; a connection that lost one is broken.
    Loss,
    /// A message takes up to two seconds.
    Delay,
    /// A message overtakes the one before it.
    Reorder,
    /// A message comes twice.
    Duplicate,
    /// A report of tasks comes seconds late.
    LateReport,
    /// Two machines do not hear each other.
    Cut,
    /// A machine does not hear another, which hears it.
    HalfCut,
    /// The leader is alone, or with a minority.
    Isolate,
    /// A daemon is killed and started again; containers run on.
    Kill,
    /// A machine loses power: containers are gone, and what was not synced is.
    PowerLoss,
    /// Power is lost while a sync is under way.
    CrashAtSync,
    /// Syncs take up to a second.
    SlowDisk,
    /// Nothing can be written: the manager takes no part until there is room.
    FullDisk,
    /// A machine's clock jumps, to either side.
    ClockJump,
    /// A daemon is stopped for longer than a lease, and goes on.
    Pause,
    /// Heartbeats come at the edge of the time that is allowed.
    Flap,
    /// The connections of some sessions are reset.
    Reset,
    /// A container ends by itself.
    Exit,
    /// A container's health check fails.
    Sicken,
    /// A task cannot be prepared.
    Reject,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::Loss,
        Self::Delay,
        Self::Reorder,
        Self::Duplicate,
        Self::LateReport,
        Self::Cut,
        Self::HalfCut,
        Self::Isolate,
        Self::Kill,
        Self::PowerLoss,
        Self::CrashAtSync,
        Self::SlowDisk,
        Self::FullDisk,
        Self::ClockJump,
        Self::Pause,
        Self::Flap,
        Self::Reset,
        Self::Exit,
        Self::Sicken,
        Self::Reject,
    ];

    /// The highest rate that a seed may draw, per mille: of messages, of syncs and of tasks for those that
    /// hit one, else of seconds.
    fn rate_max(self) -> u32 {
        match self {
            Self::Loss | Self::Reorder | Self::Duplicate => 10,
            Self::Delay => 30,
            Self::LateReport => 100,
            Self::CrashAtSync => 3,
            Self::Reject => 60,
            Self::PowerLoss | Self::SlowDisk | Self::FullDisk | Self::ClockJump => 40,
            Self::Isolate | Self::Kill | Self::Flap => 60,
            Self::Pause => 120,
            Self::Cut | Self::HalfCut | Self::Sicken => 80,
            Self::Exit => 150,
            Self::Reset => 800,
        }
    }
}

/// How often each fault happens, in thousandths.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Rates([u32; Fault::ALL.len()]);

impl Rates {
    /// Nothing goes wrong.
    pub const NONE: Self = Self([0; Fault::ALL.len()]);

    /// A random choice: each fault is there in half of the seeds, since many at once hide each other.
    pub fn draw(rng: &mut StdRng) -> Self {
        let mut rates = Self::NONE;
        for fault in Fault::ALL {
            if rng.random_bool(0.5) {
                rates.0[fault as usize] = rng.random_range(1..=fault.rate_max());
            }
        }
        rates
    }

    /// Thousandths of one fault.
    pub fn of(&self, fault: Fault) -> u32 {
        self.0[fault as usize]
    }

    /// Whether a fault happens now. Draws nothing where it never does.
    pub(crate) fn hits(&self, fault: Fault, rng: &mut StdRng) -> bool {
        let rate = self.of(fault);
        rate > 0 && rng.random_range(0..1000) < rate
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for fault in Fault::ALL.into_iter().filter(|fault| self.of(*fault) > 0) {
            write!(f, "{gap}{fault:?}={}", self.of(fault))?;
            gap = " ";
        }
        if gap.is_empty() { f.write_str("no faults") } else { Ok(()) }
    }
}

impl fmt::Debug for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
