//! Decides which nodes are alive, from heartbeats and sessions.
//!
//! The leader's shell reports what it sees as [`Event`]s and asks for a [`Verdict`] after each and at
//! each tick. Nothing of this is stored but transitions of the node's state.
//!
//! # Rules
//!
//! 1. A node is silent when no heartbeat came for three periods, or when its session closed and
//!    two probes failed. It leaves the balancers, and it is down, but for rules 5 and 7.
//! 2. A closed session is probed at once, and a node that is one heartbeat short of its deadline before it is
//!    silent; then once a second, until the node is heard, or its machine refuses or fails twice.
//! 3. The leader doubts itself: what its own tick was late is added to every deadline.
//! 4. A new leader gives every node a fresh full grace, whatever the store says of it; and those that it has not
//!    heard yet another one with each node that it hears for the first time, for [`MASS_SILENCE_WAIT`] or two graces at most:
//!    a thousand nodes that come back at once come one after the other.
//! 5. When more than a third of the nodes (and at least two) fall silent in one window, the fault is
//!    likelier here than there: they leave the balancers at once, but are not down, so not replaced,
//!    before [`MASS_SILENCE_WAIT`]. To see a common cause in time, a node that is one heartbeat
//!    short of its deadline counts as falling silent.
//! 6. What answers at an address is the node that has a session from there. Another node of that address
//!    is not probed but silent: its machine left and joined again.
//! 7. A machine whose kernel accepts connections lives though its daemon hangs: its tasks run, and another
//!    copy of them would be one too many. Such a node is not down before [`HANGING_DAEMON_WAIT`] has passed
//!    beyond its deadline. A closed session is no silence within that time, as long as the machine answers.
//!
//! Differs from SwarmKit (`manager/dispatcher/heartbeat`), which kills healthy containers of a loaded
//! cluster (moby#43508).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skep_common::limits::{HANGING_DAEMON_WAIT, MASS_SILENCE_WAIT};
use skep_common::object::NodeState;
use skep_common::{Node, NodeId, Object, Timestamp};

use crate::command::{Action, Expect};
use crate::store::State;
use crate::swarm::{self, SILENT_PERIODS};

/// Failed probes after which a machine does not live.
const PROBES_MAX: u32 = 2;
/// Between two probes of a node that answers them.
const PROBE_PERIOD: Duration = Duration::from_secs(1);

/// What a machine said to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Its kernel accepted it, which needs no daemon that does anything.
    Accepted,
    /// Nothing listens there: its daemon has ended, or is restarting. Silence decides.
    Refused,
    /// Nothing came.
    None,
}

/// What the leader's shell saw. Times are the leader's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A heartbeat arrived.
    Beat {
        /// From whom.
        node_id: NodeId,
        /// When.
        at: Timestamp,
    },
    /// An agent opened its session. An older one of that node is closed by this.
    SessionOpened {
        /// Whose.
        node_id: NodeId,
        /// When.
        at: Timestamp,
    },
    /// A node's newest session ended.
    SessionClosed {
        /// Whose.
        node_id: NodeId,
    },
    /// A probe has ended.
    Probed {
        /// Who was asked.
        node_id: NodeId,
        /// When the answer, or its absence, was known.
        at: Timestamp,
        /// The answer.
        answer: Answer,
    },
    /// The leader's own clock, at least once a heartbeat period.
    Tick {
        /// How much later than planned.
        late_by: Duration,
    },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Verdict {
    /// Changed states of nodes. Those that one out of sequence takes with it are decided anew at once.
    pub actions: Vec<Action>,
    /// Nodes to ask whether they are alive; each answer is an [`Event::Probed`].
    pub probes: Vec<NodeId>,
    /// Nodes that get no connections now.
    pub not_in_balancer: BTreeSet<NodeId>,
    /// When to ask again though nothing happens.
    pub deadline: Option<Timestamp>,
}

