//! Requests by several ways to tasks that are alike, in turns, and how the ways compare.
//!
//! All ways cross the same tunnel, so that what else the machine does meets all of them alike; what is
//! compared is always of the same round.
//!
//! Each way has a task of its own. A task that closes a connection remembers its ports for a minute, and
//! takes them again from the same client only with a later timestamp (RFC 7323, section 5.2). Linux begins
//! timestamps elsewhere for each pair of addresses, and the address that a client connects to is another
//! one for each way: at one task, each way would lose the first packets of many connections to what another
//! way left behind.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;

use skep_cluster_tests::{Output, SETTLES_WITHIN, wait_until};

use super::figures::{Samples, Target, Unit, load_average};
use super::place::Place;
use super::program;
use super::relays::Relay;

/// The way straight to the task's address.
pub(crate) const DIRECT: &str = "direct";
/// The port of whoami.
pub(crate) const TASK_PORT: u16 = 8080;
const N_CONNECTIONS: &str = "16";
const OF_DIRECT: Target = Target::AtLeast(0.95);
const OF_RELAY: Target = Target::AtLeast(1.15);
/// The kernel counts processor time in these (`USER_HZ`, the same on every machine that skep runs on).
const MICROSECONDS_PER_TICK: f64 = 10_000.0;

/// How requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    KeepAlive,
    NewConnections,
}

impl Kind {
    const ALL: [Self; 2] = [Self::KeepAlive, Self::NewConnections];

    fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive requests",
            Self::NewConnections => "new connections",
        }
    }
}

/// What is measured of one way in one round.
#[derive(Debug, Clone, Copy)]
struct Figures {
    requests_per_second: f64,
    /// The time that 99 of 100 requests took at most, in microseconds.
    p99: f64,
    /// What the whole machine computed meanwhile, for each request, in microseconds.
    processor_time: f64,
}

