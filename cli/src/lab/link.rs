//! The lab's cables and its switch, made through netlink.
//!
//! Everything here runs in a short-lived thread that first enters the network namespace it works
//! in; no other thread of the process changes its namespace.
//!
//! # Invariants
//!
//! - A node's hardware address follows from its number: after a power loss the others need not
//!   learn it again.
//! - Deleting one end of a cable deletes both, at once; nothing waits for a namespace to end.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::pin::pin;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use futures::future::{Either, select};
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::{InfoData, InfoVeth};
use netlink_packet_route::route::{RouteAddress, RouteAttribute};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use skep_runtime::sys::ProcessId;

/// The bridge inside the switch.
const BRIDGE: &str = "switch0";
/// The interface of every member.
const CARD: &str = "eth0";
/// How the host's ends of its links to labs start; a number follows.
const HOST_LINK_PREFIX: &str = "skeplab";
/// Every lab's network is a /24.
pub(super) const PREFIX_LENGTH: u8 = 24;

/// The switch's end of a member's cable.
fn port_name(member: &str) -> String {
    format!("p-{member}")
}

/// A network namespace that stays the same whatever happens to the process it was found by.
#[derive(Debug)]
pub(super) struct Netns(File);

impl Netns {
    /// Opens the namespace of a member by its init.
    pub(super) fn of(init: ProcessId) -> Result<Self> {
        let path = format!("/proc/{}/ns/net", init.pid);
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        // Compared only now, the namespace is surely that of this very process.
        if !init.is_alive() {
            bail!("process {} is gone", init.pid);
        }
        Ok(Self(file))
    }
}

/// Runs netlink calls in a namespace; `None` is the host's.
fn within<T: Send>(
    netns: Option<&Netns>,
    work: impl AsyncFnOnce(Handle) -> Result<T> + Send,
) -> Result<T> {
    let body = || -> Result<T> {
        if let Some(netns) = netns {
            setns(&netns.0, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().context("open netlink")?;
            match select(pin!(connection), pin!(work(handle))).await {
                Either::Left(_) => bail!("the netlink connection ended"),
                Either::Right((done, _)) => done,
            }
        })
    };
    std::thread::scope(|scope| match scope.spawn(body).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Makes the bridge.
pub(super) fn make_switch(switch: &Netns) -> Result<()> {
    within(Some(switch), async |handle| {
        set_up(&handle, "lo").await?;
        let bridge = LinkBridge::new(BRIDGE).up().build();
        handle.link().add(bridge).execute().await.context("make the lab's bridge")
    })
}

/// Lays a cable from the switch into a member, and gives the member its address.
pub(super) fn plug_in(
    switch: &Netns,
    member: &str,
    into: &Netns,
    address: Ipv4Addr,
    is_cut: bool,
) -> Result<()> {
    within(Some(switch), async |handle| {
        lay_cable(&handle, &port_name(member), CARD, into, mac_address(address)).await?;
        if is_cut { Ok(()) } else { set_up(&handle, &port_name(member)).await }
    })
    .with_context(|| format!("lay the cable of {member}"))?;
    within(Some(into), async |handle| {
        set_up(&handle, "lo").await?;
        set_address(&handle, CARD, address).await?;
        if skep_worker::net::host_has_ipv6() {
            add_ipv6(&handle, CARD, address).await
        } else {
            Ok(())
        }
    })
    .with_context(|| format!("set the address of {member}"))
}

/// Lays the cable from the switch to the host.
pub(super) fn plug_in_host(switch: &Netns, link: &str, address: Ipv4Addr) -> Result<()> {
    let host = Netns(File::open("/proc/self/ns/net").context("open the host's network")?);
    within(Some(switch), async |handle| {
        lay_cable(&handle, &port_name("host"), link, &host, mac_address(address)).await?;
        set_up(&handle, &port_name("host")).await
    })
    .context("lay the cable of the host")?;
    within(None, async |handle| set_address(&handle, link, address).await)
        .context("set the host's address")
}

/// Pulls or restores a member's cable at the switch.
pub(super) fn set_cable(switch: &Netns, member: &str, is_cut: bool) -> Result<()> {
    within(Some(switch), async |handle| {
        let index = index_of(&handle, &port_name(member)).await?;
        let index = index.with_context(|| format!("{member} has no cable"))?;
        let message = LinkUnspec::new_with_index(index);
        let message = if is_cut { message.down() } else { message.up() };
        handle.link().set(message.build()).execute().await.context("change the port")
    })
}

/// Removes a member's cable; none is done already.
pub(super) fn remove_cable(switch: &Netns, member: &str) -> Result<()> {
    within(Some(switch), async |handle| delete_link(&handle, &port_name(member)).await)
}

/// Removes the host's link to a lab; none is done already.
pub(super) fn remove_host_link(link: &str) -> Result<()> {
    within(None, async |handle| delete_link(&handle, link).await)
}

/// What of the host's network a new lab must keep away from.
#[derive(Debug, Default)]
pub(super) struct HostNetwork {
    /// Destinations of IPv4 routes, but for the default route.
    pub routes: Vec<(Ipv4Addr, u8)>,
    links: Vec<String>,
}

impl HostNetwork {
    pub(super) fn read() -> Result<Self> {
        within(None, async |handle| {
            let mut host = Self::default();
            let mut links = handle.link().get().execute();
            while let Some(link) = links.try_next().await.context("list links")? {
                host.links.extend(link_name(&link));
            }
            let ipv4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
            let mut routes = handle.route().get(ipv4).execute();
            while let Some(route) = routes.try_next().await.context("list routes")? {
                let length = route.header.destination_prefix_length;
                let destination = route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
                    _ => None,
                });
                host.routes.extend(destination.map(|address| (address, length)));
            }
            Ok(host)
        })
        .context("read the host's network")
    }

    /// The first name for a link to a lab that is neither on the host nor in `taken`.
    pub(super) fn free_link_name(&self, taken: &[&str]) -> String {
        let is_free = |name: &String| !self.links.contains(name) && !taken.contains(&name.as_str());
        let mut names = (0_u32..).map(|number| format!("{HOST_LINK_PREFIX}{number}"));
        names.find(is_free).expect("a host has fewer links than there are numbers")
    }
}

