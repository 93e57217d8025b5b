//! Sixty replicas start at once over five nodes, beside as many Docker Engines in turns; and what daemons
//! and shims take of memory.

use skep_cluster_tests::{BUSYBOX, Lab, Output, SETTLES_WITHIN, wait_until};
use skep_runtime::clock::monotonic;

use super::docker::Engines;
use super::figures::{Samples, Target, Unit, load_average};
use super::start_lab;
use super::usage::{daemons, memory, processor_time, shims};

const N_REPLICAS: usize = 60;
const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const WORKERS: [&str; 2] = ["n4", "n5"];
const N_NODES: usize = MANAGERS.len() + WORKERS.len();
const ALL_RUN: Target = Target::AtMost(2.5);
const OF_DOCKER: Target = Target::AtMost(0.4);
const DAEMON: Target = Target::AtMost(30.0);
const SHIM: Target = Target::AtMost(3.0);

/// What runs services; both have the same grammar.
#[derive(Clone, Copy)]
enum Swarm<'a> {
    Skep(&'a Lab),
    Docker(&'a Engines),
}

/// What was measured.
struct Figures {
    skep: Samples,
    docker: Samples,
    ratio: Samples,
    work: Samples,
    shim: Samples,
    docker_shim: Samples,
}

pub(crate) fn run(is_quick: bool) {
    let n_rounds = if is_quick { 2 } else { 7 };
    let lab = start_lab(3, 2);
    lab.import_busybox("n1");
    let engines = match Engines::missing() {
        Some(program) => {
            println!(
                "not measured: Docker Engines, since {program} is not installed (apt-get install docker.io)"
            );
            None
        }
        None => Some(Engines::start(3, 2)),
    };
    let mut swarms = vec![Swarm::Skep(&lab)];
    swarms.extend(engines.as_ref().map(Swarm::Docker));
    // Afterwards every node of ours has the image, as every Docker Engine has.
    for swarm in &swarms {
        swarm.create("warm", N_NODES);
        swarm.wait_until_running("warm", N_NODES);
        swarm.remove("warm");
    }
    let idle = || [&MANAGERS[..], &WORKERS].map(|nodes| memory(&daemons(&lab, nodes)));
    let idle_engines = || engines.as_ref().map(|engines| engines.memory().engines);
    let (before, engines_before) = (idle(), idle_engines());

    let mut figures = Figures::new();
    for round in 1..=n_rounds {
        figures.measure(round, &swarms, round == n_rounds);
        // Each round begins with the other one.
        swarms.rotate_left(1);
    }

    figures.report();
    for (when, [managers, workers]) in [("before", before), ("afterwards", idle())] {
        for (role, samples) in [("manager", managers), ("worker", workers)] {
            let what = format!("an idle {role}'s daemon {when}");
            samples.report(&what, Some(DAEMON));
            samples.report_worst(&what, DAEMON);
        }
    }
    for (when, samples) in [("before", engines_before), ("afterwards", idle_engines())] {
        if let Some(samples) = samples {
            samples.report(&format!("an idle node's dockerd and containerd {when}"), None);
        }
    }
    if let Some(engines) = engines {
        engines.down();
    }
    lab.down();
}

impl Figures {
    fn new() -> Self {
        let seconds = || Samples::new(Unit::Seconds);
        let mebibytes = || Samples::new(Unit::Mebibytes);
        Self {
            skep: seconds(),
            docker: seconds(),
            ratio: Samples::new(Unit::Ratio),
            work: seconds(),
            shim: mebibytes(),
            docker_shim: mebibytes(),
        }
    }

    /// Each swarm in its turn starts all replicas while the other is idle.
    fn measure(&mut self, round: usize, swarms: &[Swarm], is_last: bool) {
        let service = format!("start{round}");
        let (mut ours, mut theirs) = (f64::NAN, None);
        for swarm in swarms {
            match swarm {
                Swarm::Skep(lab) => {
                    let before = processor_time(lab);
                    ours = swarm.time_to_run(round, &service);
                    self.skep.add(ours);
                    if let (Some(before), Some(after)) = (before, processor_time(lab)) {
                        self.work.add(after.saturating_sub(before).as_secs_f64());
                    }
                    if is_last {
                        self.shim = memory(&shims(lab));
                    }
                }
                Swarm::Docker(engines) => {
                    let seconds = swarm.time_to_run(round, &service);
                    self.docker.add(seconds);
                    theirs = Some(seconds);
                    if is_last {
                        self.docker_shim = engines.memory().shims;
                    }
                }
            }
            swarm.remove(&service);
        }
        if let Some(theirs) = theirs {
            self.ratio.add(ours / theirs);
        }
    }

    fn report(&self) {
        self.skep.report("from `service create` until all run", Some(ALL_RUN));
        self.work.report("processor time of all nodes meanwhile", None);
        if !self.docker.is_empty() {
            self.docker.report("the same of five Docker Engines", None);
            self.ratio.report("ours to theirs, of the same round", Some(OF_DOCKER));
        }
        println!("memory is PSS: what processes share is divided among them");
        self.shim.report("a shim", Some(SHIM));
        self.shim.report_worst("a shim", SHIM);
        if !self.docker.is_empty() {
            self.docker_shim.report("a containerd-shim", None);
        }
    }
}

impl Swarm<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Skep(_) => "skep",
            Self::Docker(_) => "docker",
        }
    }

    fn client(self, args: &[&str]) -> Output {
        match self {
            Self::Skep(lab) => lab.node("n1").skep(args),
            Self::Docker(engines) => engines.client(args),
        }
    }

    fn create(self, service: &str, n_replicas: usize) {
        let replicas = n_replicas.to_string();
        let mut args = vec!["service", "create", "--detach", "--replicas", &replicas];
        // The first process of a container ignores what it does not handle: SIGTERM would take ten seconds.
        args.extend(["--stop-signal", "KILL", "--name", service]);
        if let Self::Docker(_) = self {
            args.push("--no-resolve-image"); // There is no registry to ask.
        }
        args.extend([BUSYBOX, "sleep", "100000"]);
        self.client(&args).ok();
    }

    /// Starts all replicas, and gives the seconds until all run.
    fn time_to_run(self, round: usize, service: &str) -> f64 {
        let load = load_average();
        let started = monotonic();
        self.create(service, N_REPLICAS);
        let created = started.elapsed().as_secs_f64();
        self.wait_until_running(service, N_REPLICAS);
        let all_run = started.elapsed().as_secs_f64();
        println!(
            "round {round}: {}: all {N_REPLICAS} run after {all_run:.3} s (created after {created:.3} s); \
             load {load}",
            self.name()
        );
        all_run
    }

    /// Waits until as many tasks run as `service ls` counts; cheaper to ask for than all tasks.
    fn wait_until_running(self, service: &str, n_replicas: usize) {
        let wanted = format!("{n_replicas}/{n_replicas}");
        wait_until(SETTLES_WITHIN, &format!("{wanted} of {service} run"), || {
            let filter = format!("name={service}");
            let args = ["service", "ls", "--filter", &filter, "--format", "{{.Replicas}}"];
            let output = self.client(&args);
            ((output.text() == wanted).then_some(()), output.to_string())
        });
    }

    /// Removes a service and waits until nothing is left of it to do.
    fn remove(self, service: &str) {
        self.client(&["service", "rm", service]).ok();
        wait_until(SETTLES_WITHIN, "the service's containers are gone", || {
            let n_left = match self {
                Self::Skep(lab) => shims(lab).len(),
                Self::Docker(engines) => engines.n_containers(),
            };
            ((n_left == 0).then_some(()), format!("{n_left} containers"))
        });
    }
}
