//! Sixty replicas start at once over five nodes; and what daemons and shims take of memory.

use skep_cluster_tests::{BUSYBOX, Lab, SETTLES_WITHIN, wait_until};
use skep_runtime::clock::monotonic;

use super::figures::{Samples, Target, Unit, load_average};
use super::start_lab;
use super::usage::{daemons, memory, processor_time, shims};

const N_REPLICAS: usize = 60;
const MANAGERS: [&str; 3] = ["n1", "n2", "n3"];
const WORKERS: [&str; 2] = ["n4", "n5"];
const N_NODES: usize = MANAGERS.len() + WORKERS.len();
const ALL_RUN: Target = Target::AtMost(2.5);
const DAEMON: Target = Target::AtMost(30.0);
const SHIM: Target = Target::AtMost(3.0);

pub(crate) fn run(is_quick: bool) {
    let n_rounds = if is_quick { 2 } else { 7 };
    let lab = start_lab(3, 2);
    lab.import_busybox("n1");
    // Afterwards every node has the image, as every Docker Engine would before such a measurement.
    create(&lab, "warm", N_NODES);
    wait_until_running(&lab, "warm", N_NODES);
    remove(&lab, "warm");
    let before = [&MANAGERS[..], &WORKERS].map(|nodes| memory(&daemons(&lab, nodes)));

    let mut started_in = Samples::new(Unit::Seconds);
    let mut work = Samples::new(Unit::Seconds);
    let mut shim = Samples::new(Unit::Mebibytes);
    for round in 1..=n_rounds {
        let service = format!("start{round}");
        let load = load_average();
        let work_before = processor_time(&lab);
        let started = monotonic();
        create(&lab, &service, N_REPLICAS);
        let created = started.elapsed().as_secs_f64();
        wait_until_running(&lab, &service, N_REPLICAS);
        let all_run = started.elapsed().as_secs_f64();
        println!(
            "round {round}: all {N_REPLICAS} run after {all_run:.3} s (created after {created:.3} s); \
             load {load}"
        );
        started_in.add(all_run);
        if let (Some(before), Some(after)) = (work_before, processor_time(&lab)) {
            work.add(after.saturating_sub(before).as_secs_f64());
        }
        if round == n_rounds {
            shim = memory(&shims(&lab));
        }
        remove(&lab, &service);
    }
    let after = [&MANAGERS[..], &WORKERS].map(|nodes| memory(&daemons(&lab, nodes)));

    started_in.report("from `service create` until all run", Some(ALL_RUN));
    work.report("processor time of all nodes meanwhile", None);
    println!("memory is PSS: what processes share is divided among them");
    for (when, [managers, workers]) in [("before", before), ("afterwards", after)] {
        for (role, samples) in [("manager", managers), ("worker", workers)] {
            let what = format!("an idle {role}'s daemon {when}");
            samples.report(&what, Some(DAEMON));
            samples.report_worst(&what, DAEMON);
        }
    }
    shim.report("a shim", Some(SHIM));
    shim.report_worst("a shim", SHIM);
    println!("not measured: five Docker Engines as the peer");
    lab.down();
}

fn create(lab: &Lab, service: &str, n_replicas: usize) {
    let replicas = n_replicas.to_string();
    // The first process of a container ignores what it does not handle: SIGTERM would take ten seconds.
    let args = ["service", "create", "--detach", "--stop-signal", "KILL", "--replicas", &replicas];
    let args = [&args[..], &["--name", service, BUSYBOX, "sleep", "100000"]].concat();
    lab.node("n1").skep(&args).ok();
}

/// Waits until as many tasks run as `service ls` counts; cheaper to ask for than all tasks.
fn wait_until_running(lab: &Lab, service: &str, n_replicas: usize) {
    let wanted = format!("{n_replicas}/{n_replicas}");
    wait_until(SETTLES_WITHIN, &format!("{wanted} of {service} run"), || {
        let filter = format!("name={service}");
        let args = ["service", "ls", "--filter", &filter, "--format", "{{.Replicas}}"];
        let output = lab.node("n1").skep(&args);
        ((output.text() == wanted).then_some(()), output.to_string())
    });
}

/// Removes a service and waits until its shims have ended.
fn remove(lab: &Lab, service: &str) {
    lab.node("n1").skep(&["service", "rm", service]).ok();
    wait_until(SETTLES_WITHIN, "the service's shims have ended", || {
        let left = shims(lab);
        (left.is_empty().then_some(()), format!("{} shims", left.len()))
    });
}
