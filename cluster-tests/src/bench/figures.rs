//! Samples, their quartiles, and how they stand to a target.

use std::fmt;
use std::fs;

/// What a figure is measured in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Unit {
    Seconds,
    Milliseconds,
    Microseconds,
    GigabitsPerSecond,
    /// How many in a second.
    PerSecond,
    Mebibytes,
    /// Of something to something else.
    Ratio,
}

impl Unit {
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Seconds => format!("{value:.3} s"),
            Self::Milliseconds if value < 10.0 => format!("{value:.3} ms"),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::GigabitsPerSecond => format!("{value:.2} Gbit/s"),
            Self::PerSecond => format!("{value:.0}/s"),
            Self::Microseconds => format!("{value:.0} µs"),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::Ratio => format!("{value:.2}"),
        }
    }
}

/// Which side of a limit is good.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// The figure must not be above this.
    AtMost(f64),
    /// The figure must not be below this.
    AtLeast(f64),
}

impl Target {
    /// Tells in words whether a figure meets it.
    pub(crate) fn judge(self, value: f64, unit: Unit) -> String {
        let limit = match self {
            Self::AtMost(limit) => format!("<= {}", unit.show(limit)),
            Self::AtLeast(limit) => format!(">= {}", unit.show(limit)),
        };
        let verdict = if self.is_met(value) { "met" } else { "MISSED" };
        format!("target {limit}: {verdict}")
    }

    /// Whether a figure meets it.
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

/// Figures of the same kind from several rounds.
#[derive(Debug, Clone)]
pub(crate) struct Samples {
    unit: Unit,
    values: Vec<f64>,
}

impl Samples {
    pub(crate) fn new(unit: Unit) -> Self {
        Self { unit, values: Vec::new() }
    }

    pub(crate) fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The value below which `fraction` of the samples are, between two of them where need be.
    pub(crate) fn quantile(&self, fraction: f64) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        let position = fraction * last as f64;
        let below = position.floor() as usize;
        let above = (below + 1).min(last);
        sorted[below] + (sorted[above] - sorted[below]) * position.fract()
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn highest(&self) -> f64 {
        self.quantile(1.0)
    }

    /// Prints the samples' summary and whether their median meets a target.
    pub(crate) fn report(&self, what: &str, target: Option<Target>) {
        let judgement = target.map(|target| target.judge(self.median(), self.unit));
        let judgement = judgement.map_or_else(String::new, |words| format!("; median: {words}"));
        println!("{what}: {self}{judgement}; load {}", load_average());
    }

    /// Prints whether the highest sample meets a target.
    pub(crate) fn report_worst(&self, what: &str, target: Target) {
        let words = target.judge(self.highest(), self.unit);
        println!("{what}: worst {}; {words}", self.unit.show(self.highest()));
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |fraction| self.unit.show(self.quantile(fraction));
        write!(f, "median {}, quartiles {} to {}", show(0.5), show(0.25), show(0.75))?;
        write!(f, ", lowest {}, highest {}, of {}", show(0.0), show(1.0), self.values.len())
    }
}

/// The machine's load average over one minute.
pub(crate) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Samples, Target, Unit};

    fn samples(values: &[f64]) -> Samples {
        Samples { unit: Unit::Seconds, values: values.to_vec() }
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_samples() {
        let odd = samples(&[5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(|q| odd.quantile(q)), [1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(samples(&[1.0, 2.0]).median(), 1.5);
        assert_eq!(samples(&[7.0]).quantile(0.75), 7.0);
        assert!(samples(&[]).median().is_nan());
    }

    #[test]
    fn a_target_is_met_at_its_limit() {
        assert!(Target::AtMost(1.5).judge(1.5, Unit::Seconds).ends_with("met"));
        assert!(Target::AtMost(1.5).judge(1.6, Unit::Seconds).ends_with("MISSED"));
        assert!(Target::AtLeast(0.9).judge(0.9, Unit::Ratio).ends_with("met"));
        assert!(Target::AtLeast(0.9).judge(0.8, Unit::Ratio).ends_with("MISSED"));
        assert!(Target::AtMost(1.5).judge(f64::NAN, Unit::Seconds).ends_with("MISSED"));
    }
}
