//! Overlay networks as data: what the kernel of one node must hold so that tasks of a network reach each
//! other and the addresses of services, wherever they are.

mod table;

pub use table::{EndpointEntry, NetworkTable, NetworkTables, ServiceEntry};
