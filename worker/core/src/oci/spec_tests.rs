//! Golden specifications; `UPDATE_GOLDEN=1` rewrites them.

use std::path::Path;

use serde_json::Value;

use super::*;
use crate::oci::input::{Arch, Controller, GeneratedFiles, ImageConfig, MountInput};

fn host_v1() -> HostFacts {
    let controller = |name: &str| Controller {
        names: name.split(',').map(String::from).collect(),
        mount_point: Path::new("/sys/fs/cgroup").join(name),
    };
    HostFacts {
        arch: Arch::X86_64,
        cgroup: CgroupLayout::V1(
            ["cpu,cpuacct", "memory", "devices", "name=systemd"].map(controller).to_vec(),
        ),
        has_swap_limit: true,
        last_capability: 40,
        masked_paths: vec!["/sys/devices/system/cpu/cpu0/thermal_throttle".into()],
    }
}

fn host_v2() -> HostFacts {
    HostFacts {
        arch: Arch::Aarch64,
        cgroup: CgroupLayout::V2,
        has_swap_limit: false,
        masked_paths: Vec::new(),
        ..host_v1()
    }
}

fn input(container: ContainerInput) -> SpecInput {
    SpecInput {
        id: "0123456789abcdefghijklmno".into(),
        root: "/run/skep/containers/c/rootfs".into(),
        cgroup_parent: "/skep/node".into(),
        image: ImageConfig {
            entrypoint: Some(vec!["/entry".into()]),
            cmd: Some(vec!["serve".into()]),
            env: Some(vec!["PATH=/bin".into(), "A=1".into()]),
            ..ImageConfig::default()
        },
        container,
        files: GeneratedFiles {
            hosts: "/data/hosts".into(),
            hostname: "/data/hostname".into(),
            resolv_conf: "/data/resolv.conf".into(),
        },
    }
}

fn root() -> ResolvedUser {
    ResolvedUser { uid: 0, gid: 0, groups: vec![0], home: "/root".into() }
}

fn full() -> ContainerInput {
    ContainerInput {
        args: vec!["once".into()],
        env: vec!["A=2".into(), "B=3".into()],
        dir: Some("/srv".into()),
        hostname: Some("web-1".into()),
        tty: true,
        read_only: true,
        capability_add: vec!["NET_ADMIN".into(), "SYS_TIME".into()],
        capability_drop: vec!["MKNOD".into()],
        sysctls: [("net.core.somaxconn".to_owned(), "1024".to_owned())].into(),
        ulimits: vec![
            Ulimit { name: "nofile".into(), soft: 1024, hard: 4096 },
            Ulimit { name: "core".into(), soft: 0, hard: -1 },
        ],
        oom_score_adj: Some(-500),
        no_new_privileges: true,
        shm_bytes: Some(1 << 20),
        mounts: vec![MountInput {
            target: "/data".into(),
            kind: "bind".into(),
            source: "/var/lib/skep/volumes/v".into(),
            options: vec!["rbind".into(), "rprivate".into(), "rw".into()],
        }],
        limits: Limits { nano_cpus: 1_500_000_000, memory_bytes: 64 << 20, pids: 100 },
        labels: [("com.example".to_owned(), "x".to_owned())].into(),
        ..ContainerInput::default()
    }
}

/// Sets have no order in the specification's types: sorts object keys and lists of capabilities.
fn sorted(value: Value, name: &str) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            let entries = entries.into_iter().map(|(key, value)| {
                let value = sorted(value, &key);
                (key, value)
            });
            Value::Object(entries.collect())
        }
        Value::Array(mut items) if ["bounding", "effective", "permitted"].contains(&name) => {
            items.sort_by_key(ToString::to_string);
            Value::Array(items)
        }
        Value::Array(items) => {
            Value::Array(items.into_iter().map(|item| sorted(item, name)).collect())
        }
        other => other,
    }
}

#[track_caller]
fn check_golden(name: &str, spec: &Spec) {
    let value = sorted(serde_json::to_value(spec).unwrap(), "");
    let got = format!("{}\n", serde_json::to_string_pretty(&value).unwrap());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/oci/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &got).unwrap();
    }
    let expect = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(got == expect, "{name} differs; UPDATE_GOLDEN=1 rewrites it:\n{got}");
}

#[test]
fn a_plain_container_on_cgroup_v1() {
    let spec = build(&input(ContainerInput::default()), &root(), &host_v1()).unwrap();
    check_golden("plain-v1.json", &spec);
}

