//! Whether clients could tell the managers from one manager that does one thing at a time.
//!
//! Every write of a key names the version that it replaces and puts a mark of its own, and every read gives
//! both. Versions are places in the one log, so they say in which order the key's values came: what is left
//! to check is that this order is that of the clients' clocks, and that nothing acknowledged is missing in it.

use std::collections::BTreeMap;

/// A version of a key.
pub type Version = u64;

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It made this version.
    Done(Version),
    /// It surely did nothing.
    Refused,
    /// It may have happened, or may yet.
    Unknown,
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Makes the key, or gives it another value where it is at a version.
    Write {
        /// The version that it replaces; none: there is no such key.
        replaces: Option<Version>,
        /// Its value: no other write has it.
        mark: u64,
        /// What became of it.
        outcome: Outcome,
    },
    /// Found a value; none: no such key.
    Read(Option<(Version, u64)>),
}

/// One operation of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// What it is about.
    pub key: String,
    /// Its place among all calls and answers: when it began.
    pub called: u64,
    /// When it was answered.
    pub answered: u64,
    /// What it was, and what came of it.
    pub call: Call,
}

/// Checks all keys. The error says what cannot be.
pub fn check(operations: &[Operation]) -> Result<(), String> {
    let mut keys: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in operations {
        keys.entry(&operation.key).or_default().push(operation);
    }
    keys.into_iter().try_for_each(|(key, operations)| {
        check_key(&operations).map_err(|why| format!("{key}: {why}"))
    })
}

fn check_key(operations: &[&Operation]) -> Result<(), String> {
    check_marks(operations)?;
    check_succession(operations)?;
    check_time(operations)
}

/// A value that was read was written, and not by a write that was refused; a write made no two versions.
fn check_marks(operations: &[&Operation]) -> Result<(), String> {
    let writes: BTreeMap<u64, (u64, Outcome)> = operations
        .iter()
        .filter_map(|operation| match operation.call {
            Call::Write { mark, outcome, .. } => Some((mark, (operation.called, outcome))),
            Call::Read(_) => None,
        })
        .collect();
    let mut versions: BTreeMap<u64, Version> = BTreeMap::new();
    for operation in operations {
        let Call::Read(Some((version, mark))) = operation.call else { continue };
        let Some((called, outcome)) = writes.get(&mark) else {
            return Err(format!("a read found {mark}, which nobody wrote"));
        };
        if *called > operation.answered {
            return Err(format!("a read found {mark} before it was written"));
        }
        match outcome {
            Outcome::Refused => {
                return Err(format!("a read found {mark}, whose write was refused"));
            }
            Outcome::Done(made) if version < *made => {
                return Err(format!("{mark} was read at {version}, its write made {made}"));
            }
            Outcome::Done(_) | Outcome::Unknown => {}
        }
        // Managers may write the key beside the clients, and leave the value: its first version counts.
        let first = versions.entry(mark).or_insert(version);
        *first = version.min(*first);
    }
    Ok(())
}

/// What a write replaced was the newest when it happened: no other version lies between.
fn check_succession(operations: &[&Operation]) -> Result<(), String> {
    let mut made: BTreeMap<Version, (Option<Version>, u64)> = BTreeMap::new();
    for operation in operations {
        let Call::Write { replaces, mark, outcome: Outcome::Done(version) } = operation.call else {
            continue;
        };
        if replaces.is_some_and(|replaced| replaced >= version) {
            return Err(format!("the write of {mark} made {version} of {replaces:?}"));
        }
        if let Some((_, other)) = made.insert(version, (replaces, mark)) {
            return Err(format!("{mark} and {other} both made version {version}"));
        }
    }
    for (version, (replaced, mark)) in &made {
        let from = replaced.map_or(0, |replaced| replaced + 1);
        if let Some((other, _)) = made.range(from..*version).next() {
            return Err(format!(
                "the write of {mark} made {version} of {replaced:?}, though {other} came between: an update is lost"
            ));
        }
        let found = operations.iter().find_map(|operation| match operation.call {
            Call::Read(Some((at, other))) if (from..*version).contains(&at) => Some((at, other)),
            _ => None,
        });
        if let Some((at, other)) = found {
            return Err(format!(
                "the write of {mark} made {version} of {replaced:?}, though {other} was read at {at}"
            ));
        }
    }
    Ok(())
}

