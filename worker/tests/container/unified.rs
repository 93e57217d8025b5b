//! cgroup v2, on a machine that may have v1.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use skep_worker::container::AdoptedState;
use skep_worker_core::oci::device_filter;

use crate::Test;
use crate::daemon::kill_and_wait;
use crate::environment::{Environment, block_on, config, shell};

pub(crate) const TESTS: &[Test] = &[
    ("the_kernel_enforces_the_device_filter", device_filter),
    ("containers_run_on_the_unified_hierarchy", unified),
];

/// Mounts the v2 hierarchy in a namespace of its own and runs the container tests there: the mount
/// must be where libcontainer looks, and the test program has threads by now.
fn unified() {
    let status = Command::new("/proc/self/exe").arg("unified-inner").status().unwrap();
    assert!(status.success());
}

pub(crate) fn run_inner() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
    let target = "/sys/fs/cgroup";
    mount(Some("cgroup2"), target, Some("cgroup2"), MsFlags::empty(), None::<&str>).unwrap();
    let _guard = crate::environment::LayerGuard;
    block_on(containers);
}

async fn containers(env: Environment) {
    let script = "grep 0:: /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs; \
        mkdir /sys/fs/cgroup/x; mknod /tmp/d b 8 0; cat /tmp/d; echo ok > /dev/null; \
        grep Seccomp: /proc/1/status; exit 4";
    let outcome = env.sh("c", script).await;
    assert_eq!(outcome.exit.exit_code, 4);
    assert_eq!(outcome.stdout(), "0::/\n/sys/fs/cgroup/cgroup.procs\nSeccomp:\t2\n", "{outcome:?}");
    assert!(outcome.stderr().contains("can't create directory '/sys/fs/cgroup/x': Read-only"));
    let denied = "can't open '/tmp/d': Operation not permitted";
    assert!(outcome.stderr().contains(denied), "{outcome:?}");

    let created =
        env.runtime.create(&config("k", shell("echo up; sleep 999 & wait"))).await.unwrap();
    env.runtime.start("k").await.unwrap();
    env.line("k", "up").await;
    let argv = ["/bin/sh", "-c", "grep 0:: /proc/self/cgroup"].map(String::from);
    let own = env.runtime.exec("k", &argv, &[], Duration::from_secs(60)).await.unwrap();
    assert_eq!(own.output, "0::/\n", "an exec is in the container's cgroup");
    kill_and_wait(created.shim_pid);
    let second = env.reopen();
    assert_eq!(second.adopt().await.unwrap()[0].state, AdoptedState::Lost);
    assert!(!env.cgroup("k").exists());
    second.remove("k").await.unwrap();
}

fn device_filter() {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter(|line| line.contains(" - cgroup2 "));
    let root = mounts.filter_map(|line| line.split(' ').nth(4)).next().expect("a v2 hierarchy");
    let cgroup = format!("{root}/skep-test-devices-{}", std::process::id());
    std::fs::create_dir(&cgroup).unwrap();
    let program = device_filter::program(&device_filter::default_rules());
    let attached = File::open(&cgroup)
        .and_then(|directory| skep_worker::sys::attach_device_filter(directory.as_fd(), &program));
    let node = format!("/tmp/skep-test-node-{}", std::process::id());
    // A process of the cgroup: null may be read, the kernel's messages may not.
    let script = format!(
        "echo $$ > {cgroup}/cgroup.procs && cat /dev/null && ! cat /dev/kmsg 2> /dev/null && \
         mknod {node} b 8 0 && ! cat {node} 2> /dev/null"
    );
    let status = Command::new("timeout").args(["10", "sh", "-c", &script]).status();
    let _ = std::fs::remove_file(&node);
    std::fs::remove_dir(&cgroup).unwrap();
    attached.unwrap();
    assert_eq!(status.unwrap().code(), Some(0));
}