/// What a leader knows of one node.
#[derive(Debug, Clone)]
struct Watch {
    /// Silent from then on.
    silent_at: Timestamp,
    /// Down from then on, also where its machine answers.
    hung_at: Timestamp,
    /// What counts for it: the period of when it was last heard.
    period: Duration,
    /// The newest heartbeat: an older one, told again, is no sign of life.
    last_beat: Timestamp,
    has_session: bool,
    /// Whether this leader has heard from it at all.
    is_known: bool,
    n_failed_probes: u32,
    probing: Probing,
    /// Whether its kernel accepts connections.
    answers: bool,
    /// Set by rule 5: not down before then.
    held_until: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probing {
    /// The node was heard lately.
    None,
    At(Timestamp),
    UnderWay,
    /// The machine has said enough until the node is heard.
    Ended,
}

impl Watch {
    fn new(now: Timestamp, period: Duration) -> Self {
        let grace = period * SILENT_PERIODS;
        Self {
            silent_at: now.after(grace),
            hung_at: now.after(grace + HANGING_DAEMON_WAIT),
            period,
            last_beat: Timestamp(i64::MIN),
            has_session: false,
            is_known: false,
            n_failed_probes: 0,
            probing: Probing::None,
            answers: false,
            held_until: None,
        }
    }

    fn see(&mut self, at: Timestamp, period: Duration) {
        let grace = period * SILENT_PERIODS;
        self.period = period;
        self.silent_at = self.silent_at.max(at.after(grace));
        self.hung_at = self.hung_at.max(at.after(grace + HANGING_DAEMON_WAIT));
        self.is_known = true;
        self.n_failed_probes = 0;
        self.answers = false;
        self.held_until = None;
        if self.has_session || self.probing == Probing::Ended {
            self.probing = Probing::None;
        }
    }

    /// Rule 7, and when to ask again.
    fn conclude(&mut self, answer: Answer, at: Timestamp) {
        match answer {
            Answer::Accepted => {
                if self.is_known && !self.has_session && !self.is_silent(at) {
                    // It is asked no more often than this, however short the grace of heartbeats is.
                    let patience = self.period.max(PROBE_PERIOD) * SILENT_PERIODS;
                    let longer = at.after(patience).min(self.hung_at);
                    self.silent_at = self.silent_at.max(longer);
                }
                self.n_failed_probes = 0;
                self.answers = true;
                self.probing = Probing::At(at.after(PROBE_PERIOD));
            }
            Answer::Refused => self.give_up(),
            Answer::None => {
                self.n_failed_probes += 1;
                self.probing = Probing::At(at);
                if self.n_failed_probes >= PROBES_MAX {
                    self.give_up();
                }
            }
        }
    }

    fn give_up(&mut self) {
        self.answers = false;
        self.probing = Probing::Ended;
    }

    fn is_silent(&self, now: Timestamp) -> bool {
        let is_gone = !self.has_session && self.is_known && self.n_failed_probes >= PROBES_MAX;
        now >= self.silent_at || is_gone
    }

    /// Whether its machine answers though the node is silent, or was not asked to the end.
    fn is_hanging(&self, now: Timestamp) -> bool {
        let is_asked = matches!(self.probing, Probing::At(_) | Probing::UnderWay);
        now < self.hung_at && (self.answers || (is_asked && self.n_failed_probes == 0))
    }

    fn is_probe_due(&self, now: Timestamp) -> bool {
        matches!(self.probing, Probing::At(at) if at <= now)
    }

    /// Silent, or one heartbeat short of it.
    fn is_falling_silent(&self, now: Timestamp) -> bool {
        self.is_silent(now.after(self.period))
    }
}

/// The leader's knowledge of all nodes.
#[derive(Debug)]
pub struct Liveness {
    watches: BTreeMap<NodeId, Watch>,
    /// What nodes are told. A shorter one counts from a node's next heartbeat on: that is when it hears of it.
    period: Duration,
    /// When it began to lead.
    since: Timestamp,
    /// When it last heard a node for the first time, if that is news to those that it has not heard.
    first_heard_at: Option<Timestamp>,
}

impl Liveness {
    /// Starts to lead: every node has a full grace from now on.
    pub fn new(view: &State, now: Timestamp) -> Self {
        let period = swarm::heartbeat_period(view);
        let watch = |node_id: &NodeId| (*node_id, Watch::new(now, period));
        let watches = view.nodes().keys().map(watch).collect();
        Self { watches, period, since: now, first_heard_at: None }
    }

