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
use super::{Error, secure};

/// What is missing, one sentence each; empty on a kernel that has it all.
///
/// Leaves the calling thread in an empty network namespace: call it on a thread that ends with it.
pub fn probe() -> Result<Vec<String>, Error> {
    let entered = unshare(CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from);
    entered.map_err(|source| Error::kernel("make a network namespace", source))?;
    let mut channel = RouteChannel::open()?;
    let mut missing = Vec::new();
    let kinds = [
        (InfoKind::Bridge, "bridges (CONFIG_BRIDGE; try: modprobe bridge)", None),
        (InfoKind::Veth, "virtual Ethernet pairs (CONFIG_VETH; try: modprobe veth)", None),
        (
            InfoKind::Vxlan,
            "VXLAN tunnels (CONFIG_VXLAN; try: modprobe vxlan)",
            Some(InfoData::Vxlan(vec![InfoVxlan::Id(1)])),
        ),
    ];
    for (kind, what, data) in kinds {
        let mut message = LinkMessage::default();
        let mut info = vec![LinkInfo::Kind(kind)];
        info.extend(data.map(LinkInfo::Data));
        message.attributes =
            vec![LinkAttribute::IfName("probe".into()), LinkAttribute::LinkInfo(info)];
        let made = channel.change(
            "make an interface",
            Mode::Create,
            RouteNetlinkMessage::NewLink(message),
        );
        match made {
            Ok(()) => {
                if let Some(link) = channel.link("probe")? {
                    channel.delete_link("probe", link.index)?;
                }
            }
            Err(error) => missing
                .push(format!("this kernel has no {what}, which the routing mesh needs: {error}")),
        }
    }
    if let Err(error) = probe_nftables() {
        missing.push(format!(
            "this kernel has no nftables with NAT (CONFIG_NF_TABLES, CONFIG_NFT_NAT, CONFIG_NFT_NUMGEN; try: modprobe nf_tables), which the routing mesh needs: {error}"
        ));
    }
    if let Err(error) = probe_virtual_addresses() {
        missing.push(format!(
            "this kernel has no nftables with NAT for IPv4 and IPv6 together (CONFIG_NF_TABLES_INET), which overlay networks need: {error}"
        ));
    }
    if let Err(error) = Conntrack::open().and_then(|mut table| table.list()) {
        missing.push(format!(
            "this kernel shows no connections (CONFIG_NF_CT_NETLINK; try: modprobe nf_conntrack_netlink), which overlay networks need: {error}"
        ));
    }
    missing.extend(secure::implementation().err());
    Ok(missing)
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

fn probe_nftables() -> Result<(), CommitError> {
    const TABLE: &str = "skep-probe";
    let mut nft = NftChannel::open().map_err(CommitError::Refused)?;
    let mut batch = Batch::new();
    batch.add_table(TABLE);
    let source = Hook { kind: "nat", number: 4, priority: 100, drops_by_default: false };
    batch.add_chain(TABLE, "source", Some(&source));
    batch.add_rule(TABLE, "source", &[expression::masquerade()], "");
    let separate = Hook { kind: "filter", number: 0, priority: -300, drops_by_default: false };
    batch.add_chain(TABLE, "separate", Some(&separate));
    batch.add_rule(TABLE, "separate", &expression::set_zone(1), "");
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
        assert_eq!(probed.unwrap(), Vec::<String>::new());
    }
}
