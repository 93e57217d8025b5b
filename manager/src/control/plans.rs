//! What would happen, and why what waits does. Both are found here, on a view of this manager; the leader
//! is not asked. One such question at a time is thought about, for a bounded time, and no longer than who asked
//! waits for the answer.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use skep_common::spec::ServiceSpec;
use skep_common::{Kind, Node, NodeId, ServiceId, Task, TaskId, TaskState, Version};
use skep_manager_core::explain::Explainer;
use skep_manager_core::whatif::{self, Ask, Managers, WhatIf};
use skep_manager_core::{Action, State, node_name, service, stack};
use skep_proto::{
    ExplainRequest, ExplainResponse, ExplainedFilter, ExplainedTask, PlanRequest, PlanResponse,
    PlannedTask, WhatIfRequest,
};
use skep_runtime::clock;
use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::{ControlService, parse_id, parse_json, services, stacks};
use crate::consensus::MemberRole;

/// How long a manager thinks about one question.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// Answers whose making looks at all tasks are made on a thread of their own, one after the other.
async fn aside<T: Send + 'static>(
    control: &ControlService,
    what: impl FnOnce(&dyn Fn() -> bool) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let unfound = |error: &dyn std::fmt::Display| {
        Error::Precondition(format!("no answer was found: {error}"))
    };
    let turn = control.inner.questions.clone().acquire_owned().await;
    let turn = turn.map_err(|error| unfound(&error))?;
    // A request whose client goes away is dropped, and this with it.
    let asked = CancellationToken::new();
    let _asked = asked.clone().drop_guard();
    let made = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let until = clock::monotonic() + ANSWERS_WITHIN;
        what(&|| asked.is_cancelled() || clock::monotonic() > until)
    });
    made.await.unwrap_or_else(|error| Err(unfound(&error)))
}

pub(super) async fn explain(
    control: &ControlService,
    request: ExplainRequest,
) -> Result<ExplainResponse, Error> {
    let (state, stale) = control.read_for_looking().await?;
    let unconfirmed = stale.clone();
    let answer = aside(control, move |is_late| match request.task_id.is_empty() {
        true => explain_service(&state, &request.service_id, is_late),
        false => explain_task(&state, &request.task_id),
    });
    match answer.await {
        Ok(answer) => Ok(ExplainResponse { stale, ..answer }),
        Err(error @ Error::NotFound { .. }) if !unconfirmed.is_empty() => {
            Err(Error::Unconfirmed { missing: error.to_string(), stale: unconfirmed })
        }
        Err(error) => Err(error),
    }
}

fn explain_service(
    state: &State,
    id: &str,
    is_late: &dyn Fn() -> bool,
) -> Result<ExplainResponse, Error> {
    let service = services::find(state, id)?;
    let explainer = Explainer::new(state);
    let mut tasks: Vec<&Arc<Task>> = state.tasks_of_service(service.id).collect();
    tasks.sort_by_key(|task| (task.slot_key(), task.meta.created_at, task.id));
    tasks.retain(|task| task.desired_state.wants_run() && !task.status.state.is_terminal());
    let n_tasks = tasks.len();
    let mut n_seen = 0;
    let in_time = tasks.into_iter().take_while(|_| !is_late()).inspect(|_| n_seen += 1);
    let is_amiss =
        |task: &ExplainedTask| !task.reason.is_empty() || task.state != TaskState::Running.name();
    let tasks = in_time.map(|task| explained(&explainer, task)).filter(is_amiss).collect();
    let mut notes = explainer.service(&service);
    if let n_left @ 1.. = n_tasks - n_seen {
        notes.push(format!(
            "{n_left} of its {n_tasks} tasks were not looked at within {} s: ask about one of them",
            ANSWERS_WITHIN.as_secs()
        ));
    }
    let service_name = service.spec.name.clone();
    Ok(ExplainResponse { tasks, notes, service_name, stale: String::new() })
}

fn explain_task(state: &State, id: &str) -> Result<ExplainResponse, Error> {
    let task_id = TaskId(parse_id(Kind::Task, id)?);
    let not_found = || Error::NotFound { kind: "task", reference: id.to_owned() };
    let task = state.task(task_id).ok_or_else(not_found)?;
    Ok(ExplainResponse {
        tasks: vec![explained(&Explainer::new(state), task)],
        service_name: task.service_name.clone(),
        ..ExplainResponse::default()
    })
}

