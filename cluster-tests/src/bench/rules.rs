//! How long a node takes to put the rules of many services into effect.
//!
//! What is measured is the worker's library, by a program of its own (`worker/examples/rules.rs`) that is
//! built as the daemon is: neither managers nor the way from them take part.

use std::collections::BTreeMap;
use std::process::Command;

use super::built_program;
use super::figures::{Samples, Target, Unit};

/// Names the program.
const PROGRAM: &str = "SKEP_BENCH_RULES";
const ALL: Target = Target::AtMost(200.0);
const ONE: Target = Target::AtMost(10.0);
/// The figures by the names that the program gives them.
const FIGURES: [(&str, &str, Option<Target>); 6] = [
    ("ports-all", "1,000 published ports, 10 backends each", Some(ALL)),
    ("ports-one", "one backend of them changed", Some(ONE)),
    ("ports-again", "the same table again, which looks for damage", None),
    ("addresses-all", "1,000 virtual addresses, 10 backends each, in one container", Some(ALL)),
    ("addresses-one", "one backend of them changed", Some(ONE)),
    ("addresses-again", "the same table again, which looks for damage", None),
];

pub(crate) fn run(is_quick: bool) {
    let n_rounds = if is_quick { "3" } else { "15" };
    let Some(program) = built_program(PROGRAM) else { return };
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount"]).arg(&program).arg(n_rounds);
    let output = command.output().expect("unshare can be started");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed: {stderr}", program.display());
    let stdout = String::from_utf8_lossy(&output.stdout);
    let mut figures: BTreeMap<&str, Samples> = BTreeMap::new();
    for line in stdout.lines() {
        let sample =
            line.split_once(' ').and_then(|(name, s)| Some((name, s.parse::<f64>().ok()?)));
        let (name, seconds) = sample.unwrap_or_else(|| panic!("no sample: {line:?}"));
        let samples = figures.entry(name).or_insert_with(|| Samples::new(Unit::Milliseconds));
        samples.add(seconds * 1e3);
    }
    for (name, what, target) in FIGURES {
        let samples = figures.get(name);
        samples.unwrap_or_else(|| panic!("no sample of {name}: {stdout}")).report(what, target);
    }
}
