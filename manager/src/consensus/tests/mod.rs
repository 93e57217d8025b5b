//! Tests of whole managers: real disks, a network in memory.
//!
//! Nothing sleeps as a barrier: a test waits for what it needs, with one generous limit.

mod anew;
mod durability;
mod harness;
mod members;
mod proposals;
