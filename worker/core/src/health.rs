//! Health checks: which check a container has, when the next one runs, and what its results mean.
//!
//! A container starts out as *starting*. The first success makes it healthy, so many consecutive
//! failures make it unhealthy; failures within the start period do not count, unless a check has
//! succeeded before. Source: Docker Engine, `daemon/health.go`; Docker docs, `HEALTHCHECK`.

use std::time::Duration;

use skep_common::limits::defaults;
use skep_common::spec::{HealthConfig, Nanos};

/// A health check with every value decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What to run inside the container.
    pub argv: Vec<String>,
    /// Between the end of one check and the start of the next.
    pub interval: Duration,
    /// After this a check counts as failed.
    pub timeout: Duration,
    /// Failures within it do not count.
    pub start_period: Duration,
    /// Between checks within the start period.
    pub start_interval: Duration,
    /// Consecutive failures that make the container unhealthy.
    pub retries: u32,
}

impl HealthCheck {
    /// The check of a container whose service says `service` and whose image says `image`. A field that
    /// the service leaves out is the image's, then Docker's default. `None`: there is none.
    pub fn resolve(service: Option<&HealthConfig>, image: Option<&HealthConfig>) -> Option<Self> {
        let empty = HealthConfig::default();
        let (service, image) = (service.unwrap_or(&empty), image.unwrap_or(&empty));
        let test = service.test.as_ref().filter(|test| !test.is_empty()).or(image.test.as_ref())?;
        let argv = match test.split_first() {
            Some((kind, rest)) if kind == "CMD" && !rest.is_empty() => rest.to_vec(),
            Some((kind, rest)) if kind == "CMD-SHELL" && !rest.is_empty() => {
                vec!["/bin/sh".into(), "-c".into(), rest.join(" ")]
            }
            _ => return None, // NONE, or nothing to run.
        };
        let duration = |of: fn(&HealthConfig) -> Option<Nanos>, default| {
            let given = [of(service), of(image)].into_iter().flatten().find(|nanos| nanos.0 > 0);
            given.map_or(default, Nanos::duration)
        };
        let retries =
            [service.retries, image.retries].into_iter().flatten().find(|retries| *retries > 0);
        Some(Self {
            argv,
            interval: duration(|c| c.interval, defaults::HEALTH_INTERVAL),
            timeout: duration(|c| c.timeout, defaults::HEALTH_TIMEOUT),
            start_period: duration(|c| c.start_period, Duration::ZERO),
            start_interval: duration(|c| c.start_interval, defaults::HEALTH_START_INTERVAL),
            retries: retries.unwrap_or(defaults::HEALTH_RETRIES),
        })
    }
}

/// What a container's checks have said so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Health {
    /// No check has succeeded yet.
    #[default]
    Starting,
    /// The last checks succeed.
    Healthy,
    /// Too many checks in a row failed.
    Unhealthy,
}

/// Counts results of one container's checks.
#[derive(Debug, Clone, Default)]
pub struct Counter {
    health: Health,
    failures: u32,
}

impl Counter {
    /// The counter of a container that was healthy when this daemon found it running.
    pub fn of_healthy() -> Self {
        Self { health: Health::Healthy, failures: 0 }
    }

    /// What the checks have said so far.
    pub fn health(&self) -> Health {
        self.health
    }

    /// How long to wait before the next check, `since_start` after the container's start.
    pub fn delay(&self, check: &HealthCheck, since_start: Duration) -> Duration {
        let is_starting = self.health == Health::Starting && since_start < check.start_period;
        if is_starting { check.start_interval } else { check.interval }
    }

    /// Takes the result of a check that ended `since_start` after the container's start, and returns the
    /// new health when this result changed it.
    pub fn observe(
        &mut self,
        check: &HealthCheck,
        passed: bool,
        since_start: Duration,
    ) -> Option<Health> {
        let before = self.health;
        if passed {
            self.failures = 0;
            self.health = Health::Healthy;
        } else if before == Health::Starting && since_start < check.start_period {
            return None;
        } else {
            self.failures += 1;
            if self.failures >= check.retries {
                self.health = Health::Unhealthy;
            }
        }
        (self.health != before).then_some(self.health)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(start_period_secs: u64) -> HealthCheck {
        HealthCheck {
            argv: vec!["true".into()],
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(1),
            start_period: Duration::from_secs(start_period_secs),
            start_interval: Duration::from_secs(5),
            retries: 3,
        }
    }

    /// `results` has one character a second: `+` passed, `-` failed; `expect` has one a result: `H`
    /// became healthy, `U` became unhealthy, `.` no change.
    #[track_caller]
    fn run(start_period_secs: u64, results: &str, expect: &str) {
        let check = check(start_period_secs);
        let mut counter = Counter::default();
        let observed: String = results
            .chars()
            .zip(1..)
            .map(|(result, second)| {
                match counter.observe(&check, result == '+', Duration::from_secs(second)) {
                    None | Some(Health::Starting) => '.',
                    Some(Health::Healthy) => 'H',
                    Some(Health::Unhealthy) => 'U',
                }
            })
            .collect();
        assert_eq!(observed, expect);
    }

    #[test]
    fn results_count_as_docker_counts_them() {
        run(0, "+", "H");
        run(0, "---", "..U");
        run(0, "--+--+---", "..H.....U");
        run(0, "---+", "..UH");
        run(5, "-------", "......U"); // Seconds 1 to 4 lie within the start period.
        run(5, "+---", "H..U"); // After a success the period has ended.
    }

    #[test]
    fn checks_come_more_often_while_the_container_starts() {
        let check = check(10);
        let mut counter = Counter::default();
        assert_eq!(counter.delay(&check, Duration::from_secs(1)), check.start_interval);
        assert_eq!(counter.delay(&check, Duration::from_secs(11)), check.interval);
        counter.observe(&check, true, Duration::from_secs(1));
        assert_eq!(counter.delay(&check, Duration::from_secs(2)), check.interval);
    }

    #[test]
    fn a_service_overrides_its_image_field_by_field() {
        let config = |json: &str| serde_json::from_str::<HealthConfig>(json).unwrap();
        let image = config(r#"{"Test": ["CMD", "/check"], "Interval": 1000000000, "Retries": 7}"#);
        let resolve = |service: &str| HealthCheck::resolve(Some(&config(service)), Some(&image));
        let resolved = resolve(r#"{"Timeout": 2000000000, "Retries": 1}"#).unwrap();
        assert_eq!(resolved.argv, ["/check"]);
        assert_eq!(resolved.interval, Duration::from_secs(1));
        assert_eq!(resolved.timeout, Duration::from_secs(2));
        assert_eq!(resolved.retries, 1);
        assert_eq!(resolved.start_interval, defaults::HEALTH_START_INTERVAL);
        assert_eq!(
            resolve(r#"{"Test": ["CMD-SHELL", "a | b"]}"#).unwrap().argv,
            ["/bin/sh", "-c", "a | b"]
        );
        assert_eq!(resolve(r#"{"Test": ["NONE"]}"#), None);
        assert_eq!(HealthCheck::resolve(None, None), None);
    }
}
