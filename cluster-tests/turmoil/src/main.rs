//! `skep-turmoil`: runs seeds of managers in virtual time.

use std::process::ExitCode;
use std::time::Duration;

use skep_common::mistakes::{Mistake, plant};
use skep_simulation::seeds::run_all;
use skep_turmoil::run::FAULTS;
use skep_turmoil::{Options, Report, run};

const USAGE: &str = "usage: skep-turmoil [--seed N] [--seeds N] [--first N] [--seconds N] [--mistake NAME] [--print]

  --seed N        run this seed alone, and say what came of it
  --seeds N       run so many seeds, on all processors (default 20)
  --first N       the first of them (default 0)
  --seconds N     how long things fail, in virtual time (default 20)
  --mistake NAME  run them with this mistake planted; what it breaks is a violation like any other
  --print         print each event
";

struct Arguments {
    seed: Option<u64>,
    n_seeds: u64,
    first: u64,
    faults: Duration,
    mistake: Option<Mistake>,
    is_printed: bool,
}

impl Arguments {
    /// Runs a seed, with the mistake where one is asked for.
    fn run(&self, seed: u64) -> Report {
        let options = Options { seed, faults: self.faults, is_printed: self.is_printed };
        match self.mistake {
            Some(mistake) => plant(mistake, || run(options)),
            None => run(options),
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let (seed, mistake) = (None, None);
    let mut arguments =
        Arguments { seed, n_seeds: 20, first: 0, faults: FAULTS, mistake, is_printed: false };
    while let Some(word) = words.next() {
        if word == "--print" {
            arguments.is_printed = true;
            continue;
        }
        if word == "--mistake" {
            let name = words.next().unwrap_or_default();
            let named = Mistake::ALL.into_iter().find(|mistake| format!("{mistake:?}") == name);
            let all = Mistake::ALL;
            arguments.mistake =
                Some(named.ok_or_else(|| format!("--mistake needs one of {all:?}"))?);
            continue;
        }
        let number = words.next().and_then(|text| text.parse::<u64>().ok());
        let number = number.ok_or_else(|| format!("{word} needs a number"))?;
        match word.as_str() {
            "--seed" => arguments.seed = Some(number),
            "--seeds" => arguments.n_seeds = number,
            "--first" => arguments.first = number,
            "--seconds" => arguments.faults = Duration::from_secs(number),
            _ => return Err(format!("{word} is not known")),
        }
    }
    Ok(arguments)
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("{why}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if let Some(seed) = arguments.seed {
        let report = arguments.run(seed);
        println!("{report}");
        return ExitCode::from(u8::from(report.violation.is_some()));
    }
    let (reports, time) = time_all(&arguments);
    let failed: Vec<&Report> = reports.iter().filter(|report| report.violation.is_some()).collect();
    for report in &failed {
        println!("{report}");
    }
    let hours = reports.iter().map(|report| report.time.as_secs_f64()).sum::<f64>() / 3600.0;
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    println!(
        "{} seeds, {} with a violation; {hours:.2} simulated hours, {} crashes, {} managers added, {} removed, {} writes acknowledged, {} syncs, {:.1} s",
        reports.len(),
        failed.len(),
        sum(|report| report.counts.n_crashes),
        sum(|report| report.counts.n_added),
        sum(|report| report.counts.n_removed),
        sum(|report| report.counts.n_acknowledged),
        sum(|report| report.n_syncs),
        time.as_secs_f64()
    );
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// All seeds, and how long they took.
#[expect(clippy::disallowed_methods, reason = "how long it took is not part of what is simulated")]
fn time_all(arguments: &Arguments) -> (Vec<Report>, Duration) {
    let began = std::time::Instant::now();
    let seeds = arguments.first..arguments.first + arguments.n_seeds;
    let reports = run_all(seeds, |seed| arguments.run(seed));
    (reports, began.elapsed())
}
