//! How fast the core of the managers places tasks: a program of its own (`manager/core/examples/place.rs`),
//! which is built as the daemon is, on one core. Neither managers nor the wire nor a disk take part.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use super::figures::{Samples, Target, Unit};

/// Names the program.
const PROGRAM: &str = "SKEP_BENCH_PLACE";
/// 300 MB.
const MEMORY: Target = Target::AtMost(300e6 / 1_048_576.0);

/// A swarm to place tasks in.
struct Size {
    arguments: [&'static str; 3],
    what: &'static str,
    figures: &'static [Figure],
}

/// A sample's name in the program's output, what it is, its unit, and its target.
type Figure = (&'static str, &'static str, Unit, Option<Target>);

const SIZES: [Size; 2] = [
    Size {
        arguments: ["100000", "100", "1000"],
        what: "100,000 tasks of 100 services on 1,000 nodes",
        figures: &[
            ("waiting", "planned", Unit::Seconds, Some(Target::AtMost(0.3))),
            ("waiting-cpu", "processor time of that", Unit::Seconds, None),
            ("waiting-memory", "peak memory of the process", Unit::Mebibytes, Some(MEMORY)),
            ("waiting-apply", "the plans applied to the store", Unit::Seconds, None),
            ("look", "a new leader finds nothing to do", Unit::Seconds, None),
            ("one-more", "one task more", Unit::Milliseconds, None),
        ],
    },
    Size {
        arguments: ["1000000", "1000", "10000"],
        what: "1,000,000 tasks of 1,000 services on 10,000 nodes",
        figures: &[
            ("waiting", "planned", Unit::Seconds, Some(Target::AtMost(5.0))),
            ("waiting-cpu", "processor time of that", Unit::Seconds, None),
            ("waiting-memory", "peak memory of the process", Unit::Mebibytes, None),
            ("waiting-apply", "the plans applied to the store", Unit::Seconds, None),
            ("one-more", "one task more", Unit::Milliseconds, Some(Target::AtMost(1.0))),
            ("one-more-cpu", "processor time of that", Unit::Milliseconds, None),
        ],
    },
];

pub(crate) fn run(is_quick: bool) {
    let program = std::env::var_os(PROGRAM).map(PathBuf::from);
    let Some(program) = program.filter(|program| program.is_file()) else {
        println!("not measured: {PROGRAM} names no program; `make bench` builds it");
        return;
    };
    let n_rounds = if is_quick { 2 } else { 5 };
    for size in &SIZES {
        println!("{}, {n_rounds} rounds", size.what);
        let mut samples: BTreeMap<String, Samples> = BTreeMap::new();
        for _ in 0..n_rounds {
            measure(&program, size, &mut samples);
        }
        for (name, what, _, target) in size.figures {
            let figure = samples.get(*name).unwrap_or_else(|| panic!("no sample of {name}"));
            figure.report(&format!("{}: {what}", size.what), *target);
        }
    }
}

/// One run of the program on one core.
fn measure(program: &PathBuf, size: &Size, samples: &mut BTreeMap<String, Samples>) {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", "0"]).arg(program).args(size.arguments);
    let output = command.output().expect("taskset can be started");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed: {stderr}", program.display());
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let sample =
            line.split_once(' ').and_then(|(name, n)| Some((name, n.parse::<f64>().ok()?)));
        let (name, value) = sample.unwrap_or_else(|| panic!("no sample: {line:?}"));
        let Some((_, what, unit, _)) = size.figures.iter().find(|figure| figure.0 == name) else {
            continue;
        };
        let value = if matches!(unit, Unit::Milliseconds) { value * 1e3 } else { value };
        // There are hundreds of these in a round.
        if !name.starts_with("one-") {
            println!("{what}: {}", unit.show(value));
        }
        samples.entry(name.to_owned()).or_insert_with(|| Samples::new(*unit)).add(value);
    }
}
