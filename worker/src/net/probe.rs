//! What the routing mesh and overlay networks need of a kernel, found by trying in a network namespace of
//! its own.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
};
use nix::sched::{CloneFlags, unshare};

use super::conntrack::Conntrack;
use super::nft::{Batch, CommitError, Family, Hook, NftChannel, expression};
use super::rtnetlink::{Mode, RouteChannel};
use super::{Error, mesh, secure};

/// What a kernel lacks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Probed {
    /// What is missing, one sentence each; empty on a kernel that has it all.
    pub missing: Vec<String>,
    /// Why it can neither balance published ports nor carry overlay networks: the first of those that it takes.
    pub no_balancer: Option<String>,
}

impl Probed {
    fn note_balancer(&mut self, what: String) {
        self.no_balancer.get_or_insert_with(|| what.clone());
        self.missing.push(what);
    }
}

/// Finds what is missing.
///
/// Leaves the calling thread in an empty network namespace: call it on a thread that ends with it.
pub fn probe() -> Result<Probed, Error> {
    let entered = unshare(CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from);
    entered.map_err(|source| Error::kernel("make a network namespace", source))?;
    let mut channel = RouteChannel::open()?;
    let mut probed = Probed::default();
    for (kind, what) in [
        (InfoKind::Bridge, "bridges (CONFIG_BRIDGE; try: modprobe bridge)"),
        (InfoKind::Veth, "virtual Ethernet pairs (CONFIG_VETH; try: modprobe veth)"),
    ] {
        if let Err(error) = probe_interface(&mut channel, kind, None)? {
            let missing = format!("this kernel has no {what}, which containers need: {error}");
            probed.missing.push(missing);
        }
    }
    let data = InfoData::Vxlan(vec![InfoVxlan::Id(1)]);
    if let Err(error) = probe_interface(&mut channel, InfoKind::Vxlan, Some(data))? {
        probed.note_balancer(format!(
            "this kernel has no VXLAN tunnels (CONFIG_VXLAN; try: modprobe vxlan), which the routing mesh needs: {error}"
        ));
    }
    if let Err(error) = mesh::probe_rules() {
        probed.note_balancer(format!(
            "this kernel has no nftables that balance (CONFIG_NF_TABLES, CONFIG_NFT_NAT, CONFIG_NFT_NUMGEN; try: modprobe nf_tables), which the routing mesh needs: {error}"
        ));
    }
    if let Err(error) = probe_virtual_addresses() {
        probed.note_balancer(format!(
            "this kernel has no nftables with NAT for IPv4 and IPv6 together (CONFIG_NF_TABLES_INET), which overlay networks need: {error}"
        ));
    }
    if let Err(error) = Conntrack::open().and_then(|mut table| table.list()) {
        probed.note_balancer(format!(
            "this kernel shows no connections (CONFIG_NF_CT_NETLINK; try: modprobe nf_conntrack_netlink), which overlay networks need: {error}"
        ));
    }
    probed.missing.extend(secure::implementation().err());
    Ok(probed)
}

/// Makes an interface and deletes it; the inner error is why there is none of that kind.
fn probe_interface(
    channel: &mut RouteChannel,
    kind: InfoKind,
    data: Option<InfoData>,
) -> Result<Result<(), Error>, Error> {
    let mut message = LinkMessage::default();
    let mut info = vec![LinkInfo::Kind(kind)];
    info.extend(data.map(LinkInfo::Data));
    message.attributes = vec![LinkAttribute::IfName("probe".into()), LinkAttribute::LinkInfo(info)];
    let message = RouteNetlinkMessage::NewLink(message);
    let made = channel.change("make an interface", Mode::Create, message);
    if made.is_ok()
        && let Some(link) = channel.link("probe")?
    {
        channel.delete_link("probe", link.index)?;
    }
    Ok(made)
}

fn probe_virtual_addresses() -> Result<(), CommitError> {
    const TABLE: &str = "skep-probe";
    let mut nft = NftChannel::open_of(Family::Inet).map_err(CommitError::Refused)?;
    let mut batch = Batch::of(Family::Inet);
    batch.add_table(TABLE);
    let output = Hook { kind: "nat", number: 3, priority: -100, drops_by_default: false };
    batch.add_chain(TABLE, "output", Some(&output));
    batch.add_rule(TABLE, "output", &[expression::reject_as_unreachable()], "");
    nft.commit(&batch, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_on_which_the_mesh_works_lacks_nothing() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run as root");
            println!("skipped: making network namespaces needs root");
            return;
        }
        let probed = std::thread::spawn(probe).join().unwrap();
        assert_eq!(probed.unwrap(), Probed::default());
    }
}