/// What was known before an operation began is not newer than what it saw.
fn check_time(operations: &[&Operation]) -> Result<(), String> {
    /// The newest version that an operation has seen or made.
    fn seen(operation: &Operation) -> Option<Version> {
        match operation.call {
            Call::Write { outcome: Outcome::Done(version), .. } => Some(version),
            Call::Write { .. } => None,
            Call::Read(found) => Some(found.map_or(0, |(version, _)| version)),
        }
    }
    let mut answers: Vec<(u64, Version)> =
        operations.iter().filter_map(|one| Some((one.answered, seen(one)?))).collect();
    answers.sort_unstable();
    let mut calls: Vec<&&Operation> = operations.iter().collect();
    calls.sort_unstable_by_key(|operation| operation.called);
    let (mut known, mut next) = (0, 0);
    for operation in calls {
        while let Some((answered, version)) =
            answers.get(next).filter(|(at, _)| *at < operation.called)
        {
            debug_assert!(*answered < operation.called);
            known = known.max(*version);
            next += 1;
        }
        let Some(version) = seen(operation) else { continue };
        let is_write = matches!(operation.call, Call::Write { .. });
        if version < known || is_write && version == known {
            return Err(format!(
                "an operation that began at {} saw {version}, though {known} was known before",
                operation.called
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `called-answered write REPLACES>VERSION MARK`, `… refused REPLACES MARK`, `… unknown REPLACES MARK`,
    /// `… read VERSION MARK`, `… missing`.
    fn parse(line: &str) -> Operation {
        let words: Vec<&str> = line.split(' ').collect();
        let (called, answered) = words[0].split_once('-').unwrap();
        let number = |word: &str| word.parse::<u64>().unwrap();
        let replaced = |word: &str| Some(number(word)).filter(|version| *version > 0);
        let write = |replaces, outcome| Call::Write {
            replaces: replaced(replaces),
            mark: number(words[3]),
            outcome,
        };
        let call = match words[1] {
            "write" => {
                let (replaces, version) = words[2].split_once('>').unwrap();
                write(replaces, Outcome::Done(number(version)))
            }
            "refused" => write(words[2], Outcome::Refused),
            "unknown" => write(words[2], Outcome::Unknown),
            "read" => Call::Read(Some((number(words[2]), number(words[3])))),
            _ => Call::Read(None),
        };
        Operation { key: "key".into(), called: number(called), answered: number(answered), call }
    }

    #[test]
    fn histories_of_one_manager_pass_and_others_are_told_why_not() {
        for (history, expected) in [
            ("0-1 write 0>5 1|2-3 read 5 1|4-5 write 5>9 2|6-7 read 9 2", ""),
            ("0-1 write 0>5 1|2-8 write 5>9 2|3-4 read 5 1|5-6 read 9 2|7-9 read 9 2", ""),
            ("0-1 write 0>5 1|2-3 unknown 5 2|4-5 read 8 2|6-7 write 8>9 3", ""),
            ("0-1 write 0>5 1|2-3 unknown 5 2|4-5 read 5 1|6-7 read 8 2", ""),
            ("0-9 write 0>5 1|1-2 missing|3-4 read 5 1", ""),
            ("0-1 write 0>5 1|2-3 write 5>9 2|4-5 read 5 1", "saw 5, though 9 was known before"),
            ("0-1 write 0>5 1|2-3 missing", "saw 0, though 5 was known"),
            ("0-1 write 0>5 1|2-8 write 5>9 2|3-4 read 9 2|5-6 read 5 1", "saw 5, though 9"),
            ("0-1 write 0>5 1|2-3 write 5>9 2|4-5 write 5>12 3", "an update is lost"),
            ("0-1 write 0>5 1|2-3 unknown 5 2|4-5 read 8 2|6-7 write 5>12 3", "2 was read at 8"),
            ("0-1 write 0>5 1|2-3 write 5>5 2", "made 5 of"),
            ("0-1 write 0>5 1|2-3 write 0>5 2", "both made version 5"),
            ("0-1 write 0>5 1|2-3 refused 5 2|4-5 read 8 2", "2, whose write was refused"),
            ("0-1 write 0>5 1|4-5 read 8 7", "7, which nobody wrote"),
            ("0-1 read 5 1|2-3 write 0>5 1", "before it was written"),
            ("0-1 write 0>5 1|2-3 read 4 1", "read at 4, its write made 5"),
        ] {
            let operations: Vec<Operation> = history.split('|').map(parse).collect();
            let result = check(&operations).err().unwrap_or_default();
            let fits =
                if expected.is_empty() { result.is_empty() } else { result.contains(expected) };
            assert!(fits, "{history}: {result:?}");
        }
    }
}