    /// The period that nodes may be told from now on.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// Takes note of what was seen.
    pub fn observe(&mut self, event: Event) {
        let period = self.period;
        match event {
            Event::Beat { node_id, at } => {
                let watch = self.watch(node_id, at);
                if at > watch.last_beat {
                    watch.last_beat = at;
                    self.see(node_id, at, period);
                }
            }
            Event::SessionOpened { node_id, at } => {
                self.watch(node_id, at).has_session = true;
                self.see(node_id, at, period);
            }
            Event::SessionClosed { node_id } => {
                if let Some(watch) = self.watches.get_mut(&node_id) {
                    watch.has_session = false;
                    if watch.probing != Probing::UnderWay {
                        watch.probing = Probing::At(Timestamp(i64::MIN));
                    }
                }
            }
            Event::Probed { node_id, at, answer } => {
                // An older one's answer is none to what is asked now.
                let is_awaited = |watch: &&mut Watch| watch.probing == Probing::UnderWay;
                if let Some(watch) = self.watches.get_mut(&node_id).filter(is_awaited) {
                    watch.conclude(answer, at);
                }
            }
            Event::Tick { late_by } => {
                for watch in self.watches.values_mut() {
                    watch.silent_at = watch.silent_at.after(late_by);
                    watch.hung_at = watch.hung_at.after(late_by);
                }
            }
        }
    }

    fn see(&mut self, node_id: NodeId, at: Timestamp, period: Duration) {
        let watch = self.watch(node_id, at);
        if !watch.is_known {
            self.first_heard_at = self.first_heard_at.max(Some(at));
        }
        self.watch(node_id, at).see(at, period);
    }

    /// Rule 4.
    fn wait_for_the_rest(&mut self) {
        let Some(at) = self.first_heard_at.take() else { return };
        let grace = self.period * SILENT_PERIODS;
        let silent_at = at.after(grace).min(self.since.after(MASS_SILENCE_WAIT.max(grace * 2)));
        for watch in self.watches.values_mut().filter(|watch| !watch.is_known) {
            watch.silent_at = watch.silent_at.max(silent_at);
            watch.hung_at = watch.hung_at.max(watch.silent_at.after(HANGING_DAEMON_WAIT));
        }
    }

    fn watch(&mut self, node_id: NodeId, at: Timestamp) -> &mut Watch {
        let period = self.period;
        self.watches.entry(node_id).or_insert_with(|| Watch::new(at, period))
    }

    /// What follows from all that was seen. What was decided but not committed is decided again.
    pub fn decide(&mut self, view: &State, now: Timestamp) -> Verdict {
        self.period = swarm::heartbeat_period(view);
        self.watch_nodes_of(view, now);
        self.wait_for_the_rest();
        self.silence_replaced(view, now);
        self.hold_common_silence(view, now);
        let mut verdict = Verdict::default();
        for ((node_id, watch), node) in self.watches.iter_mut().zip(view.nodes().values()) {
            let is_unheard = watch.probing == Probing::None && watch.is_falling_silent(now);
            if is_unheard && is_up(node) {
                watch.probing = Probing::At(now);
            }
            let is_silent = watch.is_silent(now);
            if is_silent {
                verdict.not_in_balancer.insert(*node_id);
            }
            let (state, message) = wanted_state(node, watch, now);
            if state != node.status.state {
                verdict.actions.push(put(node, state, message));
            }
            if watch.is_probe_due(now) {
                let is_up = matches!(state, NodeState::Ready | NodeState::Disconnected);
                watch.probing = if is_up { Probing::UnderWay } else { Probing::Ended };
                verdict.probes.extend(is_up.then_some(*node_id));
            }
            let next_silence = (!is_silent).then_some(watch.silent_at);
            let next_down = watch.held_until.filter(|at| *at > now);
            let hung = (is_silent && watch.is_hanging(now)).then_some(watch.hung_at);
            let next_probe = match watch.probing {
                Probing::At(at) => Some(at),
                Probing::None | Probing::UnderWay | Probing::Ended => None,
            };
            let next = [next_silence, next_down, hung, next_probe, verdict.deadline];
            verdict.deadline = next.into_iter().flatten().min();
        }
        verdict
    }

