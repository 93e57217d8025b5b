//! Whether clients could tell a swarm of managers from one manager that does one thing at a time.
//!
//! A history of one key is linearizable when each operation can be given a moment between its call and its
//! answer, so that one copy of the key, to which all happens in the order of those moments, gives the
//! answers that were seen. The search is that of Wing and Gong, with Lowe's memory of what was tried: it takes the
//! operations one after the other, goes back where an answer does not fit, and never tries the same set of
//! operations with the same value twice.
//!
//! An operation whose answer was lost stays open: it may happen at any time after its call, or never.
//!
//! # Invariants
//!
//! - Every value is written by one operation alone, so that a value says which write it is of.

use std::collections::HashSet;
use std::fmt;

/// What a write puts; each is put once.
pub type Value = u64;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Make the key with this value, unless it is there.
    Create(Value),
    /// Put a value in the place of another one; refused where the key has neither that one any more.
    Update {
        /// What the key must have.
        old: Value,
        /// What it has then. The same one is asked where only a version is to be confirmed.
        new: Value,
    },
    /// Tell the value.
    Read,
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The write took effect.
    Done,
    /// It did not: the key was there already, or had another value.
    Refused,
    /// The read found this.
    Found(Value),
    /// There was no such key.
    Missing,
    /// No answer, or one that leaves it open.
    Unknown,
}

/// One operation of one client.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    /// Who asked.
    pub client: usize,
    /// When it was asked, on one clock for all clients.
    pub called_at: u64,
    /// When it was answered.
    pub answered_at: u64,
    /// What was asked.
    pub call: Call,
    /// What was answered.
    pub answer: Answer,
}

impl Operation {
    /// What the key has after this operation, if it may happen when the key has `state`.
    fn apply(&self, state: Option<Value>) -> Option<Option<Value>> {
        match (self.call, self.answer) {
            // Whether it happened makes no difference.
            (Call::Update { old, new }, Answer::Unknown) if old == new => None,
            (Call::Create(value), Answer::Done | Answer::Unknown) => {
                state.is_none().then_some(Some(value))
            }
            (Call::Create(_), Answer::Refused) => state.is_some().then_some(state),
            (Call::Update { old, new }, Answer::Done | Answer::Unknown) => {
                (state == Some(old)).then_some(Some(new))
            }
            (Call::Update { old, .. }, Answer::Refused) => {
                state.is_some_and(|value| value != old).then_some(state)
            }
            (Call::Read, Answer::Found(value)) => (state == Some(value)).then_some(state),
            (Call::Update { .. } | Call::Read, Answer::Missing) => state.is_none().then_some(state),
            // An open operation without an effect need not happen.
            _ => None,
        }
    }

    fn is_open(&self) -> bool {
        self.answer == Answer::Unknown
    }
}

/// A history that no order of its operations explains.
#[derive(Debug)]
pub struct Violation {
    /// The value that the key had when most operations had found their place.
    state: Option<Value>,
    /// What found no place then.
    stuck: Operation,
    /// What was under way at the same time.
    beside: Vec<Operation>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { state, stuck, beside } = self;
        writeln!(f, "no order explains {stuck:?}: the key has {state:?} then; beside it:")?;
        beside.iter().try_for_each(|operation| writeln!(f, "  {operation:?}"))
    }
}

impl std::error::Error for Violation {}

/// Looks for an order that explains the operations on one key, which is not there at first.
pub fn check(history: &[Operation]) -> Result<(), Violation> {
    Search::new(history).run()
}

/// What happens in a history: an operation is called, or answered.
#[derive(Debug, Clone, Copy)]
enum Event {
    // Of what has the same time calls come first: such operations are under way at once.
    Call(usize),
    Answer(usize),
}

/// The one before the first event, and after the last one.
const ENDS: usize = 0;

struct Search<'a> {
    history: &'a [Operation],
    /// Behind `ENDS`, in the order of time.
    events: Vec<Event>,
    /// The neighbours of each event, among those whose operation has no place yet.
    next: Vec<usize>,
    previous: Vec<usize>,
    /// Where the events of each operation are.
    at: Vec<[usize; 2]>,
    state: Option<Value>,
    /// The operations that have their place, one bit each.
    placed: Vec<u64>,
    /// In their order, with the state before.
    order: Vec<(usize, Option<Value>)>,
    n_answered_left: usize,
    best: (usize, usize, Option<Value>),
}

impl<'a> Search<'a> {
    fn new(history: &'a [Operation]) -> Self {
        let mut timed: Vec<(u64, Event)> = Vec::new();
        for (number, operation) in history.iter().enumerate() {
            timed.push((operation.called_at, Event::Call(number)));
            if !operation.is_open() {
                timed.push((operation.answered_at, Event::Answer(number)));
            }
        }
        timed.sort_unstable_by_key(|(time, event)| (*time, matches!(event, Event::Answer(_))));
        let events: Vec<Event> = std::iter::once(Event::Answer(usize::MAX))
            .chain(timed.into_iter().map(|(_, event)| event))
            .collect();
        let mut at = vec![[ENDS; 2]; history.len()];
        for (index, event) in events.iter().enumerate().skip(1) {
            match *event {
                Event::Call(number) => at[number][0] = index,
                Event::Answer(number) => at[number][1] = index,
            }
        }
        let n = events.len();
        Self {
            history,
            next: (0..n).map(|index| (index + 1) % n).collect(),
            previous: (0..n).map(|index| (index + n - 1) % n).collect(),
            events,
            at,
            state: None,
            placed: vec![0; history.len().div_ceil(64)],
            order: Vec::new(),
            n_answered_left: history.iter().filter(|operation| !operation.is_open()).count(),
            best: (usize::MAX, 0, None),
        }
    }

