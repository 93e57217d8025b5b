//! See ARCHITECTURE.md.
pub mod image;

pub mod mesh;
pub mod oci;
pub mod health;