    /// Has one watch for each node, in the order of both: a look at all of them is worth no search for each.
    fn watch_nodes_of(&mut self, view: &State, now: Timestamp) {
        let mut nodes = view.nodes().keys().peekable();
        self.watches.retain(|node_id, _| {
            while nodes.next_if(|id| *id < node_id).is_some() {}
            nodes.next_if_eq(&node_id).is_some()
        });
        if self.watches.len() < view.nodes().len() {
            for node_id in view.nodes().keys() {
                self.watch(*node_id, now);
            }
        }
    }

    /// Rule 6.
    fn silence_replaced(&mut self, view: &State, now: Timestamp) {
        if !self.watches.values().any(|watch| watch.is_probe_due(now)) {
            return;
        }
        let address = |node_id: &NodeId| view.node(*node_id).map(|node| node.address());
        let present = self.watches.iter().filter(|(_, watch)| watch.has_session);
        let taken: BTreeSet<String> = present.filter_map(|(id, _)| address(id)).collect();
        for (node_id, watch) in &mut self.watches {
            let is_taken = || address(node_id).is_some_and(|address| taken.contains(&address));
            if !watch.has_session && watch.is_probe_due(now) && is_taken() {
                watch.n_failed_probes = PROBES_MAX;
                watch.give_up();
            }
        }
    }

    /// Rule 5.
    fn hold_common_silence(&mut self, view: &State, now: Timestamp) {
        let nodes = || view.nodes().values();
        let (mut n_up, mut n_falling) = (0, 0);
        for (watch, _) in self.watches.values().zip(nodes()).filter(|(_, node)| is_up(node)) {
            n_up += 1;
            n_falling += u32::from(watch.is_falling_silent(now));
        }
        if n_falling < 2 || n_falling * 3 <= n_up {
            return;
        }
        for (watch, node) in self.watches.values_mut().zip(nodes()) {
            if is_up(node) && watch.is_silent(now) && watch.held_until.is_none() {
                watch.held_until = Some(now.after(MASS_SILENCE_WAIT));
            }
        }
    }
}

fn is_up(node: &Node) -> bool {
    matches!(node.status.state, NodeState::Ready | NodeState::Disconnected)
}

fn wanted_state(node: &Node, watch: &Watch, now: Timestamp) -> (NodeState, &'static str) {
    let stored = node.status.state;
    if watch.is_silent(now) {
        return match stored {
            NodeState::Unknown | NodeState::Down => (stored, ""), // It was not here before either.
            NodeState::Ready | NodeState::Disconnected
                if watch.held_until.is_some_and(|at| at > now) =>
            {
                (
                    NodeState::Disconnected,
                    "silent together with many others; waiting before replacing",
                )
            }
            NodeState::Ready | NodeState::Disconnected if watch.is_hanging(now) => (
                NodeState::Disconnected,
                "its daemon is silent; its tasks are not replaced yet, since its machine answers",
            ),
            NodeState::Ready | NodeState::Disconnected => (NodeState::Down, "heartbeat failure"),
        };
    }
    match (watch.has_session, watch.is_known) {
        (true, _) => (NodeState::Ready, ""),
        (false, false) => (stored, ""),
        (false, true) if stored == NodeState::Ready => (NodeState::Disconnected, "session closed"),
        (false, true) => (stored, ""),
    }
}

fn put(node: &Node, state: NodeState, message: &str) -> Action {
    let mut node = node.clone();
    let expect = Expect::Version(node.meta.version);
    node.status.state = state;
    message.clone_into(&mut node.status.message);
    Action::Put { object: Object::Node(Box::new(node)), expect }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NOW, World, service};

    /// At the period that a swarm has where nobody named one.
    const NODE_DOWN_AFTER: Duration = Duration::from_secs(3);

    struct Play {
        world: World,
        liveness: Liveness,
    }

    impl Play {
        fn new(nodes: &str) -> Self {
            let world = World::new(nodes, service(0), "");
            let liveness = Liveness::new(&world.state, NOW);
            let mut play = Self { world, liveness };
            for node_id in play.nodes() {
                play.liveness.observe(Event::SessionOpened { node_id, at: NOW });
            }
            play
        }

        fn nodes(&self) -> Vec<NodeId> {
            self.world.state.nodes().keys().copied().collect()
        }

