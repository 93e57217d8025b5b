//! What a machine must have before a daemon starts: found by trying, and named when missing.

use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use skep_common::object::{IngressBalancer, IngressDescription};
use skep_worker::net::Probed;

use super::options::BalancerChoice;

/// What is missing.
#[derive(Debug, Default)]
pub(super) struct Missing {
    fatal: Vec<String>,
    warnings: Vec<String>,
    no_balancer: Option<String>,
}

impl Missing {
    /// One sentence with everything without which no container runs.
    pub(super) fn fatal(&self) -> Option<String> {
        if self.fatal.is_empty() { None } else { Some(self.fatal.join("; ")) }
    }

    /// How this node serves published ports, as its operator wants it and its kernel allows.
    pub(super) fn ingress(&self, choice: BalancerChoice) -> IngressDescription {
        let reason = match choice {
            BalancerChoice::Auto => self.no_balancer.clone(),
            BalancerChoice::UserSpace => {
                Some("the setting ingress_balancer of its daemon says so".to_owned())
            }
        };
        let in_user_space =
            |reason| IngressDescription { balancer: IngressBalancer::UserSpace, reason };
        reason.map(in_user_space).unwrap_or_default()
    }

    /// What is missing and not fatal, each with what it disables.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// Namespaces of containers, each with the kernel option that has it.
const NAMESPACES: [(&str, &str); 6] = [
    ("mnt", "namespaces"),
    ("uts", "CONFIG_UTS_NS"),
    ("ipc", "CONFIG_IPC_NS"),
    ("pid", "CONFIG_PID_NS"),
    ("net", "CONFIG_NET_NS"),
    ("user", "CONFIG_USER_NS"),
];

/// Looks at this machine.
pub(super) fn check() -> Missing {
    let mut missing = Missing::default();
    if !nix::unistd::geteuid().is_root() {
        missing
            .fatal
            .push("skep daemon must run as root: it makes namespaces and mounts (use sudo)".into());
        return missing;
    }
    for (namespace, option) in NAMESPACES {
        if !Path::new("/proc/self/ns").join(namespace).exists() {
            let what = format!("this kernel has no {namespace} namespaces ({option})");
            if namespace == "user" { missing.warnings.push(what) } else { missing.fatal.push(what) }
        }
    }
    if !has_overlay() {
        missing.fatal.push(
            "this kernel has no overlay file system (CONFIG_OVERLAY_FS; try: modprobe overlay)"
                .into(),
        );
    }
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
        && !Path::new("/sys/fs/cgroup/memory").exists()
    {
        missing.fatal.push("no cgroup hierarchy is mounted below /sys/fs/cgroup".into());
    }
    if !Path::new("/proc/sys/kernel/seccomp").exists() {
        missing.fatal.push("this kernel cannot filter system calls (CONFIG_SECCOMP_FILTER)".into());
    }
    let Probed { missing: warnings, no_balancer } = check_network();
    missing.warnings.extend(warnings);
    missing.no_balancer = no_balancer;
    missing
}

/// Whether there are overlay file systems.
///
/// A module is listed only once it is loaded, which asking for such a mount has the kernel do. None is made:
/// it has no layers.
fn has_overlay() -> bool {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let kind = Some("overlay");
    filesystems.lines().any(|line| line.ends_with("\toverlay"))
        || mount(kind, "/", kind, MsFlags::MS_SILENT, None::<&str>) != Err(Errno::ENODEV)
}

/// Tries what the routing mesh needs, on a thread that ends with the network namespace it is tried in.
fn check_network() -> Probed {
    let unchecked = |why: String| Probed {
        missing: vec![format!("the routing mesh's needs could not be checked{why}")],
        ..Probed::default()
    };
    match std::thread::spawn(skep_worker::net::probe).join() {
        Ok(Ok(probed)) => probed,
        Ok(Err(error)) => unchecked(format!(": {error}")),
        Err(_) => unchecked(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_balances_in_user_space_where_its_kernel_cannot_or_its_operator_says_so() {
        let without = Missing { no_balancer: Some("no VXLAN".into()), ..Missing::default() };
        let with = Missing::default();
        for (missing, choice, expect) in [
            (&with, BalancerChoice::Auto, ("kernel", "")),
            (&without, BalancerChoice::Auto, ("user-space", "no VXLAN")),
            (
                &with,
                BalancerChoice::UserSpace,
                ("user-space", "the setting ingress_balancer of its daemon says so"),
            ),
        ] {
            let ingress = missing.ingress(choice);
            assert_eq!((ingress.balancer.name(), ingress.reason.as_str()), expect);
        }
    }
}
