//! Resource limits and their records.

use skep_worker_core::oci::{ContainerInput, Limits};

use crate::Test;
use crate::environment::{Environment, block_on, shell};

pub(crate) const TESTS: &[Test] = &[
    ("memory_beyond_the_limit_is_reported", || block_on(memory)),
    ("cpu_time_is_limited", || block_on(cpu)),
    ("processes_are_limited", || block_on(pids)),
];

fn limited(limits: Limits, script: &str) -> ContainerInput {
    ContainerInput { limits, ..shell(script) }
}

async fn memory(env: Environment) {
    let limits = Limits { memory_bytes: 64 << 20, ..Limits::default() };
    let allocate = "dd if=/dev/zero of=/dev/null bs=128M count=1";
    let killed = env.run("killed", limited(limits, &format!("exec {allocate}"))).await;
    assert_eq!((killed.exit.exit_code, killed.exit.oom_killed), (137, true), "{killed:?}");

    // The kernel kills a child; the container itself ends well.
    let child = env.run("child", limited(limits, &format!("{allocate}; exit 0"))).await;
    assert_eq!((child.exit.exit_code, child.exit.oom_killed), (0, true), "{child:?}");

    let small = "dd if=/dev/zero of=/dev/null bs=16M count=1; kill -9 $$";
    let within = env.run("within", limited(limits, small)).await;
    assert!(!within.exit.oom_killed, "{within:?}");
}

async fn cpu(env: Environment) {
    let limits = Limits { nano_cpus: 200_000_000, ..Limits::default() };
    // User and system time of the shell against the time that went by, in hundredths.
    let script = "u0=$(awk '{print int($1*100)}' /proc/uptime); \
        i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; \
        u1=$(awk '{print int($1*100)}' /proc/uptime); \
        awk -v wall=$((u1-u0)) '{print $14+$15, wall}' /proc/self/stat /proc/$$/stat | head -n 2";
    let outcome = env.run("cpu", limited(limits, script)).await.good();
    let last = outcome.lines().last().unwrap();
    let (used, wall) = last.split_once(' ').unwrap();
    let (used, wall): (f64, f64) = (used.parse().unwrap(), wall.parse().unwrap());
    assert!(wall > 20.0, "too short to judge: {outcome}");
    assert!(used / wall < 0.35, "used {used} of {wall} hundredths of a second");
}

async fn pids(env: Environment) {
    let limits = Limits { pids: 5, ..Limits::default() };
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo all";
    let outcome = env.run("pids", limited(limits, script)).await;
    assert!(outcome.stderr().contains("can't fork"), "{outcome:?}");
    assert_ne!(outcome.exit.exit_code, 0);
}
