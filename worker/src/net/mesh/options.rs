//! What the routing mesh of one node is set up with.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::Ipv4Net;
use skep_worker_core::mesh::{MeshTable, Slices};

use crate::net::Error;

/// The name of the ingress bridge, whose ports are the uplinks of tasks.
pub(super) const BRIDGE: &str = "skep-ing";

/// The name of the VXLAN device between the nodes.
pub(in crate::net) const TUNNEL: &str = "skep-vx";

/// The nftables table that holds all rules of the mesh.
pub(super) const TABLE: &str = "skep-mesh";

/// What VXLAN adds to a packet: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348, section 5).
pub(in crate::net) const VXLAN_OVERHEAD: u32 = 50;

/// A field of 12 bits in packet and connection marks, which holds the number of a peer.
///
/// Other programs use marks too; all other bits are left as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MarkField {
    shift: u32,
}

impl MarkField {
    /// The field that starts at bit `shift`; the lowest bits are the default.
    pub fn at(shift: u32) -> Result<Self, Error> {
        if shift > 20 {
            return Err(Error::MarkField { shift });
        }
        Ok(Self { shift })
    }

    /// The bits of the field.
    pub fn mask(self) -> u32 {
        0xfff << self.shift
    }

    /// The mark that stands for node `number`.
    pub fn mark(self, number: u16) -> u32 {
        u32::from(number) << self.shift & self.mask()
    }

    /// The node that `mark` stands for, where it is a mark of this field and nothing else.
    pub(super) fn number(self, mark: u32) -> Option<u16> {
        let is_ours = mark & !self.mask() == 0;
        u16::try_from(mark >> self.shift).ok().filter(|_| is_ours)
    }
}

/// What the routing mesh of one node is set up with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The address that other nodes reach this one at.
    pub underlay: Ipv4Addr,
    /// The interface that has it; its MTU decides that of everything of ours.
    pub interface: String,
    /// The daemon's run directory: holds the lock against a second daemon.
    pub run_dir: PathBuf,
    /// The number of this node.
    pub self_number: u16,
    /// The pool that node slices are cut from.
    pub pool: Ipv4Net,
    /// The prefix length of a slice.
    pub slice_prefix: u8,
    /// The part of marks that is ours.
    pub marks: MarkField,
    /// Answers to connections that came through node `n` are routed by table `base + n`. The
    /// default is far from what administrators, VPN programs and the kernel (253 to 255) use.
    pub route_table_base: u32,
    /// Whether published ports answer on the node's IPv6 addresses, too: where
    /// [`host_has_ipv6`](super::host_has_ipv6).
    pub ipv6: bool,
    /// Whether the daemon balances, since the kernel lacks what it takes: then there are neither rules nor a tunnel.
    pub is_in_user_space: bool,
    /// The VXLAN network number.
    pub vni: u32,
    /// The UDP port of the tunnel, which nodes must let in from each other.
    pub vxlan_port: u16,
}

impl Options {
    /// Options with every default.
    pub fn new(
        self_number: u16,
        underlay: Ipv4Addr,
        interface: impl Into<String>,
        run_dir: impl Into<PathBuf>,
    ) -> Self {
        Self {
            underlay,
            interface: interface.into(),
            run_dir: run_dir.into(),
            self_number,
            pool: MeshTable::default_pool(),
            slice_prefix: MeshTable::default_slice_prefix(),
            marks: MarkField::default(),
            route_table_base: 20_000,
            ipv6: false,
            is_in_user_space: false,
            vni: 9001,
            vxlan_port: 4789,
        }
    }

    /// The address arithmetic of the pool, checked against the node's number.
    pub(super) fn slices(&self) -> Result<Slices, Error> {
        let invalid = |source| Error::Options { number: self.self_number, source };
        let slices = Slices::new(self.pool, self.slice_prefix).map_err(invalid)?;
        slices.check_number(self.self_number).map_err(invalid)?;
        Ok(slices)
    }

    /// Refuses a table that is for another node or pool.
    pub(super) fn check_table(&self, table: &MeshTable) -> Result<(), Error> {
        let own = (self.self_number, self.pool, self.slice_prefix);
        let given = (table.self_number, table.pool, table.slice_prefix);
        if own == given {
            return Ok(());
        }
        let text =
            |(number, pool, prefix)| format!("number {number} of {pool} in /{prefix} slices");
        Err(Error::OtherNode { version: table.version, given: text(given), own: text(own) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stay_in_their_field() {
        let field = MarkField::at(8).unwrap();
        assert_eq!(field.mask(), 0x000f_ff00);
        assert_eq!(field.mark(4094), 0x000f_fe00);
        assert_eq!(field.number(0x000f_fe00), Some(4094));
        assert_eq!(field.number(0x000f_fe01), None);
        assert_eq!(MarkField::default().mask(), 0xfff);
        assert_eq!(MarkField::at(20).unwrap().mask(), 0xfff0_0000);
        assert!(MarkField::at(21).is_err());
    }
}
