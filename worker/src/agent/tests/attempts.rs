//! What an agent does with a container that ends while no manager leads.

use skep_common::spec::Nanos;

use super::*;

/// Longer than any test takes.
const NOT_IN_THIS_TEST: Duration = Duration::from_secs(3600);

fn task_with(policy: RestartPolicy) -> Task {
    let spec = TaskSpec { restart_policy: Some(policy), ..TaskSpec::default() };
    Task { spec: spec.into(), ..task(1, "web", TaskState::Running) }
}

fn delayed(delay: Duration) -> RestartPolicy {
    RestartPolicy { delay: Some(Nanos::from(delay)), ..RestartPolicy::default() }
}

async fn until_called(stage: &Stage, call: &str, n_times: usize) {
    let called = async {
        let is_it = |noted: &String| noted == call;
        while stage.puppets.calls().iter().filter(|noted| is_it(noted)).count() < n_times {
            tokio::task::yield_now().await;
        }
    };
    soon(call, called).await;
}

/// A session that the agent still holds: those that nobody welcomed are given up by it.
async fn welcomed(stage: &mut Stage, term: u64) -> Session {
    while stage.sessions.try_recv().is_ok() {}
    let session = stage.session().await;
    session.welcome(term).await;
    session
}

/// The task runs, the leader is lost, and the agent knows it.
async fn lose_the_leader(stage: &mut Stage, task: Task) {
    let mut session = stage.session().await;
    session.welcome(1).await;
    session.assign(0, &[task], &[]).await;
    session.until(TaskId(1), reached(TaskState::Running)).await;
    drop(session);
    drop(stage.session().await); // It looks for another one.
}

#[tokio::test]
async fn a_task_is_tried_again_while_nobody_leads_and_managers_hear_of_it() {
    let mut stage = Stage::set(Puppets::default()).await;
    lose_the_leader(&mut stage, task_with(delayed(Duration::ZERO))).await;
    stage.puppets.end(TaskId(1), 3);
    until_called(&stage, "start 1", 2).await;
    let expect = ["prepare 1", "start 1", "prepare 1", "start 1"];
    assert_eq!(stage.puppets.calls(), expect, "of the same task");

    let mut session = welcomed(&mut stage, 2).await;
    let status = session.until(TaskId(1), |status| status.n_attempts > 0).await;
    assert_eq!(status.state, TaskState::Running);
    let [attempt] = &status.attempts[..] else { panic!("{:?}", status.attempts) };
    assert_eq!((attempt.exit_code, attempt.err.as_str()), (3, "task: non-zero exit (3)"));
    assert!(attempt.started_at < attempt.ended_at, "{attempt:?}");

    // From now on managers decide.
    let other = task(2, "web", TaskState::Running);
    session.assign(0, &[task_with(delayed(Duration::ZERO)), other], &[]).await;
    session.until(TaskId(2), reached(TaskState::Running)).await;
    stage.puppets.end(TaskId(1), 4);
    let failed = session.until(TaskId(1), reached(TaskState::Failed)).await;
    assert_eq!((failed.n_attempts, failed.container_status.unwrap().exit_code), (1, 4));
    assert_eq!(stage.puppets.calls()[..4], expect);
    assert_eq!(stage.puppets.calls()[4..], ["prepare 2", "start 2"]);
    stage.tasks.shutdown().await;
}

#[tokio::test]
async fn managers_that_are_back_decide_what_follows_a_container_that_ended_without_them() {
    for desired_state in [TaskState::Running, TaskState::Shutdown] {
        let mut stage = Stage::set(Puppets::default()).await;
        let task = task_with(delayed(NOT_IN_THIS_TEST));
        lose_the_leader(&mut stage, task.clone()).await;
        stage.puppets.end(TaskId(1), 3);
        let mut session = welcomed(&mut stage, 2).await;
        session.assign(0, &[Task { desired_state, ..task }], &[]).await;
        let failed = session.until(TaskId(1), |status| status.state.is_terminal()).await;
        assert_eq!((failed.state, failed.n_attempts), (TaskState::Failed, 0));
        assert_eq!(failed.container_status.unwrap().exit_code, 3);
        assert_eq!(stage.puppets.calls(), ["prepare 1", "start 1"]);
        stage.tasks.shutdown().await;
    }
}

#[tokio::test]
async fn an_attempt_that_is_lost_when_the_daemon_starts_again_is_followed_by_another_one() {
    let mut stage = Stage::without_agent(Puppets::default()).await;
    let executor = || Arc::clone(&stage.puppets) as Arc<dyn Executor>;
    let (before, after) = ((TaskSet::new(), executor()), (TaskSet::new(), executor()));
    stage.start_agent(&before.0, before.1).await;
    lose_the_leader(&mut stage, task_with(delayed(Duration::ZERO))).await;
    before.0.shutdown().await;
    // As after a power loss: the record is there, the container is not.
    stage.start_agent(&after.0, after.1).await;
    until_called(&stage, "start 1", 2).await;
    let mut session = welcomed(&mut stage, 2).await;
    let status = session.until(TaskId(1), |status| status.n_attempts > 0).await;
    assert_eq!(status.state, TaskState::Running);
    assert_eq!(status.attempts[0].err, "its container was gone when the daemon started again");
    after.0.shutdown().await;
}

#[tokio::test]
async fn a_task_whose_policy_says_never_stays_ended() {
    let mut stage = Stage::set(Puppets::default()).await;
    let never = RestartCondition::None;
    let policy = RestartPolicy { condition: Some(never), ..delayed(Duration::ZERO) };
    lose_the_leader(&mut stage, task_with(policy)).await;
    stage.puppets.end(TaskId(1), 0);
    let record = stage.directory.path().join("tasks").join(format!("{}.json", TaskId(1)));
    let recorded = async {
        while !std::fs::read_to_string(&record).unwrap().contains(r#""State":"complete""#) {
            tokio::task::yield_now().await;
        }
    };
    soon("the record of the end", recorded).await;
    assert_eq!(stage.puppets.calls(), ["prepare 1", "start 1"]);
    stage.tasks.shutdown().await;
}
