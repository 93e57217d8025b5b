//! Deletes interfaces of networks, on a thread of its own and many at once.
//!
//! The kernel takes tens of milliseconds to delete an interface, and no longer for all that it deletes
//! together. Rules and neighbours must not wait for it: a service would be refused meanwhile although its
//! tasks run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::linux::fs::MetadataExt as _;
use std::path::PathBuf;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use tokio::sync::{mpsc, oneshot};

use crate::net::Error;
use crate::net::namespace::{self, Home};
use crate::net::rtnetlink::{Link, Mode, RouteChannel};

const THREAD: &str = "skep-removal";
const LOOPBACK: &str = "lo";
/// Requests that may wait: each is one call of this node's agent.
const QUEUE_MAX: usize = 256;
/// The group that interfaces are put into to be deleted together.
const DOOMED: u32 = 0x736b_6570;

/// What is to be deleted.
#[derive(Debug)]
pub(super) enum Target {
    /// One interface; fine if it is gone.
    Port {
        /// Where it is.
        namespace: File,
        /// Its name.
        interface: String,
    },
    /// A network: all interfaces of its namespace, and the file that keeps it.
    Network {
        /// The namespace.
        namespace: File,
        /// The file.
        path: PathBuf,
    },
}

#[derive(Debug)]
struct Request {
    targets: Vec<Target>,
    answer: oneshot::Sender<Result<(), Error>>,
}

/// The thread that deletes; clones share it, and it ends with the last of them.
#[derive(Debug, Clone)]
pub(super) struct Removal {
    requests: mpsc::Sender<Request>,
}

impl Removal {
    /// Starts the thread in the namespace of the calling one.
    pub(super) fn start() -> Result<Self, Error> {
        let home = Home::here()?;
        let (requests, mut received) = mpsc::channel::<Request>(QUEUE_MAX);
        let work = move || {
            while let Some(first) = received.blocking_recv() {
                let mut batch = vec![first];
                while let Ok(request) = received.try_recv() {
                    batch.push(request);
                }
                remove_all(&home, batch);
            }
        };
        let thread = std::thread::Builder::new().name(THREAD.to_owned()).spawn(work);
        thread.map_err(|e| Error::kernel(format!("start the thread {THREAD}"), e))?;
        Ok(Self { requests })
    }

    /// Deletes; returns when it is done.
    pub(super) async fn remove(&self, targets: Vec<Target>) -> Result<(), Error> {
        if targets.is_empty() {
            return Ok(());
        }
        let (answer, result) = oneshot::channel();
        let sent = self.requests.send(Request { targets, answer }).await;
        sent.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }

    /// Deletes without being waited for, for a thread that blocks. What fails is logged, and left to the
    /// next daemon.
    pub(super) fn remove_later(&self, targets: Vec<Target>) -> Result<(), Error> {
        if targets.is_empty() {
            return Ok(());
        }
        let (answer, _) = oneshot::channel();
        self.requests.blocking_send(Request { targets, answer }).map_err(|_| gone())
    }

    /// Blocks until all that was asked for before is done.
    pub(super) fn wait(&self) -> Result<(), Error> {
        let (answer, result) = oneshot::channel();
        let request = Request { targets: Vec::new(), answer };
        self.requests.blocking_send(request).map_err(|_| gone())?;
        result.blocking_recv().map_err(|_| gone())?
    }
}

fn gone() -> Error {
    Error::ThreadGone { name: THREAD }
}

/// The interfaces of one namespace that are to go.
#[derive(Debug, Default)]
struct Doomed<'a> {
    namespace: Option<&'a File>,
    interfaces: BTreeSet<&'a str>,
    /// The file of a network that goes whole.
    path: Option<&'a PathBuf>,
}

fn remove_all(home: &Home, batch: Vec<Request>) {
    let targets = || batch.iter().flat_map(|request| &request.targets);
    let is_done = remove(home, targets()).is_ok();
    for request in batch {
        // Each on its own says which one it was.
        let result = if is_done { Ok(()) } else { remove(home, &request.targets) };
        if let Err(Err(error)) = request.answer.send(result) {
            tracing::warn!(error = &error as &dyn std::error::Error, "an interface is left");
        }
    }
}

fn remove<'a>(home: &Home, targets: impl IntoIterator<Item = &'a Target>) -> Result<(), Error> {
    let mut all: BTreeMap<u64, Doomed<'a>> = BTreeMap::new();
    for target in targets {
        let (Target::Port { namespace, .. } | Target::Network { namespace, .. }) = target;
        let identity = namespace.metadata();
        let identity = identity.map_err(|e| Error::kernel("look at a network namespace", e))?;
        let doomed = all.entry(identity.st_ino()).or_default();
        doomed.namespace = Some(namespace);
        match target {
            Target::Port { interface, .. } => drop(doomed.interfaces.insert(interface)),
            Target::Network { path, .. } => doomed.path = Some(path),
        }
    }
    all.into_values().try_for_each(|doomed| doomed.remove(home))
}

impl Doomed<'_> {
    fn remove(&self, home: &Home) -> Result<(), Error> {
        let Some(namespace) = self.namespace else { return Ok(()) };
        let mut channel = home.within(namespace, RouteChannel::open)??;
        let is_doomed = |link: &Link| match self.path {
            Some(_) => link.name != LOOPBACK,
            None => self.interfaces.contains(link.name.as_str()),
        };
        let links = channel.links()?;
        let links: Vec<&Link> = links.iter().filter(|link| is_doomed(link)).collect();
        match links.as_slice() {
            [] => {}
            [link] => channel.delete_link(&link.name, link.index)?,
            links => delete_together(&mut channel, links)?,
        }
        // The namespace itself may live on for a while: shims copied the mount that keeps it.
        self.path.map_or(Ok(()), |path| namespace::forget(path))
    }
}

fn delete_together(channel: &mut RouteChannel, links: &[&Link]) -> Result<(), Error> {
    for link in links {
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        message.attributes.push(LinkAttribute::Group(DOOMED));
        let action = format!("prepare the deletion of interface {}", link.name);
        channel.change(&action, Mode::Change, RouteNetlinkMessage::SetLink(message))?;
    }
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(DOOMED));
    let action = format!("delete {} interfaces", links.len());
    channel.delete(&action, RouteNetlinkMessage::DelLink(message))
}
