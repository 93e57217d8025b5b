//! `Watch`: the objects as they are, then every change as it is applied.

use std::collections::{BTreeMap, BTreeSet};

use skep_common::limits::QUEUE_LENGTH;
use skep_common::object::ServiceCondition;
use skep_common::{Kind, Object, ServiceId, TaskId};
use skep_manager_core::{Change, State, conditions};
use skep_proto::watch_event::Action as EventAction;
use skep_proto::{WatchEvent, WatchRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::ControlService;
use super::error::{Error, kind_of};
use super::lookup;

/// What a watcher asked for.
struct Selection {
    kinds: Vec<Kind>,
    service_ids: Vec<String>,
    /// The one object, where only that is wanted.
    id: Option<u128>,
}

impl Selection {
    fn of_task(task_id: TaskId) -> Self {
        Self { kinds: vec![Kind::Task], service_ids: Vec::new(), id: Some(task_id.0) }
    }

    fn wants(&self, kind: Kind, id: u128, service_id: Option<skep_common::ServiceId>) -> bool {
        let is_kind = self.kinds.is_empty() || self.kinds.contains(&kind);
        if !is_kind || self.id.is_some_and(|only| only != id) {
            return false;
        }
        let service = match kind {
            Kind::Service => Some(skep_common::ServiceId(id)),
            Kind::Task => service_id,
            _ => return true, // Only services and tasks are selected by service.
        };
        self.service_ids.is_empty()
            || service.is_some_and(|service| self.service_ids.contains(&service.to_string()))
    }
}

pub(super) fn start(
    control: &ControlService,
    request: WatchRequest,
) -> Result<ReceiverStream<Result<WatchEvent, Status>>, Error> {
    let kinds = request.kinds.iter().map(|name| kind_of(name)).collect::<Result<Vec<_>, _>>()?;
    Ok(follow(control, Selection { kinds, service_ids: request.service_ids, id: None }))
}

/// Watches one task, and nothing else.
pub(super) fn start_of_task(
    control: &ControlService,
    task_id: TaskId,
) -> ReceiverStream<Result<WatchEvent, Status>> {
    follow(control, Selection::of_task(task_id))
}

fn follow(
    control: &ControlService,
    selection: Selection,
) -> ReceiverStream<Result<WatchEvent, Status>> {
    let (events, stream) = mpsc::channel(QUEUE_LENGTH);
    let (control, tasks) = (control.clone(), control.inner.tasks.clone());
    tasks.spawn("watch", async move {
        // An error means that the client is gone.
        let _ = run(&control, &selection, &events).await;
    });
    ReceiverStream::new(stream)
}

type Events = mpsc::Sender<Result<WatchEvent, Status>>;
type Sent = Result<(), mpsc::error::SendError<Result<WatchEvent, Status>>>;

async fn run(control: &ControlService, selection: &Selection, events: &Events) -> Sent {
    let mut feed = control.inner.consensus.subscribe();
    let state = match control.read().await {
        Ok(state) => state,
        Err(error) => return events.send(Err(error.into())).await,
    };
    let mut known = BTreeSet::new();
    send_all(control, selection, events, &state, &mut known, EventAction::Initial).await?;
    let mut conditions = conditions::by_service(&state);
    let version = state.version().index;
    let synced = EventAction::Synced.into();
    events.send(Ok(WatchEvent { action: synced, version, ..WatchEvent::default() })).await?;
    loop {
        let commit = tokio::select! {
            commit = feed.next() => commit,
            () = events.closed() => return Ok(()),
        };
        let Some(commit) = commit else {
            return events.send(Err(Status::unavailable("this manager is stopping"))).await;
        };
        if commit.all_changed {
            let before = std::mem::take(&mut known);
            send_all(control, selection, events, &commit.state, &mut known, EventAction::Changed)
                .await?;
            for (kind, id) in before.difference(&known).copied().collect::<Vec<_>>() {
                send_removed(events, kind, id, &commit.state).await?;
            }
            conditions = conditions::by_service(&commit.state);
            continue;
        }
        for change in &commit.changes {
            send_change(control, selection, events, &commit.state, change, &mut known).await?;
        }
        if commit.changes.iter().any(|change| change.kind == Kind::Node) {
            let before = std::mem::replace(&mut conditions, conditions::by_service(&commit.state));
            for change in changed_conditions(&before, &conditions) {
                send_change(control, selection, events, &commit.state, &change, &mut known).await?;
            }
        }
    }
}

type Conditions = BTreeMap<ServiceId, Vec<ServiceCondition>>;

/// A service's document tells what nodes say of it, so it changes with them.
fn changed_conditions(before: &Conditions, after: &Conditions) -> Vec<Change> {
    let ids: BTreeSet<&ServiceId> = before.keys().chain(after.keys()).collect();
    let changed = ids.into_iter().filter(|id| before.get(id) != after.get(id));
    let change =
        |id: &ServiceId| Change { kind: Kind::Service, id: id.0, service_id: None, node_id: None };
    changed.map(change).collect()
}

async fn send_all(
    control: &ControlService,
    selection: &Selection,
    events: &Events,
    state: &State,
    known: &mut BTreeSet<(Kind, u128)>,
    action: EventAction,
) -> Sent {
    for object in state.objects().filter(|object| !lookup::is_hidden(object)) {
        let (kind, id) = (object.kind(), object.raw_id());
        if selection.wants(kind, id, service_of(&object)) {
            known.insert((kind, id));
            send_object(control, events, object, action, state).await?;
        }
    }
    Ok(())
}

async fn send_change(
    control: &ControlService,
    selection: &Selection,
    events: &Events,
    state: &State,
    change: &Change,
    known: &mut BTreeSet<(Kind, u128)>,
) -> Sent {
    if !selection.wants(change.kind, change.id, change.service_id) {
        return Ok(());
    }
    match lookup::object(state, change.kind, change.id) {
        Some(object) => {
            known.insert((change.kind, change.id));
            send_object(control, events, object, EventAction::Changed, state).await
        }
        None if known.remove(&(change.kind, change.id)) => {
            send_removed(events, change.kind, change.id, state).await
        }
        None => Ok(()),
    }
}

async fn send_object(
    control: &ControlService,
    events: &Events,
    object: Object,
    action: EventAction,
    state: &State,
) -> Sent {
    let event = WatchEvent {
        action: action.into(),
        kind: object.kind().name().to_owned(),
        id: skep_common::TaskId(object.raw_id()).to_string(),
        json: control.json(state, object),
        version: state.version().index,
    };
    events.send(Ok(event)).await
}

async fn send_removed(events: &Events, kind: Kind, id: u128, state: &State) -> Sent {
    let event = WatchEvent {
        action: EventAction::Removed.into(),
        kind: kind.name().to_owned(),
        id: skep_common::TaskId(id).to_string(),
        json: String::new(),
        version: state.version().index,
    };
    events.send(Ok(event)).await
}

fn service_of(object: &Object) -> Option<skep_common::ServiceId> {
    match object {
        Object::Service(service) => Some(service.id),
        Object::Task(task) => Some(task.service_id),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use skep_common::NodeId;
    use skep_common::spec::PortProtocol;

    use super::*;

    #[test]
    fn who_watches_a_task_sees_no_other() {
        let selection = Selection::of_task(TaskId(7));
        for (kind, id, expect) in [
            (Kind::Task, 7, true),
            (Kind::Task, 8, false), // Even of the service with the task's id.
            (Kind::Service, 7, false),
            (Kind::Node, 7, false),
        ] {
            assert_eq!(selection.wants(kind, id, Some(ServiceId(7))), expect, "{kind:?} {id}");
        }
    }

    #[test]
    fn a_service_changes_with_what_nodes_say_of_it() {
        let condition = |message: &str| ServiceCondition {
            node_id: NodeId(1),
            protocol: PortProtocol::Tcp,
            published_port: 80,
            message: message.to_owned(),
        };
        let said = |services: &[(u128, &str)]| -> Conditions {
            let services = services.iter();
            services.map(|(id, message)| (ServiceId(*id), vec![condition(message)])).collect()
        };
        let before = said(&[(1, "nginx"), (2, "nginx"), (3, "nginx")]);
        let after = said(&[(2, "apache"), (3, "nginx"), (4, "nginx")]);
        let changed = changed_conditions(&before, &after);
        assert_eq!(changed.iter().map(|change| change.id).collect::<Vec<_>>(), [1, 2, 4]);
        assert!(changed.iter().all(|change| change.kind == Kind::Service));
    }
}
