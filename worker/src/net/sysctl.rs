//! Kernel settings of the calling thread's network namespace, through `/proc/sys/net`.
//!
//! The only host-wide settings that skep changes are `ip_forward` and, where the host has IPv6, its
//! `forwarding`; all others are per device and touch only devices of our own, but for what keeps the
//! host's routes of IPv6 as they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Error;

/// Lets the host forward packets. It is left on at teardown: others may have come to rely on it.
pub fn ensure_forwarding() -> Result<(), Error> {
    ensure("ipv4/ip_forward".to_owned(), "1")
}

/// Whether the kernel has settings of IPv6, be it on or off.
pub fn has_ipv6_settings() -> bool {
    Path::new("/proc/sys/net/ipv6/conf/all").exists()
}

/// Whether the host takes part in IPv6.
pub fn host_has_ipv6() -> bool {
    let path = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
    fs::read_to_string(path).is_ok_and(|text| text.trim() == "0")
}

/// Lets the host forward packets of IPv6, and keeps its routes: a host that forwards takes no more
/// routes from routers' announcements, and loses those that it took, on interfaces that are not told
/// to listen to them all the same.
pub fn ensure_ipv6_forwarding() -> Result<(), Error> {
    const IF_NOT_FORWARDING: &str = "1";
    const ALWAYS: &str = "2";
    let conf = PathBuf::from("/proc/sys/net/ipv6/conf");
    let read = |name: &str| fs::read_to_string(conf.join(name)).unwrap_or_default();
    if read("all/forwarding").trim() == "1" {
        return Ok(());
    }
    let devices = fs::read_dir(&conf).map_err(|e| Error::file("list", &conf, e))?;
    let names = devices.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    for device in names.filter(|name| !["all", "default", "lo"].contains(&name.as_str())) {
        let listens = read(&format!("{device}/accept_ra")).trim() == IF_NOT_FORWARDING;
        if listens && read(&format!("{device}/forwarding")).trim() == "0" {
            match ensure(format!("ipv6/conf/{device}/accept_ra"), ALWAYS) {
                Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                result => result?, // A device may go at any time.
            }
        }
    }
    ensure("ipv6/conf/all/forwarding".to_owned(), "1")
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

/// Has a device of our own take part in IPv6 by hand and at once: nobody else has its addresses. While
/// the kernel asks whether somebody has that of the link, it asks for no neighbour of what it forwards.
pub fn ensure_ipv6_at_once(device: &str) -> Result<(), Error> {
    let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{device}/accept_dad"));
    let asks = fs::read_to_string(&path).map_err(|e| Error::file("read", &path, e))?;
    if asks.trim() != "0" {
        ensure_no_ipv6(device)?; // It may be asking already.
        ensure(format!("ipv6/conf/{device}/accept_dad"), "0")?;
    }
    ensure_ipv6_by_hand(device, true)
}

fn ensure(name: String, value: &str) -> Result<(), Error> {
    let path = PathBuf::from("/proc/sys/net").join(name);
    let present = fs::read_to_string(&path).map_err(|e| Error::file("read", &path, e))?;
    if present.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(|e| Error::file("write", &path, e))
}
