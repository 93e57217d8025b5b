//! `Events`: what happened, and what happens, one step after another.

use std::time::Duration;

use skep_common::Timestamp;
use skep_common::limits::QUEUE_LENGTH;
use skep_manager_core::events::{self, Filter};
use skep_proto::{Event, EventsRequest};
use skep_runtime::clock;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::ControlService;
use super::error::Error;

/// A moment that is never reached.
const NEVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What a follower asked for.
struct Wanted {
    filter: Filter,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    from_version: Option<u64>,
    is_following: bool,
}

type Events = mpsc::Sender<Result<Event, Status>>;
type Sent = Result<(), mpsc::error::SendError<Result<Event, Status>>>;

pub(super) fn start(
    control: &ControlService,
    request: EventsRequest,
) -> Result<ReceiverStream<Result<Event, Status>>, Status> {
    let pairs = request.filters.into_iter().map(|filter| (filter.key, filter.value));
    let filter = Filter::new(pairs).map_err(Error::Invalid)?;
    let moment = |nanos: i64| (nanos != 0).then_some(Timestamp(nanos));
    let wanted = Wanted {
        filter,
        since: moment(request.since_nanos),
        until: moment(request.until_nanos),
        from_version: (request.from_version > 0).then_some(request.from_version),
        is_following: request.follow,
    };
    let (sender, stream) = mpsc::channel(QUEUE_LENGTH);
    let (control, tasks) = (control.clone(), control.inner.tasks.clone());
    tasks.spawn("events", async move {
        // An error means that the client is gone.
        let _ = run(&control, &wanted, &sender).await;
    });
    Ok(ReceiverStream::new(stream))
}

async fn run(control: &ControlService, wanted: &Wanted, sender: &Events) -> Sent {
    let consensus = &control.inner.consensus;
    let mut feed = consensus.subscribe();
    // What was acknowledged before is here: the follower may come from another manager.
    if let Err(error) = control.read().await {
        return sender.send(Err(error.into())).await;
    }
    let (mut version, is_whole) = match (wanted.from_version, wanted.since) {
        (Some(version), _) => (version, true), // Its page says whether something is missing.
        (None, Some(since)) => consensus.events(|ring| ring.since(since)),
        (None, None) => (consensus.events(events::Ring::version), true),
    };
    if !is_whole {
        send_gap(sender, version).await?;
    }
    loop {
        let page = consensus.events(|ring| ring.behind(version));
        if page.is_gap {
            send_gap(sender, version).await?;
        }
        for event in page.events.iter().filter(|event| wanted.wants(event)) {
            sender.send(Ok(shown(event))).await?;
        }
        version = page.version;
        if !page.is_last {
            continue;
        }
        let left = wanted.until.map_or(NEVER, |until| until.since(clock::now()));
        if !wanted.is_following || left.is_zero() {
            return Ok(());
        }
        let commit = tokio::select! {
            commit = feed.next() => commit,
            () = tokio::time::sleep(left) => continue, // What came until then is looked at once more.
            () = sender.closed() => return Ok(()),
        };
        if commit.is_none() {
            return sender.send(Err(Status::unavailable("this manager is stopping"))).await;
        }
    }
}

impl Wanted {
    fn wants(&self, event: &events::Event) -> bool {
        self.since.is_none_or(|since| event.at >= since)
            && self.until.is_none_or(|until| event.at <= until)
            && self.filter.wants(event, event.kind.name())
    }
}

async fn send_gap(sender: &Events, version: u64) -> Sent {
    sender.send(Ok(Event { gap: true, version, ..Event::default() })).await
}

fn shown(event: &events::Event) -> Event {
    let attributes = event.attributes.iter();
    Event {
        version: event.version,
        time_nanos: event.at.0,
        kind: event.kind.name().into(),
        action: event.action.into(),
        id: event.id_text(),
        attributes: attributes.map(|(key, value)| ((*key).into(), value.clone())).collect(),
        gap: false,
    }
}
