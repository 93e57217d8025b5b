//! Which capabilities a container has.

use std::collections::BTreeSet;

use super::Error;

/// All capabilities by number.
pub const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a container has when nothing is added or dropped; as a mask 0xa80425fb.
pub const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A set of capabilities by number, hence in a fixed order.
pub type Set = BTreeSet<u8>;

/// The set after additions and drops, limited to what the kernel knows.
///
/// Adding `ALL` gives all but the dropped ones; dropping `ALL` leaves the added ones.
/// Source: moby `daemon/pkg/oci/caps`, `TweakCapabilities`.
pub fn tweak(add: &[String], drop: &[String], last_capability: u8) -> Result<Set, Error> {
    let (add_all, add) = numbers(add)?;
    let (drop_all, drop) = numbers(drop)?;
    let all = || (0..=last_capability).filter(|number| usize::from(*number) < ALL.len());
    let mut set: Set = if add_all {
        all().filter(|number| !drop.contains(number)).collect()
    } else if drop_all {
        add
    } else {
        let default = DEFAULT.iter().filter_map(|name| number(name));
        default.filter(|number| !drop.contains(number)).chain(add).collect()
    };
    set.retain(|number| *number <= last_capability);
    Ok(set)
}

/// Whether `set` holds the capability called `name`.
pub fn has(set: &Set, name: &str) -> bool {
    number(name).is_some_and(|number| set.contains(&number))
}

fn numbers(names: &[String]) -> Result<(bool, Set), Error> {
    let mut is_all = false;
    let mut set = Set::new();
    for name in names {
        let upper = name.trim().to_ascii_uppercase();
        if upper == "ALL" {
            is_all = true;
            continue;
        }
        let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        set.insert(number(&full).ok_or_else(|| Error::UnknownCapability(name.clone()))?);
    }
    Ok((is_all, set))
}

fn number(name: &str) -> Option<u8> {
    (0..).zip(ALL).find(|(_, known)| *known == name).map(|(number, _)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(add: &str, drop: &str, expect: u64) {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let set = tweak(&words(add), &words(drop), 40).unwrap();
        let mask = set.iter().fold(0_u64, |mask, number| mask | 1 << number);
        assert_eq!(mask, expect, "add {add:?} drop {drop:?}: {mask:#x}");
    }

    #[test]
    fn additions_and_drops_work_as_in_docker() {
        check("", "", 0xa804_25fb);
        check("NET_ADMIN", "", 0xa804_35fb);
        check("cap_net_admin", "CAP_MKNOD", 0xa004_35fb);
        check("", "ALL", 0);
        check("NET_BIND_SERVICE", "ALL", 0x400);
        check("ALL", "", 0x1ff_ffff_ffff);
        check("ALL", "SYS_ADMIN", 0x1ff_ffdf_ffff);
    }

    #[test]
    fn an_older_kernel_limits_the_set() {
        assert_eq!(tweak(&["ALL".into()], &[], 37).unwrap().last(), Some(&37));
        assert!(tweak(&["BPF".into()], &[], 37).unwrap().iter().all(|number| *number <= 37));
    }

    #[test]
    fn an_unknown_name_is_named() {
        let error = tweak(&["FLY".into()], &[], 40).unwrap_err();
        assert_eq!(error, Error::UnknownCapability("FLY".into()));
    }
}