/// The services that tasks are needed of, one for each way.
pub(crate) fn services(ours: &'static str) -> Vec<&'static str> {
    [DIRECT, ours].into_iter().chain(Relay::ALL.map(Relay::name)).collect()
}

/// Whether requests can be sent; says so where not.
pub(crate) fn can_send() -> bool {
    let can = program("wrk").is_some();
    if !can {
        println!("not measured: wrk is not installed (apt-get install wrk)");
    }
    can
}

/// Sends requests from `client` by our way (its name and URL) and by all others, and prints how they
/// compare. `task_of` gives the address of the task of a way; `own` is the client's own address, which
/// relays listen on.
pub(crate) fn compare(
    client: &Place<'_>,
    own: Ipv4Addr,
    ours: (&'static str, String),
    task_of: impl Fn(&str) -> Ipv4Addr,
    is_quick: bool,
) {
    let (n_rounds, seconds) = if is_quick { (5, "1s") } else { (15, "2s") };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let direct = format!("http://{}:{TASK_PORT}/", task_of(DIRECT));
    let name_of_ours = ours.0;
    let mut ways = vec![(DIRECT, direct), ours];
    let mut relays = Vec::new();
    for relay in Relay::ALL {
        let running = relay.start(client, own, task_of(relay.name()), dir.path());
        let Some(running) = running else { continue };
        relays.push(running);
        ways.push((relay.name(), format!("http://{own}:{}/", relay.port())));
    }
    for (_, url) in &ways {
        wait_for_answer(client, url);
    }
    let mut comparison = Comparison::new(name_of_ours);
    for round in 1..=n_rounds {
        for kind in Kind::ALL {
            // Each round begins with another way.
            ways.rotate_left(1);
            let mut round_of_kind = BTreeMap::new();
            for (name, url) in &ways {
                round_of_kind.insert(*name, measure(client, url, kind, seconds));
            }
            let rate = |(name, figures): (&&str, &Figures)| {
                format!("{name} {:.0}/s", figures.requests_per_second)
            };
            let words: Vec<String> = round_of_kind.iter().map(rate).collect();
            let (name, load) = (kind.name(), load_average());
            println!("round {round}: {name}: {}; load {load}", words.join(", "));
            comparison.add(kind, &round_of_kind);
        }
    }
    comparison.report();
    drop(relays);
}

/// Figures of all rounds.
#[derive(Debug)]
struct Comparison {
    ours: &'static str,
    /// Our rate, of that of another way in the same round.
    ratios: BTreeMap<(Kind, &'static str), Samples>,
    /// The longest times, and the processor times, of each way.
    costs: BTreeMap<(Kind, &'static str), [Samples; 2]>,
}

impl Comparison {
    fn new(ours: &'static str) -> Self {
        Self { ours, ratios: BTreeMap::new(), costs: BTreeMap::new() }
    }

    fn add(&mut self, kind: Kind, round: &BTreeMap<&'static str, Figures>) {
        let ours = round[self.ours].requests_per_second;
        for (name, figures) in round {
            if *name != self.ours {
                let ratios = self.ratios.entry((kind, *name));
                let ratios = ratios.or_insert_with(|| Samples::new(Unit::Ratio));
                ratios.add(ours / figures.requests_per_second);
            }
            let costs = self.costs.entry((kind, *name));
            let [p99, time] =
                costs.or_insert_with(|| [(); 2].map(|()| Samples::new(Unit::Microseconds)));
            p99.add(figures.p99);
            time.add(figures.processor_time);
        }
    }

    fn report(&self) {
        for ((kind, other), ratios) in &self.ratios {
            let target = if *other == DIRECT { OF_DIRECT } else { OF_RELAY };
            ratios.report(&format!("{}, {} / {other}", kind.name(), self.ours), Some(target));
        }
        for ((kind, way), [p99, time]) in &self.costs {
            let what = |figure| format!("{}, {way}, {figure}", kind.name());
            p99.report(&what("99 of 100 within"), None);
            time.report(&what("processor time of the machine per request"), None);
        }
    }
}

/// Sends requests for a while with `wrk`.
fn measure(client: &Place<'_>, url: &str, kind: Kind, seconds: &str) -> Figures {
    let mut command = vec!["wrk", "--latency", "-t", "1", "-c", N_CONNECTIONS, "-d", seconds];
    if kind == Kind::NewConnections {
        command.extend(["-H", "Connection: close"]);
    }
    command.push(url);
    let before = busy_ticks();
    let output = client.exec(&command).ok();
    let busy = (busy_ticks() - before) * MICROSECONDS_PER_TICK;
    let errors = output.stdout.lines().find(|line| {
        let line = line.trim();
        line.starts_with("Socket errors") || line.starts_with("Non-2xx")
    });
    if let Some(line) = errors {
        println!("{url}, {}: {}", kind.name(), line.trim());
    }
    read(&output, busy).unwrap_or_else(|| panic!("no figures in what wrk printed: {output}"))
}

fn read(output: &Output, busy: f64) -> Option<Figures> {
    let mut lines = output.stdout.lines().map(str::trim);
    let after = |prefix: &str| {
        output.stdout.lines().find_map(|line| line.trim().strip_prefix(prefix)).map(str::trim)
    };
    let n_requests = lines.find_map(|line| line.split_once(" requests in "))?.0;
    let n_requests: f64 = n_requests.parse().ok()?;
    Some(Figures {
        requests_per_second: after("Requests/sec:")?.parse().ok()?,
        p99: microseconds(after("99%")?)?,
        processor_time: busy / n_requests,
    })
}

/// A time as `wrk` writes it, such as `1.25ms`.
fn microseconds(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 60e6)];
    let parse =
        |(unit, factor): (&str, f64)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor);
    units.into_iter().find_map(parse)
}

/// Processor time of the whole machine that was not idle, since it started: of programs and of the
/// kernel, which does the forwarding aside from all programs.
fn busy_ticks() -> f64 {
    let stat = fs::read_to_string("/proc/stat").expect("/proc is there");
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<f64> =
        line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq; time of guests is in user, what is stolen is not ours.
    let [user, nice, system, _, _, irq, softirq, ..] = fields[..] else {
        panic!("/proc/stat has no times of processors: {line}")
    };
    user + nice + system + irq + softirq
}

#[track_caller]
fn wait_for_answer(client: &Place<'_>, url: &str) {
    wait_until(SETTLES_WITHIN, &format!("{url} answers"), || {
        let output = client.exec(&["curl", "-sS", "-m", "2", "-o", "/dev/null", url]);
        (output.status.success().then_some(()), output.to_string())
    });
}

#[cfg(test)]
mod tests {
    use super::microseconds;

    #[test]
    fn times_of_wrk_are_read() {
        assert_eq!(microseconds("612.00us"), Some(612.0));
        assert_eq!(microseconds("1.25ms"), Some(1250.0));
        assert_eq!(microseconds("1.50s"), Some(1.5e6));
        assert_eq!(microseconds("nonsense"), None);
    }
}