#[test]
fn a_container_with_every_field_on_cgroup_v2() {
    let user = ResolvedUser { uid: 33, gid: 33, groups: vec![33, 4], home: "/var/www".into() };
    let spec = build(&input(full()), &user, &host_v2()).unwrap();
    check_golden("full-v2.json", &spec);
}

#[test]
fn a_specification_survives_its_file() {
    let spec = build(&input(full()), &root(), &host_v1()).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
}

#[test]
fn false_is_never_written_for_no_new_privileges() {
    let spec = build(&input(ContainerInput::default()), &root(), &host_v1()).unwrap();
    assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), None);
}

#[test]
fn every_cgroup_of_v1_is_mounted_read_only() {
    let spec = build(&input(ContainerInput::default()), &root(), &host_v1()).unwrap();
    let mounts = spec.mounts().as_ref().unwrap();
    let bound: Vec<_> = mounts
        .iter()
        .filter(|mount| mount.destination().parent() == Some(Path::new("/sys/fs/cgroup")))
        .collect();
    assert_eq!(bound.len(), 3, "the named hierarchy is left out");
    for mount in bound {
        assert!(mount.options().as_ref().unwrap().contains(&"ro".to_owned()), "{mount:?}");
    }
}

#[test]
fn what_cannot_be_built_is_refused_by_name() {
    for (container, expect) in [
        (
            ContainerInput { dir: Some("srv".into()), ..ContainerInput::default() },
            Error::RelativeWorkingDirectory("srv".into()),
        ),
        (
            ContainerInput { oom_score_adj: Some(1001), ..ContainerInput::default() },
            Error::OomScoreAdj(1001),
        ),
        (
            ContainerInput {
                ulimits: vec![Ulimit { name: "files".into(), soft: 1, hard: 1 }],
                ..ContainerInput::default()
            },
            Error::UnknownUlimit("files".into()),
        ),
        (
            ContainerInput {
                ulimits: vec![Ulimit { name: "nofile".into(), soft: 2, hard: 1 }],
                ..ContainerInput::default()
            },
            Error::InvalidUlimit { name: "nofile".into(), soft: 2, hard: 1 },
        ),
        (
            ContainerInput { capability_add: vec!["FLY".into()], ..ContainerInput::default() },
            Error::UnknownCapability("FLY".into()),
        ),
        (
            ContainerInput {
                host_network: true,
                sysctls: [("net.ipv4.ip_forward".into(), "1".into())].into(),
                ..ContainerInput::default()
            },
            Error::SysctlOfHost("net.ipv4.ip_forward".into()),
        ),
    ] {
        assert_eq!(build(&input(container), &root(), &host_v1()), Err(expect));
    }
}

#[test]
fn a_container_on_the_hosts_network_has_none_of_its_own_and_leaves_its_parameters_alone() {
    for (host_network, expect) in [(false, true), (true, false)] {
        let sysctls = [("kernel.msgmax".into(), "1".into())].into();
        let container = ContainerInput { host_network, sysctls, ..ContainerInput::default() };
        let spec = build(&input(container), &root(), &host_v1()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let mut namespaces = linux.namespaces().as_ref().unwrap().iter();
        let has_network = namespaces.any(|one| one.typ() == LinuxNamespaceType::Network);
        assert_eq!(has_network, expect);
        let sysctls = linux.sysctl().as_ref().unwrap();
        assert_eq!(sysctls.contains_key("net.ipv4.ping_group_range"), expect);
        assert_eq!(sysctls["kernel.msgmax"], "1");
    }
}

#[test]
fn small_cpu_limits_stay_above_what_the_kernel_refuses() {
    let limits = Limits { nano_cpus: 1_000_000, ..Limits::default() };
    let container = ContainerInput { limits, ..ContainerInput::default() };
    let spec = build(&input(container), &root(), &host_v1()).unwrap();
    let resources = spec.linux().as_ref().unwrap().resources().as_ref().unwrap();
    assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(1000));
}

#[test]
fn every_capability_reaches_the_specification() {
    for (add, drop, expect) in [("ALL", "", 41), ("", "", 14), ("", "ALL", 0)] {
        let words = |text: &str| text.split_whitespace().map(String::from).collect();
        let container = ContainerInput {
            capability_add: words(add),
            capability_drop: words(drop),
            ..ContainerInput::default()
        };
        let spec = build(&input(container), &root(), &host_v1()).unwrap();
        let sets = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
        for set in [sets.bounding(), sets.effective(), sets.permitted()] {
            assert_eq!(set.as_ref().unwrap().len(), expect, "add {add:?} drop {drop:?}");
        }
        assert_eq!((sets.inheritable(), sets.ambient()), (&None, &None));
    }
}
