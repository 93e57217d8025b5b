//! The search for the leader: whom to ask next, and as what.
//!
//! Whose session has just ended is asked once more, since it may be there still. Then every manager is asked
//! once before any is asked again, and the one that is said to lead comes next. Managers are told who was lost: they
//! answer when they know another leader. If one names the one whose session has ended all the same, that leads still or
//! again, and is asked once more with patience.

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
    /// Was asked in this round, but without patience.
    in_haste: Option<String>,
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
            self.in_haste = None;
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
        self.was_asked(asked);
    }

    /// It names another one.
    pub(super) fn redirected(&mut self, asked: Asked, to: String) {
        self.was_asked(asked);
        // Who was asked in this round knows no better than the one who named it, unless it had no time to answer.
        let is_patience_due = self.in_haste.take_if(|hasty| *hasty == to).is_some();
        if is_patience_due || !self.in_vain.contains(&to) {
            self.next = Some(to);
        }
    }

    fn was_asked(&mut self, asked: Asked) {
        if asked.deadline == AGAIN_DEADLINE {
            self.in_haste = Some(asked.address.clone());
        }
        self.in_vain.insert(asked.address);
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

    /// The one whose session ended is slow, or has to be elected again.
    #[test]
    fn a_leader_that_leads_again_is_asked_again_once_in_a_round_and_with_patience() {
        for (name, n_vain, rest) in [
            ("at the second time", 1, vec!["b without b"]),
            ("not in this round", 9, vec!["b without b", "? without b", "-"]),
        ] {
            for seed in 0..9 {
                let n_asked = std::cell::Cell::new(0);
                let answer = |of: &str| {
                    n_asked.set(n_asked.get() + usize::from(of == "b"));
                    (of != "b" || n_asked.get() > n_vain).then_some("b")
                };
                let words = asked(seed, Search::after("b".into()), 2 + rest.len(), answer);
                assert_eq!(words[0], "b", "{name}");
                let others = words[2..].iter().map(|word| match &word[..1] {
                    "a" | "c" => format!("?{}", &word[1..]),
                    _ => word.clone(),
                });
                assert_eq!(others.collect::<Vec<_>>(), rest, "{name}: {words:?}");
            }
        }
        let (known, mut rng) = (MANAGERS.map(str::to_owned), StdRng::seed_from_u64(7));
        let mut search = Search::after("b".into());
        let mut deadlines = Vec::new();
        while let Some(asked) = search.next(&known, &mut rng) {
            if asked.address == "b" {
                deadlines.push(asked.deadline);
                search.failed(asked);
            } else {
                search.redirected(asked, "b".into());
            }
        }
        assert_eq!(deadlines, [AGAIN_DEADLINE, WELCOME_DEADLINE]);
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
