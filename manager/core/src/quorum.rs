//! Whether enough managers answer for the swarm to be led, and what people are told where they do not.

use std::fmt::Write as _;
use std::time::Duration;

/// Silence that is no news: a manager that was busy, or an election.
pub const SILENCE_MAX: Duration = Duration::from_millis(2500);

/// A manager that votes, as another one sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Voter {
    /// Its host name.
    pub name: String,
    /// `ip:port` at which managers reach it.
    pub addr: String,
    /// How long it has not been heard of.
    pub silence: Duration,
    /// It was never heard of since the one who asks started.
    pub is_unheard: bool,
}

impl Voter {
    /// Whether it counts as missing.
    pub fn is_silent(&self) -> bool {
        self.silence > SILENCE_MAX
    }
}

/// How many of that many managers are needed.
pub fn needed(n_voters: usize) -> usize {
    n_voters / 2 + 1
}

/// Whether too few managers to lead have been heard of for that long.
pub fn is_lost_for(voters: &[Voter], time: Duration) -> bool {
    voters.iter().filter(|voter| voter.silence <= time).count() < needed(voters.len())
}

/// Whether a manager leads that says how long ago each other one answered it; who does not lead has nothing to say.
pub fn leads(answered: &[Duration]) -> bool {
    let n_recent = answered.iter().filter(|ago| **ago <= SILENCE_MAX).count();
    n_recent > 0 && n_recent + 1 >= needed(answered.len() + 1)
}

/// Why there is no leader: who is missing and since when, what goes on, what to do.
pub fn explain(voters: &[Voter]) -> String {
    let (n_voters, needed) = (voters.len(), needed(voters.len()));
    let silent: Vec<&Voter> = voters.iter().filter(|voter| voter.is_silent()).collect();
    let n_answering = n_voters - silent.len();
    if n_answering >= needed {
        return format!(
            "the swarm has no leader at the moment though {n_answering} of its {n_voters} managers answer: ask again in a few seconds, and look at their logs where that stays so"
        );
    }
    let answer = if n_answering == 1 { "answers" } else { "answer" };
    let mut text = format!(
        "this manager hears of no leader of its swarm: {needed} of its {n_voters} managers are needed and {n_answering} {answer}"
    );
    for (rank, voter) in silent.iter().enumerate() {
        let separator = if rank == 0 { "; " } else { ", " };
        let time = for_people(voter.silence);
        let how = if voter.is_unheard { "not heard of for at least" } else { "silent for" };
        // Writing to a String does not fail.
        let _ = write!(text, "{separator}{} ({}) {how} {time}", voter.name, voter.addr);
    }
    text.push_str(
        "; containers and published ports go on, and nothing can be changed; start those managers again, or mend the network where this one is merely cut off from them; only if the others are off for good, have this one go on alone with `skep swarm init --force-new-cluster` (docs/operations/lost-quorum.md)",
    );
    text
}

fn for_people(time: Duration) -> String {
    match time.as_secs() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Managers as their silence in seconds; a negative one was never heard of.
    fn voters(silences: &[i64]) -> Vec<Voter> {
        let voter = |(rank, silence): (usize, &i64)| Voter {
            name: format!("n{}", rank + 1),
            addr: format!("10.0.0.{}:2377", rank + 1),
            silence: Duration::from_secs(silence.unsigned_abs()),
            is_unheard: *silence < 0,
        };
        silences.iter().enumerate().map(voter).collect()
    }

    #[test]
    fn who_is_answered_by_a_majority_leads() {
        for (answered, leads_now) in [
            (&[][..], false), // It does not lead, or alone.
            (&[100], true),
            (&[9000], false), // It has not noticed yet.
            (&[100, 9000], true),
            (&[9000, 9000], false),
            (&[100, 9000, 9000, 100], true),
            (&[100, 9000, 9000, 9000], false),
        ] {
            let times: Vec<Duration> =
                answered.iter().map(|millis| Duration::from_millis(*millis)).collect();
            assert_eq!(leads(&times), leads_now, "{answered:?}");
        }
    }

    #[test]
    fn a_lost_quorum_names_the_missing_the_rest_and_the_remedy() {
        for (silences, is_lost_now) in [
            (&[0][..], false),
            (&[0, 2], false),
            (&[0, 3], true),
            (&[0, 0, 14], false),
            (&[0, 14, 14], true),
            (&[0, 0, 14, 14], true),
            (&[0, 0, 0, 14, 14], false),
        ] {
            assert_eq!(is_lost_for(&voters(silences), SILENCE_MAX), is_lost_now, "{silences:?}");
        }
        let text = explain(&voters(&[0, 14, -7300]));
        assert!(
            text.starts_with(
                "this manager hears of no leader of its swarm: 2 of its 3 managers are needed and 1 answers; n2 (10.0.0.2:2377) silent for 14 s, n3 (10.0.0.3:2377) not heard of for at least 2 h; containers and published ports go on"
            ),
            "{text}"
        );
        // A manager that is cut off from a healthy majority must not be told to go on without it.
        let condition = text.find("only if the others are off for good");
        let remedy = text.find("`skep swarm init --force-new-cluster`");
        assert!(condition.is_some() && condition < remedy, "{text}");
        let text = explain(&voters(&[0, 0, 200, 14, 3]));
        assert!(text.contains("3 of its 5 managers are needed and 2 answer; n3"), "{text}");
        assert!(text.contains("silent for 3 min"), "{text}");
        let text = explain(&voters(&[0, 0, 14]));
        assert!(text.contains("at the moment though 2 of its 3 managers answer"), "{text}");
    }
}
