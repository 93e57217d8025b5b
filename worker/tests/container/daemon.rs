//! A daemon in a process of its own, to be killed.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use skep_worker::container::ContainerRuntime;

use crate::environment::{Environment, busybox_layer, config_on, options, shell, tokio};

/// `creator BASE CGROUP-PARENT LAYER ID start|wait SCRIPT`: makes a container and waits for ever.
pub(crate) fn run(words: &[&str]) {
    let [base, cgroup_parent, layer, id, what, script] = words else { panic!("{words:?}") };
    let runtime = tokio();
    runtime.block_on(async {
        let containers = ContainerRuntime::open(options(Path::new(base), cgroup_parent)).unwrap();
        let config = config_on(layer.into(), id, shell(script));
        let created = containers.create(&config).await.unwrap();
        if *what == "start" {
            containers.start(id).await.unwrap();
        }
        println!("{} {}", created.pid, created.shim_pid);
        std::future::pending::<()>().await;
    });
}

/// A running creator and what it made.
pub(crate) struct Creator {
    child: Child,
    pub(crate) pid: i32,
    pub(crate) shim_pid: i32,
}

impl Creator {
    pub(crate) fn spawn(env: &Environment, id: &str, what: &str, script: &str) -> Self {
        let mut child = Command::new("/proc/self/exe")
            .arg("creator")
            .arg(&env.base)
            .arg(&env.options.cgroup_parent)
            .arg(busybox_layer())
            .args([id, what, script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (pid, shim_pid) = line.trim().split_once(' ').expect("the creator made it");
        Self { child, pid: pid.parse().unwrap(), shim_pid: shim_pid.parse().unwrap() }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Kills the process of this pid and waits for its end.
pub(crate) fn kill_and_wait(pid: i32) {
    let handle = skep_runtime::sys::PidFd::open(pid).unwrap();
    skep_worker::sys::send_signal(handle.as_fd(), 9).unwrap();
    assert!(handle.wait_exit(Some(std::time::Duration::from_secs(30))).unwrap());
}