    fn run(mut self) -> Result<(), Violation> {
        let mut tried: HashSet<(Vec<u64>, Option<Value>)> = HashSet::new();
        let mut index = self.next[ENDS];
        while self.n_answered_left > 0 {
            match self.events[index] {
                Event::Call(number) => {
                    let after = self.history[number].apply(self.state);
                    let is_new = after.is_some_and(|after| {
                        self.flip(number);
                        let is_new = tried.insert((self.placed.clone(), after));
                        self.flip(number);
                        is_new
                    });
                    index = match after.filter(|_| is_new) {
                        Some(after) => {
                            self.place(number, after);
                            self.next[ENDS]
                        }
                        None => self.next[index],
                    };
                }
                // It has been answered, and has no place yet.
                Event::Answer(number) => {
                    if self.n_answered_left < self.best.0 {
                        self.best = (self.n_answered_left, number, self.state);
                    }
                    let Some(last) = self.take_back() else { return Err(self.violation()) };
                    index = self.next[self.at[last][0]];
                }
            }
        }
        Ok(())
    }

    fn flip(&mut self, number: usize) {
        self.placed[number / 64] ^= 1 << (number % 64);
    }

    fn place(&mut self, number: usize, after: Option<Value>) {
        self.order.push((number, self.state));
        self.state = after;
        self.flip(number);
        self.n_answered_left -= usize::from(!self.history[number].is_open());
        for event in self.at[number].into_iter().filter(|event| *event != ENDS) {
            let (before, behind) = (self.previous[event], self.next[event]);
            (self.next[before], self.previous[behind]) = (behind, before);
        }
    }

    /// Takes the place of the last one from it.
    fn take_back(&mut self) -> Option<usize> {
        let (number, before) = self.order.pop()?;
        self.state = before;
        self.flip(number);
        self.n_answered_left += usize::from(!self.history[number].is_open());
        // The other way round: each finds the neighbours that it had.
        for event in self.at[number].into_iter().rev().filter(|event| *event != ENDS) {
            let (before, behind) = (self.previous[event], self.next[event]);
            (self.next[before], self.previous[behind]) = (event, event);
        }
        Some(number)
    }