        /// Words of the verdict at `millis` after the start: `N=state`, `probe N`, `out N`.
        fn at(&mut self, millis: u64, events: &[Event]) -> String {
            self.world.now = NOW.after(Duration::from_millis(millis));
            for event in events {
                self.liveness.observe(*event);
            }
            let verdict = self.liveness.decide(&self.world.state, self.world.now);
            let mut words: Vec<String> = Vec::new();
            for action in &verdict.actions {
                if let Action::Put { object: Object::Node(node), .. } = action {
                    words.push(format!("{}={}", node.id.0, node.status.state.name()));
                }
            }
            words.extend(verdict.probes.iter().map(|node_id| format!("probe {}", node_id.0)));
            words
                .extend(verdict.not_in_balancer.iter().map(|node_id| format!("out {}", node_id.0)));
            self.world.apply(verdict.actions);
            words.join(", ")
        }

        fn beats(&mut self, millis: u64, numbers: &[u128]) -> String {
            let at = NOW.after(Duration::from_millis(millis));
            let beats: Vec<Event> =
                numbers.iter().map(|n| Event::Beat { node_id: NodeId(*n), at }).collect();
            self.at(millis, &beats)
        }
    }

    const ONE: NodeId = NodeId(1);

    #[test]
    fn a_heartbeat_that_is_told_again_and_again_keeps_nobody_alive() {
        let mut play = Play::new("1 2 3 4");
        let old =
            [Event::Beat { node_id: ONE, at: NOW }, Event::Beat { node_id: NodeId(2), at: NOW }];
        let at = |millis| NOW.after(Duration::from_millis(millis));
        let mut words = Vec::new();
        for second in 1..=20 {
            let mut events = old.to_vec();
            for node_id in [NodeId(3), NodeId(4)] {
                events.push(Event::Beat { node_id, at: at(second * 1000) });
            }
            words.push(play.at(second * 1000, &events));
        }
        assert!(
            words[2].contains("1=disconnected") && words[2].contains("2=disconnected"),
            "{words:?}"
        );
        let down: Vec<&String> =
            words.iter().filter(|words| words.contains("1=down, 2=down")).collect();
        assert_eq!(down.len(), 1, "{words:?}");
    }

    fn probed(millis: u64, answer: Answer) -> Event {
        Event::Probed { node_id: ONE, at: NOW.after(Duration::from_millis(millis)), answer }
    }

    #[test]
    fn a_silent_node_is_down_after_three_seconds_and_ready_with_its_next_session() {
        let mut play = Play::new("1 2 3 4");
        for second in 1..=2 {
            assert_eq!(play.beats(second * 1000 - 1, &[2, 3, 4]), "", "second {second}");
        }
        assert_eq!(play.beats(2000, &[2, 3, 4]), "probe 1", "one heartbeat before");
        assert_eq!(play.at(2500, &[probed(2500, Answer::None)]), "probe 1");
        assert_eq!(play.beats(2999, &[2, 3, 4]), "");
        assert_eq!(play.beats(3000, &[]), "1=down, out 1", "also while the second one is out");
        assert_eq!(play.at(3001, &[probed(3001, Answer::None)]), "out 1", "it is decided once");
        let at = NOW.after(Duration::from_millis(3500));
        assert_eq!(play.at(3500, &[Event::SessionOpened { node_id: ONE, at }]), "1=ready");
    }

    /// A play in which node 1 has been silent since the start, and its machine was asked and answered.
    fn hanging() -> Play {
        let mut play = Play::new("1 2 3 4");
        assert_eq!(play.beats(2000, &[2, 3, 4]), "probe 1");
        assert_eq!(play.at(2001, &[probed(2001, Answer::Accepted)]), "");
        assert_eq!(play.beats(2999, &[2, 3, 4]), "");
        assert_eq!(play.at(3000, &[]), "1=disconnected, out 1");
        assert_eq!(play.at(3001, &[]), "probe 1, out 1", "a heartbeat period later");
        play
    }