fn explained(explainer: &Explainer<'_>, task: &Task) -> ExplainedTask {
    let reason = explainer.task(task);
    let filters = reason.filters.into_iter().map(|row| ExplainedFilter {
        name: row.filter.to_owned(),
        n_nodes: u32::try_from(row.n_nodes).unwrap_or(u32::MAX),
        nearest: row.nearest,
    });
    ExplainedTask {
        task_id: task.id.to_string(),
        name: task.name(),
        state: task.status.state.name().to_owned(),
        reason: reason.text,
        filters: filters.collect(),
    }
}

pub(super) async fn plan(
    control: &ControlService,
    request: PlanRequest,
) -> Result<PlanResponse, Error> {
    let state = control.read().await?;
    let (actions, mut warnings) = match &request.stack {
        Some(deploy) => {
            let spec = parse_json("stack", &deploy.spec_json)?;
            let warnings = stacks::warnings(&spec);
            let (prune, now) = (deploy.prune, clock::now());
            (stack::deploy(&state, spec, prune, now, &mut rand::rng())?.actions, warnings)
        }
        None => of_service(&state, &request)?,
    };
    // What the write would be refused for is no plan; where there is nothing to write, nothing is refused.
    let actions = match actions.is_empty() {
        true => actions,
        false => control.command(actions).await?.actions,
    };
    aside(control, move |is_late| {
        let ask = Ask { now: clock::now(), is_late };
        let answer = whatif::of_actions(&state, actions, &ask, &mut rand::rng())?;
        let mut response = response(&state, answer);
        warnings.append(&mut response.warnings);
        Ok(PlanResponse { warnings, ..response })
    })
    .await
}

/// What creating or updating a service writes, and what users should know of its spec.
fn of_service(state: &State, request: &PlanRequest) -> Result<(Vec<Action>, Vec<String>), Error> {
    let spec: ServiceSpec = parse_json("service spec", &request.spec_json)?;
    let warnings = services::warnings(state, &spec);
    if request.id.is_empty() {
        let id = ServiceId::random(&mut rand::rng());
        let (_, action) = service::create(state, id, spec)?;
        return Ok((vec![action], warnings));
    }
    let service = services::find(state, &request.id)?;
    let version = Version { index: request.version };
    let action = service::update(state, &service, version, spec)?;
    Ok((action.into_iter().collect(), warnings))
}

pub(super) async fn what_if(
    control: &ControlService,
    request: WhatIfRequest,
) -> Result<PlanResponse, Error> {
    let state = control.read().await?;
    let managers = managers(control, &state);
    aside(control, move |is_late| {
        let mut down = BTreeSet::new();
        for id in &request.down_node_ids {
            let node_id = NodeId(parse_id(Kind::Node, id)?);
            let not_found = || Error::NotFound { kind: "node", reference: id.clone() };
            down.insert(state.node(node_id).ok_or_else(not_found)?.id);
        }
        let ask = Ask { now: clock::now(), is_late };
        let answer = whatif::of_nodes_down(&state, &down, &managers, &ask, &mut rand::rng())?;
        Ok(response(&state, answer))
    })
    .await
}

/// The managers' group, by node.
fn managers(control: &ControlService, state: &State) -> Managers {
    let node_of = |raft_id: u64| {
        let is_it = |node: &&Arc<Node>| {
            node.manager_status.as_ref().is_some_and(|status| status.raft_id == raft_id)
        };
        state.nodes().values().find(is_it).map(|node| node.id)
    };
    let members = control.inner.consensus.members();
    let voters = members.iter().filter(|member| member.role == MemberRole::Voter);
    let voters: Vec<Option<NodeId>> = voters.map(|member| node_of(member.raft_id)).collect();
    Managers {
        n_unnamed: voters.iter().filter(|voter| voter.is_none()).count(),
        voters: voters.into_iter().flatten().collect(),
        leader: control.facts(state).leader.and_then(node_of),
    }
}

fn response(state: &State, answer: WhatIf) -> PlanResponse {
    let name = |node_id: Option<NodeId>| {
        let node = node_id.and_then(|node_id| state.node(node_id));
        node.map_or_else(
            || node_id.map(|node_id| node_id.to_string()).unwrap_or_default(),
            |node| node_name(node),
        )
    };
    let planned = |tasks: Vec<whatif::PlannedTask>| -> Vec<PlannedTask> {
        let planned = tasks.into_iter().map(|task| PlannedTask {
            name: task.name,
            task_id: task.task_id.map(|task_id| task_id.to_string()).unwrap_or_default(),
            from_node: name(task.from),
            to_node: name(task.to),
            reason: task.reason,
        });
        planned.collect()
    };
    PlanResponse {
        created: planned(answer.created),
        moved: planned(answer.moved),
        stopped: planned(answer.stopped),
        unplaced: planned(answer.unplaced),
        warnings: answer.warnings,
        steps: answer.steps,
        losses: answer.losses,
    }
}
