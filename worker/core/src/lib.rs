//! Every decision of a node, without I/O, clocks or tokio.
//!
//! # Reading order
//!
//! [`mesh`] (which kernel objects make every published port answer here, and how to get from one set of
//! them to the next), [`accounting`] (what was counted of its connections), [`network`] (the same for overlay networks), [`dns`] (what names mean in a
//! container), [`image`] (names, digests and documents of images), [`oci`] (the runtime specification of
//! a container, with Docker's defaults), [`health`] (what the results of health checks mean), [`attempts`]
//! (what follows the end of a container while no manager leads). They do not
//! depend on each other, but that [`network`] has Ethernet addresses from [`mesh`], and [`dns`] reads the
//! tables of [`network`].
//!
//! # Invariants
//!
//! - Equal inputs give equal outputs, byte for byte: order never comes from hashing.
//! - Nothing here touches the machine: `skep_worker` has the shell file of the same noun.

pub mod mesh;

pub mod accounting;

pub mod network;

pub mod dns;

pub mod image;
pub mod oci;

pub mod health;

pub mod attempts;
