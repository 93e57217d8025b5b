//! `make bench`: measures a swarm of real daemons on this machine against its targets.
//!
//! Arguments are names of scenarios, all of them without any, and `--quick` for fewer and shorter
//! rounds. A missed target is said in the output and nothing else: figures depend on the machine
//! and on what else it does, so that only a scenario that could not be measured at all is an error.

#[path = "../bench/mod.rs"]
mod bench;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use bench::SCENARIOS;

fn main() -> ExitCode {
    let mut is_quick = false;
    let mut chosen = Vec::new();
    for argument in std::env::args().skip(1) {
        let known = SCENARIOS.iter().find(|scenario| scenario.name == argument);
        match (&*argument, known) {
            ("--quick", _) => is_quick = true,
            (_, Some(scenario)) => chosen.push(scenario),
            _ => {
                usage(&argument);
                return ExitCode::from(2);
            }
        }
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skep-bench makes namespaces: run it as root, or with `make bench`");
        return ExitCode::FAILURE;
    }
    if chosen.is_empty() {
        chosen.extend(SCENARIOS);
    }
    bench::describe_machine();
    let mut failed = Vec::new();
    for scenario in chosen {
        println!("\n== {}: {}", scenario.name, scenario.what);
        // A scenario that panics has removed its lab and printed why; the others are still worth it.
        if catch_unwind(AssertUnwindSafe(|| (scenario.run)(is_quick))).is_err() {
            failed.push(scenario.name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("\ncould not be measured: {}", failed.join(", "));
    ExitCode::FAILURE
}

fn usage(argument: &str) {
    if !matches!(argument, "--help" | "-h") {
        eprintln!("there is no scenario `{argument}`");
    }
    eprintln!("usage: skep-bench [--quick] [SCENARIO]...");
    for scenario in SCENARIOS {
        eprintln!("  {:<11} {}", scenario.name, scenario.what);
    }
}