    #[test]
    fn a_machine_that_answers_is_given_time() {
        let mut play = hanging();
        for second in 3..17 {
            let now = second * 1000 + 2;
            let answered = probed(now, Answer::Accepted);
            assert_eq!(play.at(now, &[answered]), "out 1", "second {second}");
            assert_eq!(play.beats(now + 1000, &[2, 3, 4]), "probe 1, out 1", "second {second}");
        }
        assert_eq!(play.at(17_999, &[probed(17_999, Answer::Accepted)]), "out 1");
        assert_eq!(play.beats(18_000, &[]), "1=down, out 1");

        let mut play = hanging();
        let at = NOW.after(Duration::from_millis(5000));
        play.beats(4900, &[2, 3, 4]);
        assert_eq!(play.at(5000, &[Event::SessionOpened { node_id: ONE, at }]), "1=ready");
        assert_eq!(play.at(5001, &[probed(5001, Answer::None)]), "", "it was asked before");
    }

    #[test]
    fn a_machine_that_answers_no_more_is_given_none() {
        let mut play = hanging();
        assert_eq!(
            play.at(3501, &[probed(3501, Answer::None)]),
            "probe 1, out 1",
            "once is chance"
        );
        assert_eq!(play.at(4001, &[probed(4001, Answer::None)]), "1=down, out 1");

        let mut play = Play::new("1 2 3 4");
        assert_eq!(play.beats(2000, &[2, 3, 4]), "probe 1");
        assert_eq!(play.at(2001, &[probed(2001, Answer::Refused)]), "", "its daemon has ended");
        assert_eq!(play.beats(2999, &[2, 3, 4]), "");
        assert_eq!(play.at(3000, &[]), "1=down, out 1");

        let mut play = Play::new("1 2 3 4");
        play.beats(2900, &[2, 3, 4]);
        assert_eq!(play.at(3100, &[]), "1=disconnected, out 1", "nothing is decided unasked");
        assert_eq!(play.at(3400, &[probed(3400, Answer::None)]), "1=down, out 1");
    }

    #[test]
    fn a_closed_session_is_probed_at_once_and_two_failures_are_enough() {
        let mut play = Play::new("1 2 3 4");
        let closed = Event::SessionClosed { node_id: ONE };
        assert_eq!(play.at(100, &[closed]), "1=disconnected, probe 1");
        assert_eq!(play.at(110, &[]), "", "one probe at a time");
        assert_eq!(play.at(120, &[probed(120, Answer::None)]), "probe 1");
        assert_eq!(play.at(140, &[probed(140, Answer::None)]), "1=down, out 1");

        let mut play = Play::new("1 2 3 4");
        assert_eq!(play.at(100, &[closed]), "1=disconnected, probe 1");
        let alive = probed(120, Answer::Accepted);
        assert_eq!(play.at(120, &[alive]), "", "it lives, without a session");
        assert_eq!(play.beats(1119, &[2, 3, 4]), "");
        assert_eq!(play.at(1120, &[]), "probe 1", "it is asked again after a heartbeat period");
        let at = NOW.after(Duration::from_millis(1200));
        assert_eq!(play.at(1200, &[Event::SessionOpened { node_id: ONE, at }]), "1=ready");
        let old = probed(1250, Answer::None);
        assert_eq!(play.at(1250, &[old]), "", "an old probe's answer does no harm");
    }

    #[test]
    fn a_machine_without_a_session_serves_as_long_as_a_hanging_one_is_held() {
        let mut play = Play::new("1 2 3 4");
        let closed = Event::SessionClosed { node_id: ONE };
        assert_eq!(play.at(100, &[closed]), "1=disconnected, probe 1");
        for second in 1..18 {
            let now = second * 1000;
            assert_eq!(play.at(now, &[probed(now, Answer::Accepted)]), "", "second {second}");
            let expect = if second == 17 { "1=down, out 1" } else { "probe 1" };
            assert_eq!(play.beats(now + 1000, &[2, 3, 4]), expect, "second {second}");
        }
    }

