//! Daemons and shims that die.

use std::time::Duration;

use nix::sys::statvfs::{FsFlags, statvfs};
use skep_runtime::sys::PidFd;
use skep_worker::container::{AdoptedState, LogOptions};

use crate::Test;
use crate::daemon::{Creator, kill_and_wait};
use crate::environment::{
    Environment, block_on, collect, config, expect_error, is_running, overlays, shell,
};

pub(crate) const TESTS: &[Test] = &[
    ("a_daemon_killed_before_the_start_leaves_nothing", || block_on(killed_before_start)),
    ("a_container_outlives_its_daemon", || block_on(outlives)),
    ("an_exit_without_a_daemon_is_recorded", || block_on(recorded)),
    ("a_killed_shim_leaves_nothing", || block_on(killed_shim)),
    ("a_shim_that_dies_under_the_daemon_is_noticed", || block_on(lost_while_watched)),
    ("a_shim_killed_before_the_start_is_noticed", || block_on(killed_before_report)),
    ("what_is_not_adopted_is_not_touched_unless_removed", || block_on(not_adopted)),
    ("what_a_creation_left_half_done_is_removed", || block_on(half_made)),
];

async fn killed_before_start(env: Environment) {
    let creator = Creator::spawn(&env, "c", "wait", "true");
    let (pid, shim_pid) = (creator.pid, creator.shim_pid);
    assert!(is_running(pid) && env.cgroup("c").exists());
    let shim = PidFd::open(shim_pid).unwrap();
    creator.kill();
    assert!(shim.wait_exit(Some(Duration::from_secs(30))).unwrap(), "the shim ends by itself");
    assert!(!is_running(pid));
    assert!(!env.run_dir("c").exists() && !env.data_dir("c").exists());
    assert!(!env.cgroup("c").exists());
    assert_eq!(overlays(&env.base), Vec::<String>::new());
    assert_eq!(env.runtime.adopt().await.unwrap(), []);
}

