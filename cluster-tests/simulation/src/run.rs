//! One run of one seed.

use std::fmt;
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use skep_common::spec::{Availability, NodeRole};
use skep_common::{Node, NodeId};

use crate::client::Wish;
use crate::fault::Rates;
use crate::invariants::{levels_rest, managers_rest, unrest};
use crate::queue::START;
use crate::seen::Seen;
use crate::world::{Event, World};

/// Events of the rough phase, unless told otherwise: about a minute of virtual time.
pub const STEPS: u64 = 8000;
/// How long a swarm may take to come to rest.
const REST_WAIT: Duration = Duration::from_secs(180);
/// It is at rest when it was so at as many moments, a second apart.
const N_QUIET_SECONDS: u32 = 2;
/// How often nodes are looked after meanwhile.
const RESTORE_PERIOD: Duration = Duration::from_secs(3);
/// How long an update may take.
const UPDATE_WAIT: Duration = Duration::from_secs(180);

/// Which run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// Events of the rough phase.
    pub steps: u64,
    /// Whether each event is printed.
    pub is_printed: bool,
}

impl Options {
    /// The run of a seed.
    pub fn of(seed: u64) -> Self {
        Self { seed, steps: STEPS, is_printed: false }
    }
}

/// How often something happened that is not a fault: were it never so, nothing of it would be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Machines that became managers, and were admitted.
    pub n_promoted: u64,
    /// Managers that became workers.
    pub n_demoted: u64,
    /// Programs that were replaced by the newest.
    pub n_upgraded: u64,
    /// Programs that were replaced by an older one.
    pub n_downgraded: u64,
    /// Containers that followed another one while no manager led.
    pub n_attempts: u64,
}

impl Counts {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            n_promoted: self.n_promoted + other.n_promoted,
            n_demoted: self.n_demoted + other.n_demoted,
            n_upgraded: self.n_upgraded + other.n_upgraded,
            n_downgraded: self.n_downgraded + other.n_downgraded,
            n_attempts: self.n_attempts + other.n_attempts,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_promoted, n_demoted, n_upgraded, n_downgraded, n_attempts } = self;
        write!(
            f,
            "{n_promoted} promoted, {n_demoted} demoted, {n_upgraded} upgraded, {n_downgraded} downgraded, {n_attempts} attempts"
        )
    }
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Which run it was.
    pub seed: u64,
    /// How often each fault happened.
    pub rates: Rates,
    /// The invariant that does not hold, and why.
    pub violation: Option<String>,
    /// Events of the rough phase that show it again.
    pub steps: u64,
    /// Events in all.
    pub n_events: u64,
    /// Entries that were committed.
    pub n_entries: u64,
    /// Wishes that were granted.
    pub n_granted: usize,
    /// What else happened.
    pub counts: Counts,
    /// Virtual time.
    pub time: Duration,
    /// SHA-256 of every event: equal runs have equal traces.
    pub trace: String,
}

impl fmt::Display for Report {
    /// For a run that failed, the line that repeats it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.violation {
            Some(violation) => write!(
                f,
                "seed {} ({}) breaks invariant {violation}; to repeat it: make sim SEED={} STEPS={}",
                self.seed, self.rates, self.seed, self.steps
            ),
            None => write!(
                f,
                "seed {} ({}): {} events, {} entries, {} wishes granted, {} in {:.1} s; trace {}",
                self.seed,
                self.rates,
                self.n_events,
                self.n_entries,
                self.n_granted,
                self.counts,
                self.time.as_secs_f64(),
                self.trace
            ),
        }
    }
}

/// Runs a seed to its end, or to the first invariant that does not hold.
pub fn run(options: Options) -> Report {
    let rates =
        Rates::draw(&mut StdRng::seed_from_u64(options.seed ^ u64::from_be_bytes(*b"troubles")));
    let mut world = World::new(options.seed, options.is_printed);
    world.note(format_args!("seed {} with {rates}", options.seed));
    world.is_rough = true;
    world.rates = rates;
    world.queue.after(Duration::from_secs(2), Event::Wish);
    while world.n_events < options.steps && world.violation.is_none() && world.step() {}
    let steps = world.n_events;
    if world.violation.is_none() {
        calm_phase(&mut world);
    }
    Report {
        seed: options.seed,
        rates,
        violation: world.violation.clone(),
        steps,
        n_events: world.n_events,
        n_entries: world.ledger.version().index,
        n_granted: world.n_granted,
        counts: world.counts,
        time: world.now().since(START),
        trace: world.trace.digest(),
    }
}

fn calm_phase(world: &mut World) {
    world.calm();
    if !come_to_rest(world, REST_WAIT) {
        return;
    }
    world.is_quiet = true;
    let services: Vec<u16> = (1..=crate::service::N_SERVICES).collect();
    for number in services {
        let name = crate::service::name(number);
        let is_there = world.ledger.service_by_name(&name).is_some_and(|service| {
            let mut tasks = world.ledger.tasks_of_service(service.id);
            service.spec.replicas().unwrap_or(0) > 1 && tasks.all(|task| task.node_id.is_some())
        });
        if is_there && (number == 1 || number == 3) {
            world.ask_somebody(Wish::Refresh(number));
            let until = world.now().after(Duration::from_secs(2));
            while world.now() < until && world.violation.is_none() && world.step() {}
            if !come_to_rest(world, UPDATE_WAIT) {
                return;
            }
        }
    }
}

/// All machines are to be members, and all nodes to take tasks. What was asked for before the faults ended
/// may still undo that.
fn restore_nodes(world: &mut World) {
    let mut wishes: Vec<Wish> = Vec::new();
    for machine in world.strangers() {
        let node_id = NodeId::random(&mut world.client_rng);
        wishes.push(Wish::Join(machine, node_id, NodeRole::Worker));
    }
    let is_closed = |node: &Node| node.spec.availability != Availability::Active;
    let closed = world.ledger.nodes().values().filter(|node| is_closed(node));
    wishes.extend(closed.map(|node| Wish::Activate(node.id)));
    for wish in wishes {
        world.ask_somebody(wish);
    }
}

fn come_to_rest(world: &mut World, wait: Duration) -> bool {
    let deadline = world.now().after(wait);
    let mut n_quiet = 0;
    let mut restore_at = world.now();
    while world.now() < deadline && world.violation.is_none() {
        if world.now() >= restore_at {
            restore_nodes(world);
            world.upgrade_one();
            restore_at = world.now().after(RESTORE_PERIOD);
        }
        let until = world.now().after(Duration::from_secs(1));
        while world.now() < until && world.violation.is_none() && world.step() {}
        let rests =
            unrest(world).and_then(|()| managers_rest(world)).and_then(|()| levels_rest(world));
        n_quiet = if rests.is_ok() { n_quiet + 1 } else { 0 };
        if n_quiet == N_QUIET_SECONDS {
            break;
        }
    }
    if world.violation.is_some() {
        return false;
    }
    world.see(&Seen::AtRest { is_settled: n_quiet == N_QUIET_SECONDS });
    world.violation.is_none()
}