    #[test]
    fn a_machine_that_joined_again_does_not_answer_for_the_node_that_it_was() {
        let mut play = Play::new("1 2 3 4");
        let at = |millis| NOW.after(Duration::from_millis(millis));
        assert_eq!(
            play.at(100, &[Event::SessionClosed { node_id: ONE }]),
            "1=disconnected, probe 1"
        );
        let mut again = crate::testing::node(5);
        again.status.addr = play.world.state.node(ONE).unwrap().status.addr.clone();
        play.world.put(vec![Object::Node(Box::new(again))]);
        play.at(110, &[Event::SessionOpened { node_id: NodeId(5), at: at(110) }]);
        let answered = probed(120, Answer::Accepted);
        assert_eq!(play.at(120, &[answered]), "", "the connection alone does not tell whose it is");
        assert_eq!(play.beats(1119, &[2, 3, 4, 5]), "");
        assert_eq!(play.beats(1120, &[]), "1=down, out 1", "it is not asked again");
    }

    #[test]
    fn the_leaders_own_lateness_is_not_the_nodes_fault() {
        let mut play = Play::new("1 2 3 4");
        play.beats(2000, &[2, 3, 4]);
        let tick = Event::Tick { late_by: Duration::from_secs(5) };
        assert_eq!(play.at(7500, &[tick, probed(7500, Answer::None)]), "probe 1");
        assert_eq!(play.beats(7600, &[2, 3, 4]), "");
        assert_eq!(play.at(8000, &[]), "1=down, out 1");
    }

    #[test]
    fn many_silent_at_once_leave_the_balancers_but_are_not_replaced_yet() {
        let mut play = Play::new("1 2 3 4 5");
        // Their heartbeats are out of step, as they are between real nodes.
        play.beats(300, &[2]);
        for second in 1..=2 {
            let expect = if second == 2 { "probe 1" } else { "" };
            assert_eq!(play.beats(second * 1000, &[3, 4, 5]), expect, "second {second}");
        }
        let expect = "1=disconnected, probe 2, out 1";
        assert_eq!(play.beats(3000, &[3, 4, 5]), expect, "2 is about to follow");
        assert_eq!(play.at(3300, &[]), "2=disconnected, out 1, out 2");
        for second in 4..18 {
            assert_eq!(
                play.beats(second * 1000 - 10, &[3, 4, 5]),
                "out 1, out 2",
                "second {second}"
            );
        }
        assert_eq!(play.beats(18_000, &[3, 4, 5]), "1=down, out 1, out 2");
        let at = NOW.after(Duration::from_millis(18_100));
        let back = Event::SessionOpened { node_id: NodeId(2), at };
        assert_eq!(play.at(18_100, &[back]), "2=ready, out 1", "one came back in time");
    }

    #[test]
    fn a_new_leader_gives_everyone_a_full_grace_and_believes_the_store_until_then() {
        let world = World::new("1 2:down 3 4 5", service(0), "");
        let liveness = Liveness::new(&world.state, NOW);
        let mut play = Play { world, liveness };
        assert_eq!(play.at(2999, &[]), "probe 1, probe 3, probe 4, probe 5");
        let open: Vec<Event> = [3, 4, 5]
            .map(|n| Event::SessionOpened {
                node_id: NodeId(n),
                at: NOW.after(Duration::from_millis(2999)),
            })
            .into();
        assert_eq!(play.at(2999, &open), "");
        assert_eq!(play.at(2999, &[probed(2999, Answer::None)]), "probe 1");
        assert_eq!(
            play.beats(5998, &[3, 4, 5]),
            "",
            "whoever comes after others has as long again"
        );
        assert_eq!(play.at(5999, &[]), "1=down, out 1, out 2");
    }

    #[test]
    fn nodes_that_come_back_one_after_the_other_are_waited_for() {
        for (step, down_at, n_ready) in [(1000, 9000, 6), (2900, 15_000, 5)] {
            let world = World::new("1 2 3 4 5 6 7", service(0), "");
            let liveness = Liveness::new(&world.state, NOW);
            let mut play = Play { world, liveness };
            let down = (0..20_000).step_by(100).find(|millis| {
                let at = NOW.after(Duration::from_millis(*millis));
                let is_back = |n: &u64| *millis >= step * (n - 1);
                let back = (2..8).filter(is_back).map(|n| NodeId(n.into()));
                let back = back.map(|node_id| Event::SessionOpened { node_id, at });
                let words = play.at(*millis, &back.collect::<Vec<_>>());
                let refused = play.at(*millis, &[probed(*millis, Answer::None)]);
                words.contains("1=down") || refused.contains("1=down")
            });
            assert_eq!(down, Some(down_at), "{step}");
            let nodes = play.world.state.nodes().values();
            let ready = nodes.filter(|node| node.status.state == NodeState::Ready);
            assert_eq!(ready.count(), n_ready, "{step}");
        }
    }

