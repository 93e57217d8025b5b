//! Every core has more to do than it can for a minute, and the swarm takes nobody for dead.

use std::collections::BTreeSet;
use std::time::Duration;

use skep_cluster_tests::{Busy, Lab, LabOptions, TaskRow, is_root_or_skip, wait_until};
use skep_runtime::clock::monotonic;

const WEB: &str = "saturated_web";
const N_TASKS: usize = 8;
const MINUTE: Duration = Duration::from_secs(60);
/// The managers are asked all the time; an answer may take long on such a machine.
const ENDS_WITHIN: Duration = Duration::from_secs(120);

const STACK: &str = r#"
services:
  web:
    image: IMAGE
    environment:
      TASK_ID: "{{.Task.ID}}"
      SERVICE_NAME: "{{.Service.Name}}"
    healthcheck:
      test: ["CMD", "/whoami", "healthcheck"]
      interval: 5s
      timeout: 10s
      retries: 3
    deploy: {replicas: 8}
"#;

fn ids(tasks: &[TaskRow]) -> BTreeSet<&str> {
    tasks.iter().map(|task| task.id.as_str()).collect()
}

#[test]
fn no_task_is_replaced_while_all_cores_are_saturated() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions::default());
    lab.import_whoami();
    lab.deploy_whoami("saturated", STACK);
    let before = lab.wait_until_settled("n1", WEB, N_TASKS);
    let busy = Busy::start();
    let started = monotonic();
    let mut n_looks = 0;
    wait_until(ENDS_WITHIN, "a minute is over", || {
        let tasks = lab.node("n1").tasks(WEB);
        assert_eq!(
            ids(&tasks),
            ids(&before),
            "{:?} after the start: {tasks:#?}",
            started.elapsed()
        );
        n_looks += 1;
        ((started.elapsed() >= MINUTE).then_some(()), format!("{n_looks} looks"))
    });
    eprintln!("-- {} busy threads for a minute, {n_looks} looks at the tasks", busy.n_threads());
    drop(busy);
    assert_eq!(lab.wait_until_settled("n1", WEB, N_TASKS), before);
    lab.down();
}
