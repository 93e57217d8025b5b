//! Kernel settings of the calling thread's network namespace, through `/proc/sys/net`.
//!
//! The only host-wide setting that skep changes is `ip_forward`; all others are per device and
//! touch only devices of our own.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::Error;

/// Lets the host forward packets. It is left on at teardown: others may have come to rely on it.
pub fn ensure_forwarding() -> Result<(), Error> {
    ensure("ipv4/ip_forward".to_owned(), "1")
}

/// Makes the reverse-path check of one of our own devices loose: packets of outside clients come
/// in through the tunnel, while the route to these clients leads elsewhere.
pub fn ensure_loose_reverse_path(device: &str) -> Result<(), Error> {
    ensure(format!("ipv4/conf/{device}/rp_filter"), "2")
}

/// Keeps IPv6 off one of our own devices, which carry IPv4 only; fine where there is no IPv6.
pub fn ensure_no_ipv6(device: &str) -> Result<(), Error> {
    match ensure(format!("ipv6/conf/{device}/disable_ipv6"), "1") {
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Keeps IPv6 off all devices that are made in this namespace from now on, and addresses of their own
/// off those that get it; fine where there is no IPv6.
pub fn ensure_no_ipv6_by_default() -> Result<(), Error> {
    const NONE: &str = "1";
    ensure_no_ipv6("default")?;
    match ensure("ipv6/conf/default/addr_gen_mode".to_owned(), NONE) {
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Lets one of our own devices know of neighbours with IPv6.
pub fn ensure_ipv6(device: &str) -> Result<(), Error> {
    ensure(format!("ipv6/conf/{device}/disable_ipv6"), "0")
}

/// Has a device of a container take part in IPv6 or not, and never by what routers announce: its
/// neighbours are containers.
pub fn ensure_ipv6_by_hand(device: &str, has_ipv6: bool) -> Result<(), Error> {
    if !has_ipv6 {
        return ensure_no_ipv6(device);
    }
    ensure(format!("ipv6/conf/{device}/accept_ra"), "0")?;
    ensure_ipv6(device)
}

fn ensure(name: String, value: &str) -> Result<(), Error> {
    let path = PathBuf::from("/proc/sys/net").join(name);
    let present = fs::read_to_string(&path).map_err(|e| Error::file("read", &path, e))?;
    if present.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(|e| Error::file("write", &path, e))
}
