//! Many at once, and what it costs.

use std::time::Duration;

use futures::{StreamExt, stream};
use skep_runtime::clock;

use crate::Test;
use crate::environment::{Environment, block_on, config, shell};

pub(crate) const TESTS: &[Test] = &[
    ("fifty_containers_run_eight_at_a_time", || block_on(fifty)),
    ("start_time_and_shim_memory", || block_on(cost)),
];

async fn fifty(env: Environment) {
    let env = &env;
    let runs = stream::iter(0..50).map(|number| async move {
        let id = format!("many-{number}");
        let outcome = env.sh(&id, &format!("echo {number}; exit {}", number % 7)).await;
        assert_eq!(outcome.stdout(), format!("{number}\n"));
        assert_eq!(outcome.exit.exit_code, number % 7);
    });
    let begin = clock::monotonic();
    assert_eq!(runs.buffer_unordered(8).count().await, 50);
    println!("    50 containers, 8 at a time: {:.1} s", begin.elapsed().as_secs_f64());
}

async fn cost(env: Environment) {
    let mut times: Vec<Duration> = Vec::new();
    for number in 0..20 {
        let config = config(&format!("time-{number}"), shell("sleep 1000"));
        let begin = clock::monotonic();
        env.start(&config).await;
        times.push(begin.elapsed());
        env.runtime.remove(&config.id).await.unwrap();
    }
    times.sort();
    println!("    create and start: median {:?}, best {:?}", times[10], times[0]);

    let idle = config("memory", shell("echo up; sleep 1000"));
    let created = env.runtime.create(&idle).await.unwrap();
    env.runtime.start("memory").await.unwrap();
    env.line("memory", "up").await;
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", created.shim_pid));
    let rollup = rollup.unwrap();
    let field = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()).map_or("?", |kib| kib).to_owned()
    };
    println!(
        "    shim: PSS {} KiB, of it anonymous {} KiB; RSS {} KiB",
        field("Pss:"),
        field("Pss_Anon:"),
        field("Rss:")
    );
    env.runtime.remove("memory").await.unwrap();
}
