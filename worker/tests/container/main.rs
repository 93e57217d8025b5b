//! Containers on this kernel: made, watched, killed, adopted.
//!
//! The test program is also the program that the runtime executes as shim and exec helper, so it
//! has a `main` of its own: `container shim --dir DIR`, `container exec-in --dir DIR -- ARGV`, and
//! `container creator …`, a daemon to be killed. Everything else is a list of tests, run one after
//! the other: `cargo test -p skep-worker --test container [NAME-PART…]`.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod adoption;
mod basics;
mod daemon;
mod environment;
mod execs;
mod limits;
mod logs;
mod measure;
mod unified;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use skep_worker::container::{exec_in_main, shim_main};

/// One test: its name and what it runs.
type Test = (&'static str, fn());

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["shim", "--dir", dir] => shim_main(&PathBuf::from(dir)),
        ["exec-in", "--dir", dir, rest @ ..] => {
            let (env, argv) = exec_arguments(rest);
            exec_in_main(&PathBuf::from(dir), argv, &env)
        }
        ["creator", rest @ ..] => {
            daemon::run(rest);
            ExitCode::SUCCESS
        }
        ["unified-inner"] => {
            unified::run_inner();
            ExitCode::SUCCESS
        }
        filters => run_tests(filters),
    }
}

/// Splits `[--env NAME=VALUE]… -- ARGV…`.
fn exec_arguments(words: &[&str]) -> (Vec<String>, Vec<String>) {
    let end = words.iter().position(|word| *word == "--").expect("-- before the command");
    let env = words[..end].chunks(2).map(|pair| pair[1].to_owned()).collect();
    (env, words[end + 1..].iter().map(ToString::to_string).collect())
}

fn run_tests(filters: &[&str]) -> ExitCode {
    let is_listed = filters.contains(&"--list");
    let filters: Vec<&&str> = filters.iter().filter(|word| !word.starts_with('-')).collect();
    let groups: [&[Test]; 7] = [
        basics::TESTS,
        limits::TESTS,
        execs::TESTS,
        logs::TESTS,
        adoption::TESTS,
        unified::TESTS,
        measure::TESTS,
    ];
    let tests = groups.into_iter().flatten();
    let tests: Vec<&Test> = tests
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|part| name.contains(**part)))
        .collect();
    if is_listed {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = environment::missing() {
        println!("skipped {} tests: {reason}", tests.len());
        // On CI nothing may be skipped in silence.
        let is_ci = std::env::var_os("CI").is_some_and(|value| value == "true");
        return if is_ci { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let _guard = environment::LayerGuard;
    println!("\nrunning {} tests", tests.len());
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
    }
    println!("\ntest result: {} passed; {} failed", tests.len() - failed.len(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
