//! The search for the leader: whom to ask next, and as what.
//!
//! Whose session has just ended is asked once more, since it may be there still. Then every manager is asked
//! once before any is asked again, and the one that is said to lead comes next. Managers are told who was lost: they
//! answer when they know another leader.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::{Rng, RngExt as _};

/// A leader answers a Hello at once, and another manager when it knows who leads, which takes an election.
const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
/// A leader whose session has just ended, and that is there, answers at once.
const AGAIN_DEADLINE: Duration = Duration::from_millis(500);

/// A search for the leader.
#[derive(Debug, Default)]
pub(super) struct Search {
    next: Option<String>,
    /// Asked in vain in this round.
    in_vain: BTreeSet<String>,
    /// Led, or was said to, and does not answer.
    lost: Option<String>,
    /// Whether the next is the one whose session has just ended.
    is_again: bool,
}

/// Whom to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) address: String,
    /// Who is no answer to the question who leads.
    pub(super) lost: Option<String>,
    /// Whether it was said to lead.
    pub(super) is_leader: bool,
    pub(super) deadline: Duration,
}

impl Search {
    /// A session has ended; its leader may be there still.
    pub(super) fn after(leader: String) -> Self {
        Self { next: Some(leader), is_again: true, ..Self::default() }
    }

    /// None: all were asked in vain, and the next round begins.
    pub(super) fn next(&mut self, candidates: &[String], rng: &mut impl Rng) -> Option<Asked> {
        let is_again = std::mem::take(&mut self.is_again);
        let deadline = if is_again { AGAIN_DEADLINE } else { WELCOME_DEADLINE };
        let lost = self.lost.clone();
        if let Some(address) = self.next.take() {
            return Some(Asked { address, lost, is_leader: true, deadline });
        }
        let others = candidates.iter().filter(|address| !self.in_vain.contains(*address));
        let others: Vec<&String> = others.collect();
        if others.is_empty() {
            self.in_vain.clear();
            return None;
        }
        let address = others[rng.random_range(0..others.len())].clone();
        Some(Asked { address, lost, is_leader: false, deadline })
    }

    /// It leads no more, or is not there.
    pub(super) fn failed(&mut self, asked: Asked) {
        if asked.is_leader {
            self.lost = Some(asked.address.clone());
        }
        self.in_vain.insert(asked.address);
    }

    /// It names another one.
    pub(super) fn redirected(&mut self, asked: Asked, to: String) {
        self.in_vain.insert(asked.address);
        // Who was asked in this round knows no better than the one who named it.
        if !self.in_vain.contains(&to) {
            self.next = Some(to);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    const MANAGERS: [&str; 3] = ["a", "b", "c"];

    /// Asks managers until one is the leader; `answer` says whom another one names. Gives who was asked, in order,
    /// and a dash for the end of a round.
    fn asked(
        seed: u64,
        mut search: Search,
        n_max: usize,
        answer: impl Fn(&str) -> Option<&'static str>,
    ) -> Vec<String> {
        let known = MANAGERS.map(str::to_owned);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut words = Vec::new();
        while words.len() < n_max {
            let Some(asked) = search.next(&known, &mut rng) else {
                words.push("-".to_owned());
                continue;
            };
            let lost = asked.lost.as_ref().map(|lost| format!(" without {lost}"));
            words.push(format!("{}{}", asked.address, lost.unwrap_or_default()));
            match answer(&asked.address) {
                Some(leader) if leader == asked.address => break,
                Some(leader) => search.redirected(asked, leader.to_owned()),
                None => search.failed(asked),
            }
        }
        words
    }

    #[test]
    fn a_leader_that_is_there_still_is_asked_first() {
        assert_eq!(asked(7, Search::after("b".into()), 9, |_| Some("b")), ["b"]);
        assert_eq!(asked(7, Search::after("b".into()), 9, |_| Some("c")), ["b", "c"]);
    }

    #[test]
    fn whoever_lost_the_leader_says_so_and_finds_the_next() {
        let answer = |of: &str| (of != "b").then_some("c");
        for seed in 0..9 {
            let words = asked(seed, Search::after("b".into()), 9, answer);
            assert_eq!((words[0].as_str(), words.last().unwrap().as_str()), ("b", "c without b"));
            assert!(words.len() <= 3, "{words:?}");
        }
    }

    #[test]
    fn every_manager_is_asked_once_in_a_round() {
        for answer in [|_: &str| None, |_: &str| Some("a")] {
            let answer = |of: &str| if of == "a" { None } else { answer(of) };
            let words = asked(7, Search::default(), 8, answer);
            for round in words.chunks(4) {
                let mut round: Vec<&str> = round.iter().map(|word| &word[..1]).collect();
                assert_eq!(round.pop(), Some("-"), "{words:?}");
                round.sort_unstable();
                assert_eq!(round, MANAGERS, "{words:?}");
            }
        }
    }
}