/// Lays a cable whose far end is, under the name given, in another namespace.
async fn lay_cable(
    handle: &Handle,
    near: &str,
    far: &str,
    into: &Netns,
    mac: Vec<u8>,
) -> Result<()> {
    let peer = LinkUnspec::new_with_name(far).setns_by_fd(into.0.as_raw_fd()).address(mac).build();
    let cable = LinkVeth::new(near, far).set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    handle.link().add(cable.build()).execute().await.context("make a veth pair")?;
    let bridge = index_of(handle, BRIDGE).await?.context("the lab's bridge is gone")?;
    let port = LinkUnspec::new_with_name(near).controller(bridge).build();
    handle.link().set(port).execute().await.context("put the port on the bridge")
}

async fn set_address(handle: &Handle, link: &str, address: Ipv4Addr) -> Result<()> {
    let index = index_of(handle, link).await?.with_context(|| format!("no interface {link}"))?;
    let address = IpAddr::V4(address);
    handle
        .address()
        .add(index, address, PREFIX_LENGTH)
        .execute()
        .await
        .context("add an address")?;
    set_up(handle, link).await
}

/// Adds the IPv6 address that belongs to a member's other one: `fd00::10.77.0.1` to 10.77.0.1.
async fn add_ipv6(handle: &Handle, link: &str, of: Ipv4Addr) -> Result<()> {
    const PREFIX_LENGTH: u8 = 64;
    let prefix = u128::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0));
    let address = Ipv6Addr::from(prefix | u128::from(u32::from(of)));
    let index = index_of(handle, link).await?.with_context(|| format!("no interface {link}"))?;
    let mut add = handle.address().add(index, IpAddr::V6(address), PREFIX_LENGTH);
    // Nobody else has it: usable at once.
    add.message_mut().header.flags = AddressHeaderFlags::Nodad;
    add.execute().await.context("add an IPv6 address")
}

async fn set_up(handle: &Handle, link: &str) -> Result<()> {
    let message = LinkUnspec::new_with_name(link).up().build();
    handle.link().set(message).execute().await.with_context(|| format!("set {link} up"))
}

async fn delete_link(handle: &Handle, link: &str) -> Result<()> {
    let Some(index) = index_of(handle, link).await? else { return Ok(()) };
    match handle.link().del(index).execute().await {
        // Gone between the question and the request.
        Err(error) if error_number(&error) == Some(libc::ENODEV) => Ok(()),
        done => done.with_context(|| format!("delete {link}")),
    }
}

async fn index_of(handle: &Handle, link: &str) -> Result<Option<u32>> {
    let mut found = handle.link().get().match_name(link.to_owned()).execute();
    match found.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if error_number(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("find {link}")),
    }
}

fn error_number(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

fn link_name(link: &netlink_packet_route::link::LinkMessage) -> Option<String> {
    use netlink_packet_route::link::LinkAttribute;
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

/// A locally administered address that spells the IPv4 address.
fn mac_address(address: Ipv4Addr) -> Vec<u8> {
    let [a, b, c, d] = address.octets();
    vec![0x02, 0x4c, a, b, c, d]
}