    fn violation(&self) -> Violation {
        let (_, stuck, state) = self.best;
        let stuck = self.history[stuck];
        let is_beside = |other: &&Operation| {
            other.called_at <= stuck.answered_at
                && (other.is_open() || other.answered_at >= stuck.called_at)
        };
        let beside = self.history.iter().filter(is_beside).copied().collect();
        Violation { state, stuck, beside }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `client: call → answer` between two times.
    fn operation(times: (u64, u64), call: Call, answer: Answer) -> Operation {
        Operation { client: 0, called_at: times.0, answered_at: times.1, call, answer }
    }

    fn create(times: (u64, u64), value: Value, answer: Answer) -> Operation {
        operation(times, Call::Create(value), answer)
    }

    fn update(times: (u64, u64), [old, new]: [Value; 2], answer: Answer) -> Operation {
        operation(times, Call::Update { old, new }, answer)
    }

    fn read(times: (u64, u64), value: Value) -> Operation {
        operation(times, Call::Read, Answer::Found(value))
    }

    use Answer::{Done, Missing, Refused, Unknown};

    #[track_caller]
    fn assert_good(history: &[Operation]) {
        if let Err(violation) = check(history) {
            panic!("{violation}");
        }
    }

    #[track_caller]
    fn assert_bad(history: &[Operation]) -> Violation {
        check(history).expect_err("no order explains it")
    }

    #[test]
    fn what_happens_one_after_the_other_is_explained() {
        assert_good(&[]);
        assert_good(&[
            operation((1, 2), Call::Read, Missing),
            create((3, 4), 1, Done),
            create((5, 6), 2, Refused),
            update((7, 8), [1, 3], Done),
            update((9, 10), [1, 4], Refused),
            read((11, 12), 3),
        ]);
    }

    #[test]
    fn what_happens_at_once_may_have_either_order() {
        for found in [[1, 2], [2, 1], [1, 1], [2, 2]] {
            let history = [
                create((1, 2), 1, Done),
                update((3, 9), [1, 2], Done),
                read((4, 8), found[0]),
                read((5, 7), found[1]),
            ];
            assert_good(&history);
        }
    }

    #[test]
    fn a_stale_read_is_found() {
        let history = [create((1, 2), 1, Done), update((3, 4), [1, 2], Done), read((5, 6), 1)];
        let violation = assert_bad(&history);
        assert!(violation.to_string().contains("answer: Found(1)"), "{violation}");
        // Also where the update was only seen, and is under way still.
        assert_bad(&[
            create((1, 2), 1, Done),
            update((3, 10), [1, 2], Done),
            read((4, 5), 2),
            read((6, 7), 1),
        ]);
        assert_bad(&[create((1, 2), 1, Done), operation((3, 4), Call::Read, Missing)]);
    }

    #[test]
    fn a_lost_update_is_found() {
        // Both took the place of the same value.
        assert_bad(&[
            create((1, 2), 1, Done),
            update((3, 9), [1, 2], Done),
            update((4, 8), [1, 3], Done),
        ]);
        // It was promised, and the value before it is back for who comes later.
        assert_bad(&[
            create((1, 2), 1, Done),
            update((3, 4), [1, 2], Done),
            update((5, 6), [1, 3], Done),
            read((7, 8), 3),
        ]);
        assert_bad(&[create((1, 2), 1, Done), create((3, 4), 2, Done)]);
    }

    #[test]
    fn a_refusal_without_a_reason_is_found() {
        assert_bad(&[create((1, 2), 1, Done), update((3, 4), [1, 2], Refused)]);
        assert_bad(&[create((1, 2), 1, Refused)]);
        // Refused, and done all the same.
        assert_bad(&[create((1, 2), 1, Done), update((3, 4), [1, 2], Refused), read((5, 6), 2)]);
    }

    #[test]
    fn a_confirmation_is_a_read() {
        let confirm = |answer| update((5, 6), [1, 1], answer);
        let before = [create((1, 2), 1, Done), update((3, 4), [1, 2], Done)];
        assert_good(&[&before[..], &[confirm(Refused)]].concat());
        assert_bad(&[&before[..], &[confirm(Done)]].concat());
        assert_good(&[before[0], confirm(Done)]);
    }

    #[test]
    fn an_unknown_outcome_is_kept_open() {
        let unknown = update((3, 4), [1, 2], Unknown);
        let before = [create((1, 2), 1, Done), unknown];
        // Never, at once, and long after its client gave up.
        assert_good(&[&before[..], &[read((5, 6), 1), update((7, 8), [1, 3], Done)]].concat());
        assert_good(&[&before[..], &[read((5, 6), 2), update((7, 8), [2, 3], Done)]].concat());
        assert_good(&[&before[..], &[read((5, 6), 1), read((100, 101), 2)]].concat());
        // But not before its call, and not undone.
        assert_bad(&[before[0], read((3, 4), 2), update((5, 6), [1, 2], Unknown)]);
        assert_bad(&[&before[..], &[read((5, 6), 2), read((7, 8), 1)]].concat());
        assert_bad(&[&before[..], &[update((5, 6), [1, 3], Done), read((7, 8), 2)]].concat());
        // The key itself.
        let created = create((1, 2), 1, Unknown);
        assert_good(&[created, operation((3, 4), Call::Read, Missing), read((5, 6), 1)]);
        assert_bad(&[created, read((3, 4), 1), operation((5, 6), Call::Read, Missing)]);
        assert_bad(&[created, create((3, 4), 2, Done), read((5, 6), 1)]);
    }

    /// All orders, without any art.
    fn is_explained(history: &[Operation], placed: u32, state: Option<Value>) -> bool {
        let is_placed = |number: usize| placed & 1 << number != 0;
        let left: Vec<usize> = (0..history.len()).filter(|number| !is_placed(*number)).collect();
        let may_be_next = |number: usize| {
            left.iter().all(|other| {
                history[*other].is_open()
                    || history[*other].answered_at >= history[number].called_at
            })
        };
        left.iter().all(|number| history[*number].is_open())
            || left.iter().filter(|number| may_be_next(**number)).any(|number| {
                let after = history[*number].apply(state);
                after.is_some_and(|after| is_explained(history, placed | 1 << number, after))
            })
    }

    #[test]
    fn small_histories_are_judged_as_by_trying_all_orders() {
        use rand::{RngExt as _, SeedableRng as _};
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut n_good = 0;
        for _ in 0..20_000 {
            let history: Vec<Operation> = (0..rng.random_range(1..8))
                .map(|number| {
                    let called_at = rng.random_range(0..20);
                    let times = (called_at, called_at + rng.random_range(1..12));
                    let old = rng.random_range(0..4);
                    let writes = [Done, Done, Done, Refused, Unknown][rng.random_range(0..5)];
                    match rng.random_range(0..6) {
                        0 => create(times, number, writes),
                        1 | 2 => update(times, [old, number], writes),
                        3 => operation(times, Call::Read, Missing),
                        _ => read(times, old),
                    }
                })
                .collect();
            let is_good = check(&history).is_ok();
            n_good += u32::from(is_good);
            assert_eq!(is_good, is_explained(&history, 0, None), "{history:#?}");
        }
        assert!((500..19_500).contains(&n_good), "{n_good} of 20000 are good");
    }
}