async fn outlives(env: Environment) {
    // It writes all the time, also while nobody is there.
    let script = "trap 'echo end; exit 5' TERM; i=0; while :; do i=$((i+1)); echo $i; done";
    let creator = Creator::spawn(&env, "c", "start", script);
    let (pid, shim_pid) = (creator.pid, creator.shim_pid);
    creator.kill();
    let adopted = env.runtime.adopt().await.unwrap();
    assert_eq!(adopted.len(), 1);
    match &adopted[0].state {
        AdoptedState::Running { pid: found, shim_pid: shim, started_at } => {
            assert_eq!((*found, *shim), (pid, shim_pid));
            assert!(started_at.0 > 0);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(env.runtime.adopt().await.unwrap(), [], "what is known is not adopted again");
    let argv = ["/bin/echo", "still here"].map(String::from);
    let outcome = env.runtime.exec("c", &argv, &[], Duration::from_secs(60)).await.unwrap();
    assert_eq!(outcome.output, "still here\n");
    env.line("c", "20000").await;
    let exit = env.runtime.stop("c", 15, Duration::from_secs(60)).await.unwrap();
    assert_eq!(exit.exit_code, 5);
    let records = env.records("c").await;
    let (last, numbers) = records.split_last().unwrap();
    assert_eq!(last.line, "end");
    let is_complete = (1..).zip(numbers).all(|(n, record)| record.line == n.to_string());
    assert!(is_complete, "a line is lost or doubled");
    env.outcome("c").await;
}

async fn recorded(env: Environment) {
    let script = "trap 'exit 3' USR1; echo up; while :; do sleep 1000 & wait $!; done";
    let creator = Creator::spawn(&env, "c", "start", script);
    let (pid, shim) = (creator.pid, PidFd::open(creator.shim_pid).unwrap());
    env.line("c", "up").await;
    creator.kill();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGUSR1).unwrap();
    assert!(shim.wait_exit(Some(Duration::from_secs(30))).unwrap());

    let adopted = env.runtime.adopt().await.unwrap();
    let AdoptedState::Exited(exit) = &adopted[0].state else { panic!("{adopted:?}") };
    assert_eq!((exit.exit_code, exit.signal), (3, None));
    assert_eq!(&env.runtime.wait("c").await.unwrap(), exit);
    assert_eq!(env.outcome("c").await.stdout(), "up\n");
}

async fn killed_shim(env: Environment) {
    let script = "echo up; sleep 1000 & sleep 1001 & wait";
    let creator = Creator::spawn(&env, "c", "start", script);
    env.line("c", "up").await;
    let pids = env.cgroup("c").pids();
    assert!(pids.len() >= 2 && pids.contains(&creator.pid), "{pids:?}");
    kill_and_wait(creator.shim_pid);
    creator.kill();
    assert!(pids.iter().any(|pid| is_running(*pid)), "the container outlives its shim");

    let adopted = env.runtime.adopt().await.unwrap();
    assert_eq!(adopted.len(), 1);
    assert_eq!(adopted[0].state, AdoptedState::Lost);
    assert!(!pids.iter().any(|pid| is_running(*pid)), "processes are left: {pids:?}");
    assert!(!env.cgroup("c").exists());
    assert_eq!(overlays(&env.base), Vec::<String>::new());
    expect_error(env.runtime.wait("c").await, "was lost");
    assert_eq!(env.records("c").await.len(), 1, "its log stays");
    let second = env.reopen().adopt().await.unwrap();
    assert_eq!(second[0].state, AdoptedState::Lost, "it is reported until it is removed");
    env.runtime.remove("c").await.unwrap();
    assert_eq!(env.reopen().adopt().await.unwrap(), []);
}

async fn lost_while_watched(env: Environment) {
    let created = env.runtime.create(&config("c", shell("echo up; sleep 1000"))).await.unwrap();
    env.runtime.start("c").await.unwrap();
    env.line("c", "up").await;
    let options = LogOptions { follow: true, ..Default::default() };
    let follower = collect(env.runtime.logs("c", options).await.unwrap());
    let watched = async {
        let wait = env.runtime.wait("c");
        kill_and_wait_later(created.shim_pid);
        expect_error(wait.await, "was lost");
    };
    let (records, ()) = tokio::join!(follower, watched);
    assert_eq!(records.len(), 1, "the follower ends too");
    assert!(!is_running(created.pid) && !env.cgroup("c").exists());
    env.runtime.remove("c").await.unwrap();
}

/// Kills without waiting: the runtime is the parent and reaps.
fn kill_and_wait_later(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
}

async fn killed_before_report(env: Environment) {
    let created = env.runtime.create(&config("c", shell("true"))).await.unwrap();
    // Once nothing runs it, the program would be writable by who holds a link to it.
    let exe = statvfs(format!("/proc/{}/exe", created.shim_pid).as_str()).unwrap();
    assert!(exe.flags().contains(FsFlags::ST_RDONLY), "it is on a writable mount");

    kill_and_wait_later(created.shim_pid);
    expect_error(env.runtime.start("c").await, "its shim ended");
    expect_error(env.runtime.wait("c").await, "was lost");
    assert!(!is_running(created.pid) && !env.cgroup("c").exists());
    env.runtime.remove("c").await.unwrap();
}

async fn not_adopted(env: Environment) {
    let creator = Creator::spawn(&env, "c", "start", "echo up; exec sleep 1000");
    env.line("c", "up").await;
    expect_error(env.runtime.wait("c").await, "not adopted");
    assert!(is_running(creator.pid) && is_running(creator.shim_pid));
    env.runtime.remove("c").await.unwrap();
    assert!(!is_running(creator.pid) && !is_running(creator.shim_pid));
    assert!(!env.run_dir("c").exists() && !env.cgroup("c").exists());
    creator.kill();
}

async fn half_made(env: Environment) {
    // As a daemon leaves it that is killed before its shim wrote a word.
    std::fs::create_dir_all(env.run_dir("c")).unwrap();
    std::fs::create_dir_all(env.data_dir("c")).unwrap();
    // As a machine leaves it that was started again: its run directories are gone.
    std::fs::create_dir_all(env.data_dir("rebooted")).unwrap();
    let adopted = env.runtime.adopt().await.unwrap();
    let ids: Vec<&str> = adopted.iter().map(|found| found.id.as_str()).collect();
    assert_eq!(ids, ["c", "rebooted"]);
    assert!(adopted.iter().all(|found| found.state == AdoptedState::Lost));
    for id in ids {
        env.runtime.remove(id).await.unwrap();
        assert!(!env.run_dir(id).exists() && !env.data_dir(id).exists());
    }

    // A creation that is given up half-way leaves nothing, and no zombie.
    let config = config("dropped", shell("true"));
    tokio::select! {
        biased;
        created = env.runtime.create(&config) => panic!("too fast: {created:?}"),
        () = async { while !env.run_dir("dropped").join("state.json").exists() {
            tokio::task::yield_now().await;
        } } => {}
    }
    while env.run_dir("dropped").exists() || env.data_dir("dropped").exists() {
        tokio::task::yield_now().await;
    }
    assert!(!env.cgroup("dropped").exists());
}
