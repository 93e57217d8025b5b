//! Commands in running containers.

use std::time::Duration;

use skep_worker::container::ExecOutcome;
use skep_worker_core::oci::{ContainerInput, Limits};

use crate::Test;
use crate::environment::{Environment, block_on, config, expect_error, is_running, shell};

pub(crate) const TESTS: &[Test] = &[
    ("an_exec_gives_code_and_output", || block_on(codes)),
    ("an_exec_runs_confined_like_the_container", || block_on(confinement)),
    ("an_exec_that_takes_too_long_is_killed", || block_on(timeouts)),
    ("an_exec_whose_future_is_dropped_is_killed", || block_on(dropped)),
    ("an_exec_needs_a_running_container", || block_on(states)),
];

const LONG: Duration = Duration::from_secs(60);

async fn exec(env: &Environment, script: &str, time: Duration) -> ExecOutcome {
    let argv = ["/bin/sh", "-c", script].map(String::from);
    env.runtime.exec("c", &argv, &["ADDED=yes".into()], time).await.unwrap()
}

async fn start(env: &Environment, container: ContainerInput) -> i32 {
    let pid = env.start(&config("c", container)).await;
    env.line("c", "up").await;
    pid
}

const IDLE: &str = "echo up; exec sleep 100000";

async fn codes(env: Environment) {
    let container = ContainerInput { env: vec!["OWN=1".into()], ..shell(IDLE) };
    start(&env, container).await;
    for (script, code, output) in [
        ("echo out; echo err >&2; exit 3", 3, "out\nerr\n"),
        ("echo $OWN $ADDED", 0, "1 yes\n"),
        ("kill -9 $$", 137, ""),
        ("cat", 0, ""),
        // A child that keeps the output open must not keep the check waiting.
        ("sleep 1000 & echo done", 0, "done\n"),
    ] {
        let outcome = exec(&env, script, LONG).await;
        assert_eq!((outcome.exit_code, outcome.output.as_str()), (code, output), "{script}");
        assert!(!outcome.is_timed_out);
    }
    let outcome = exec(&env, "yes | head -n 100000", LONG).await;
    assert_eq!((outcome.exit_code, outcome.output.len()), (0, 4096));

    let status = exec(&env, "grep Cap /proc/self/status", LONG).await.output;
    for set in ["CapBnd", "CapEff", "CapPrm"] {
        assert!(status.contains(&format!("{set}:\t00000000a80425fb")), "{status}");
    }
    let missing = env.runtime.exec("c", &["/no/such".into()], &[], LONG).await;
    expect_error(missing, "not found");
    let names = std::fs::read_dir(env.run_dir("c")).unwrap();
    let left = names
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("exec-"));
    assert_eq!(left.count(), 0, "an exec leaves nothing in the run directory");
    env.runtime.remove("c").await.unwrap();
}

async fn confinement(env: Environment) {
    let container = ContainerInput {
        user: Some("web".into()),
        dir: Some("/tmp".into()),
        limits: Limits { pids: 20, ..Limits::default() },
        ..shell(IDLE)
    };
    start(&env, container).await;
    let status = exec(&env, "cat /proc/self/status; id; pwd; mount -t tmpfs n /tmp", LONG).await;
    let text = status.output;
    for part in [
        "Seccomp:\t2",
        "CapBnd:\t00000000a80425fb",
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "SigBlk:\t0000000000000000",
        "uid=33(web) gid=33(web) groups=33(web),44(audit)",
        "\n/tmp\n",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let own = exec(&env, "cat /proc/self/cgroup | grep -v name= | grep -v 0::", LONG).await.output;
    let cgroup = format!("{}/c", env.options.cgroup_parent);
    assert!(!own.is_empty() || std::path::Path::new("/sys/fs/cgroup/cgroup.procs").exists());
    assert!(own.lines().all(|line| line.ends_with(&cgroup)), "{own}");
    let ls = exec(&env, "ls /proc/self/fd", LONG).await.output;
    assert_eq!(ls.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"], "3 is ls's own");
    env.runtime.remove("c").await.unwrap();
}

async fn timeouts(env: Environment) {
    let init = start(&env, shell(IDLE)).await;
    let before = env.cgroup("c").pids();
    let script = "echo begun; sleep 1000 & sleep 1001";
    let outcome = exec(&env, script, Duration::from_millis(700)).await;
    assert!(outcome.is_timed_out);
    assert_eq!((outcome.exit_code, outcome.output.as_str()), (137, "begun\n"));
    // Process 1 reaps nobody, so that the killed ones may stay as zombies.
    let after: Vec<i32> =
        env.cgroup("c").pids().into_iter().filter(|pid| is_running(*pid)).collect();
    assert!(after.iter().all(|pid| before.contains(pid)), "{before:?} {after:?}");
    assert!(is_running(init));
    env.runtime.remove("c").await.unwrap();
}

async fn dropped(env: Environment) {
    start(&env, shell(IDLE)).await;
    let script = "echo $$ > /tmp/begun; mv /tmp/begun /tmp/pid; exec sleep 1000";
    {
        let running = exec(&env, script, LONG);
        let begun = env.data_dir("c").join("upper/tmp/pid");
        let seen = async {
            while !begun.exists() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            outcome = running => panic!("it ended: {outcome:?}"),
            () = seen => {}
        }
    }
    // The helper sees its socket closed and kills the command; a command that waits for its end
    // shows it without a sleep.
    let wait = "while kill -0 $(cat /tmp/pid) 2>/dev/null; do :; done; echo gone";
    assert_eq!(exec(&env, wait, LONG).await.output, "gone\n");
    env.runtime.remove("c").await.unwrap();
}

async fn states(env: Environment) {
    env.runtime.create(&config("c", shell("true"))).await.unwrap();
    let argv = ["/bin/true".to_owned()];
    expect_error(env.runtime.exec("c", &argv, &[], LONG).await, "not started");
    env.runtime.start("c").await.unwrap();
    env.runtime.wait("c").await.unwrap();
    assert!(env.runtime.exec("c", &argv, &[], LONG).await.is_err());
    env.runtime.remove("c").await.unwrap();
    expect_error(env.runtime.exec("c", &argv, &[], LONG).await, "not found");
}
