//! The loopback of a container that is on no network at all.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};

use super::Error;
use super::namespace::Home;
use super::rtnetlink::{Mode, RouteChannel};
use super::thread::KernelThread;

const LOOPBACK: &str = "lo";

/// Sets it up; fine where it is.
pub async fn raise(task_id: &str, pid: u32) -> Result<(), Error> {
    let task_id = task_id.to_owned();
    let raise = move || {
        let home = Home::here()?;
        let namespace = home.of_container(&task_id, pid)?;
        home.within(&namespace, raise_here)?.map(|()| ((), ()))
    };
    // The thread enters the container's namespace, and ends with its handle.
    KernelThread::start("skep-loopback", raise).await.map(drop)
}

fn raise_here() -> Result<(), Error> {
    let mut channel = RouteChannel::open()?;
    let Some(link) = channel.link(LOOPBACK)?.filter(|link| !link.is_up) else { return Ok(()) };
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let action = "set up the loopback of a container";
    channel.change(action, Mode::Change, RouteNetlinkMessage::SetLink(message))
}