    #[test]
    fn the_deadline_is_when_silence_alone_decides() {
        let mut play = Play::new("1 2 3 4");
        let verdict = play.liveness.decide(&play.world.state, NOW);
        assert_eq!(verdict.deadline, Some(NOW.after(NODE_DOWN_AFTER)));
    }

    fn set_period(play: &mut Play, millis: i64) {
        let stored = play.world.state.cluster().map(|cluster| (**cluster).clone());
        let expect = stored.as_ref().map_or(Expect::Absent, |c| Expect::Version(c.meta.version));
        let mut cluster = stored.unwrap_or_else(crate::testing::cluster);
        let period = Some(skep_common::spec::Nanos(millis * 1_000_000));
        cluster.spec.dispatcher.get_or_insert_default().heartbeat_period = period;
        let object = Object::Cluster(Box::new(cluster));
        play.world.apply(vec![Action::Put { object, expect }]);
    }

    #[test]
    fn three_periods_of_silence_count_whatever_the_period_is() {
        let mut play = Play::new("1 2 3 4");
        set_period(&mut play, 5000);
        assert_eq!(play.at(900, &[]), "");
        assert_eq!(play.beats(901, &[1, 2, 3, 4]), "", "they are told of it now");
        assert_eq!(play.beats(5901, &[2, 3, 4]), "", "so this is early enough");
        assert_eq!(play.beats(10_901, &[2, 3, 4]), "probe 1", "one heartbeat before its deadline");
        assert_eq!(play.at(10_902, &[probed(10_902, Answer::Refused)]), "");
        // A shorter one: nobody is late who could not have heard of it.
        set_period(&mut play, 200);
        assert_eq!(play.at(15_900, &[]), "");
        assert_eq!(play.beats(15_901, &[2, 3, 4]), "1=down, out 1");
        for at in (16_101..25_701).step_by(200) {
            assert_eq!(play.beats(at, &[3, 4]), "out 1", "{at}");
        }
        assert_eq!(play.beats(25_701, &[3, 4]), "probe 2, out 1");
        let refused = Event::Probed {
            node_id: NodeId(2),
            at: NOW.after(Duration::from_millis(25_702)),
            answer: Answer::Refused,
        };
        assert_eq!(play.at(25_702, &[refused]), "out 1");
        assert_eq!(play.beats(25_901, &[3, 4]), "2=down, out 1, out 2");
    }

    #[test]
    fn a_machine_that_answers_is_given_time_beyond_the_grace_of_the_swarms_period() {
        for (millis, down_at) in [(200, 19_600), (1000, 22_000), (5000, 34_000)] {
            let mut play = Play::new("1 2 3 4");
            set_period(&mut play, millis);
            for at in (0..=4000).step_by(100) {
                assert_eq!(play.beats(at, &[1, 2, 3, 4]), "", "{millis}: {at}");
            }
            let down = (4100..).step_by(100).find(|at| {
                play.at(*at, &[probed(*at, Answer::Accepted)]).contains("1=down")
                    || play.beats(*at, &[2, 3, 4]).contains("1=down")
            });
            assert_eq!(down, Some(down_at), "{millis}");
        }
    }

    #[test]
    fn a_closed_session_is_no_silence_while_its_machine_answers_however_short_the_period_is() {
        let mut play = Play::new("1 2 3 4");
        set_period(&mut play, 200);
        assert_eq!(play.beats(100, &[1, 2, 3, 4]), "");
        assert_eq!(
            play.at(200, &[Event::SessionClosed { node_id: ONE }]),
            "1=disconnected, probe 1"
        );
        for at in (300..9300).step_by(100) {
            let words = play.beats(at, &[2, 3, 4]);
            assert!(matches!(words.as_str(), "" | "probe 1"), "{at}: {words}");
            play.at(at, &[probed(at, Answer::Accepted)]);
        }
    }
}
