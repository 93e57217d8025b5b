//! The histogram that openraft counts batch sizes with, in a few kilobytes.
//!
//! It has the interface that openraft uses of the crate of the same name, which computes tables of
//! 25 MB at its first use, most of a manager's memory. Each power of two is cut into eight buckets, so
//! a percentile is at most an eighth above the value that was recorded.
//!
//! Absent on purpose: everything that openraft does not call.

use std::fmt;
use std::marker::PhantomData;

/// Buckets of one power of two, as a power of two.
const SUB_BITS: u32 = 3;
const SUB: u64 = 1 << SUB_BITS;
/// Values below [`SUB`] have a bucket each; every higher power of two has [`SUB`] buckets.
const N_BUCKETS: usize = (SUB as usize) * (64 - SUB_BITS as usize + 1);

/// Counts of `u64` values. `T` is openraft's tag for what they mean.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: Vec<u64>,
    total: u64,
    meaning: PhantomData<T>,
}

impl<T> fmt::Debug for Histogram<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Histogram({})", self.percentile_stats())
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Histogram<T> {
    /// An empty histogram.
    pub fn new() -> Self {
        Self { counts: vec![0; N_BUCKETS], total: 0, meaning: PhantomData }
    }

    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts one value `n` times.
    pub fn record_n(&mut self, value: u64, n: u64) {
        self.counts[bucket(value)] += n;
        self.total += n;
    }

    /// Values counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The lower bound of the bucket in which that part of the values, from 0 to 1, lies; 0 without any.
    pub fn percentile(&self, part: f64) -> u64 {
        let wanted = (self.total as f64 * part.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return lower_bound(index);
            }
        }
        0
    }

    /// The percentiles that openraft shows.
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total,
            p0_1: self.percentile(0.001),
            p1: self.percentile(0.01),
            p5: self.percentile(0.05),
            p10: self.percentile(0.1),
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            p99_9: self.percentile(0.999),
        }
    }
}

fn bucket(value: u64) -> usize {
    let index = if value < SUB {
        value
    } else {
        let power = 63 - u64::from(value.leading_zeros());
        let shift = power - u64::from(SUB_BITS);
        (shift + 1) * SUB + ((value >> shift) - SUB)
    };
    usize::try_from(index).expect("there are some five hundred buckets")
}

fn lower_bound(index: usize) -> u64 {
    let index = index as u64;
    if index < SUB {
        return index;
    }
    let shift = index / SUB - 1;
    (SUB + index % SUB) << shift
}

/// Percentiles of a histogram, each the lower bound of its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PercentileStats {
    /// Values counted.
    pub samples: u64,
    /// 0.1 % of the values are at most this.
    pub p0_1: u64,
    /// 1 %.
    pub p1: u64,
    /// 5 %.
    pub p5: u64,
    /// 10 %.
    pub p10: u64,
    /// The median.
    pub p50: u64,
    /// 90 %.
    pub p90: u64,
    /// 99 %.
    pub p99: u64,
    /// 99.9 %.
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, p50, p90, p99, p99_9, .. } = self;
        write!(f, "{samples} samples, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}")
    }
}

/// Several histograms, one line each.
#[derive(Debug, Clone)]
pub struct AsciiChart<T = ()> {
    series: Vec<(String, Histogram<T>)>,
}

impl<T> Default for AsciiChart<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> AsciiChart<T> {
    /// A chart of nothing.
    pub fn new() -> Self {
        Self { series: Vec::new() }
    }

    /// The chart with one more histogram.
    #[must_use]
    pub fn add(mut self, name: &str, histogram: Histogram<T>) -> Self {
        self.series.push((name.to_owned(), histogram));
        self
    }

    /// The lines, for printing.
    pub fn detailed(&self) -> &Self {
        self
    }
}

impl<T> fmt::Display for AsciiChart<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, histogram) in &self.series {
            writeln!(f, "{name}: {}", histogram.percentile_stats())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_bucket_that_begins_at_most_an_eighth_below_it() {
        let powers = (0..64).map(|power| 1u64 << power);
        let around = powers.flat_map(|power| [power - 1, power, power + power / 3]);
        for value in around.chain([0, 1, 7, 8, 9, 1000, u64::MAX]) {
            let low = lower_bound(bucket(value));
            assert!(low <= value && value - low <= value / SUB, "{value}: {low}");
        }
        for index in 0..N_BUCKETS {
            assert_eq!(bucket(lower_bound(index)), index);
        }
    }

    #[test]
    fn percentiles_count_what_was_recorded() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile(0.5), 0);
        histogram.record_n(4, 98);
        histogram.record(100);
        histogram.record(1000);
        let stats = histogram.percentile_stats();
        assert_eq!((stats.samples, stats.p0_1, stats.p50, stats.p90), (100, 4, 4, 4));
        assert_eq!((stats.p99, stats.p99_9), (96, 960));
    }
}
