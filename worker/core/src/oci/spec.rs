//! The builder itself.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxCpu, LinuxDeviceCgroup, LinuxDeviceType,
    LinuxMemory, LinuxNamespace, LinuxNamespaceType, LinuxPids, LinuxResources, PosixRlimit,
    PosixRlimitBuilder, PosixRlimitType, Process, Root, Spec, User,
};

use super::capabilities::{self, Set};
use super::input::{CgroupLayout, ContainerInput, HostFacts, Limits, SpecInput, Ulimit};
use super::mounts::{self, MASKED_PATHS, READONLY_PATHS};
use super::user::ResolvedUser;
use super::{Error, process, seccomp};

/// Version of the OCI runtime specification that is written.
const OCI_VERSION: &str = "1.0.2";

/// Length of a scheduling period. Docker's default, in microseconds.
const CPU_PERIOD_MICROS: u64 = 100_000;

/// File mode mask that processes start with.
const UMASK: u32 = 0o022;

/// Parameters that let an unprivileged process use low ports and ping, in its own namespace.
/// Source: moby `daemon/oci_linux.go`, `WithSysctls`.
const DEFAULT_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// Character devices of Docker's default rules: zero, null, urandom, random, tty, console.
const DEFAULT_DEVICES: [(i64, i64); 6] = [(1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1)];

/// Builds the specification of a container.
///
/// Equal inputs give equal specifications; an input that no specification can be made of gives
/// the first reason.
pub fn build(input: &SpecInput, user: &ResolvedUser, host: &HostFacts) -> Result<Spec, Error> {
    let container = &input.container;
    let capabilities = capabilities::tweak(
        &container.capability_add,
        &container.capability_drop,
        host.last_capability,
    )?;
    let hostname = process::hostname(&input.id, container);

    let mut root = Root::default();
    root.set_path(input.root.clone()).set_readonly(Some(container.read_only));

    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_hostname(Some(hostname.clone()))
        .set_mounts(Some(mounts::all(input, &host.cgroup)))
        .set_process(Some(build_process(input, user, &capabilities, &hostname)?))
        .set_linux(Some(build_linux(input, &capabilities, host)?))
        .set_annotations(Some(container.labels.clone().into_iter().collect()));
    Ok(spec)
}

/// The directory that the process starts in.
pub fn working_directory(input: &SpecInput) -> Result<PathBuf, Error> {
    let of_image = Some(&input.image.working_dir).filter(|dir| !dir.is_empty());
    let dir = input.container.dir.as_ref().or(of_image).map_or("/", String::as_str);
    if !dir.starts_with('/') {
        return Err(Error::RelativeWorkingDirectory(dir.to_owned()));
    }
    if dir.contains('\0') {
        return Err(Error::NulByte("the working directory"));
    }
    Ok(PathBuf::from(dir))
}

/// Who to run as, before it is resolved.
pub fn user_text(input: &SpecInput) -> &str {
    input.container.user.as_deref().unwrap_or(&input.image.user)
}

fn build_process(
    input: &SpecInput,
    user: &ResolvedUser,
    capabilities: &Set,
    hostname: &str,
) -> Result<Process, Error> {
    let container = &input.container;
    let mut identity = User::default();
    identity
        .set_uid(user.uid)
        .set_gid(user.gid)
        .set_umask(Some(UMASK))
        .set_additional_gids(Some(user.groups.clone()));

    let mut process = Process::default();
    process
        .set_terminal(Some(container.tty))
        .set_user(identity)
        .set_args(Some(process::arguments(&input.image, container)?))
        .set_env(Some(process::environment(&input.image, container, hostname, &user.home)?))
        .set_cwd(working_directory(input)?)
        // "Some(false)" would make the runtime load the seccomp filter without the right to.
        .set_no_new_privileges(container.no_new_privileges.then_some(true))
        .set_capabilities(Some(capability_sets(capabilities)))
        .set_rlimits(rlimits(&container.ulimits)?)
        .set_oom_score_adj(Some(oom_score_adj(container)?));
    Ok(process)
}

fn oom_score_adj(container: &ContainerInput) -> Result<i32, Error> {
    let value = container.oom_score_adj.unwrap_or(0);
    match i32::try_from(value) {
        Ok(value) if (-1000..=1000).contains(&value) => Ok(value),
        _ => Err(Error::OomScoreAdj(value)),
    }
}

/// The same set thrice; nothing is inheritable or ambient, as in Docker since CVE-2022-24769.
fn capability_sets(set: &Set) -> LinuxCapabilities {
    let known = |number: &u8| {
        let name = capabilities::ALL[usize::from(*number)].trim_start_matches("CAP_");
        Capability::from_str(name).expect("both lists are the kernel's, as a test checks")
    };
    let all: HashSet<Capability> = set.iter().map(known).collect();
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(all.clone()))
        .set_effective(Some(all.clone()))
        .set_permitted(Some(all))
        .set_inheritable(None)
        .set_ambient(None);
    sets
}

fn rlimits(ulimits: &[Ulimit]) -> Result<Option<Vec<PosixRlimit>>, Error> {
    let limit = |ulimit: &Ulimit| {
        let invalid = || Error::InvalidUlimit {
            name: ulimit.name.clone(),
            soft: ulimit.soft,
            hard: ulimit.hard,
        };
        let value = |number: i64| match number {
            -1 => Ok(u64::MAX),
            number => u64::try_from(number).map_err(|_| invalid()),
        };
        let (soft, hard) = (value(ulimit.soft)?, value(ulimit.hard)?);
        if hard < soft {
            return Err(invalid());
        }
        let limit = PosixRlimitBuilder::default().typ(rlimit_kind(&ulimit.name)?);
        Ok(limit.soft(soft).hard(hard).build().expect("every field is given"))
    };
    let limits: Vec<PosixRlimit> = ulimits.iter().map(limit).collect::<Result<_, Error>>()?;
    Ok(Some(limits).filter(|limits| !limits.is_empty()))
}

fn rlimit_kind(name: &str) -> Result<PosixRlimitType, Error> {
    Ok(match name {
        "core" => PosixRlimitType::RlimitCore,
        "cpu" => PosixRlimitType::RlimitCpu,
        "data" => PosixRlimitType::RlimitData,
        "fsize" => PosixRlimitType::RlimitFsize,
        "locks" => PosixRlimitType::RlimitLocks,
        "memlock" => PosixRlimitType::RlimitMemlock,
        "msgqueue" => PosixRlimitType::RlimitMsgqueue,
        "nice" => PosixRlimitType::RlimitNice,
        "nofile" => PosixRlimitType::RlimitNofile,
        "nproc" => PosixRlimitType::RlimitNproc,
        "rss" => PosixRlimitType::RlimitRss,
        "rtprio" => PosixRlimitType::RlimitRtprio,
        "rttime" => PosixRlimitType::RlimitRttime,
        "sigpending" => PosixRlimitType::RlimitSigpending,
        "stack" => PosixRlimitType::RlimitStack,
        "as" => PosixRlimitType::RlimitAs,
        _ => return Err(Error::UnknownUlimit(name.to_owned())),
    })
}

fn build_linux(input: &SpecInput, capabilities: &Set, host: &HostFacts) -> Result<Linux, Error> {
    let mut kinds = vec![
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
    ];
    if !input.container.host_network {
        kinds.insert(1, LinuxNamespaceType::Network);
    }
    let mut readonly: Vec<String> = READONLY_PATHS.map(String::from).to_vec();
    match host.cgroup {
        // As in Docker, a cgroup namespace comes with v2 only.
        CgroupLayout::V2 => kinds.push(LinuxNamespaceType::Cgroup),
        CgroupLayout::V1(_) => readonly.push(mounts::CGROUP_ROOT.to_owned()),
    }
    let namespaces = kinds.into_iter().map(|kind| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind);
        namespace
    });
    let mut masked: Vec<String> = MASKED_PATHS.map(String::from).to_vec();
    masked.extend(host.masked_paths.iter().cloned());

    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(PathBuf::from(input.cgroup_path())))
        .set_namespaces(Some(namespaces.collect()))
        .set_masked_paths(Some(masked))
        .set_readonly_paths(Some(readonly))
        .set_sysctl(Some(sysctls(&input.container)?))
        .set_resources(Some(resources(&input.container.limits, host)))
        .set_seccomp(Some(seccomp::default_profile(host.arch, capabilities)));
    Ok(linux)
}

/// Parameters of the container's namespaces; those of networks are the host's where it has none of its own.
fn sysctls(container: &ContainerInput) -> Result<HashMap<String, String>, Error> {
    let asked = container.sysctls.clone();
    if !container.host_network {
        let default = DEFAULT_SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned()));
        return Ok(default.into_iter().chain(asked).collect());
    }
    let is_of_network = |name: &&String| name.starts_with("net.") || name.starts_with("net/");
    match asked.keys().find(is_of_network) {
        Some(name) => Err(Error::SysctlOfHost(name.clone())),
        None => Ok(asked.into_iter().collect()),
    }
}

fn resources(limits: &Limits, host: &HostFacts) -> LinuxResources {
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(device_rules()));
    if let Some(nano_cpus) = Some(limits.nano_cpus).filter(|nanos| *nanos > 0) {
        let quota = i128::from(nano_cpus) * i128::from(CPU_PERIOD_MICROS) / 1_000_000_000;
        let mut cpu = LinuxCpu::default();
        // The kernel refuses quotas below a millisecond.
        cpu.set_period(Some(CPU_PERIOD_MICROS))
            .set_quota(Some(i64::try_from(quota).unwrap_or(i64::MAX).max(1000)));
        resources.set_cpu(Some(cpu));
    }
    if let Some(bytes) = Some(limits.memory_bytes).filter(|bytes| *bytes > 0) {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(bytes));
        if host.has_swap_limit {
            // Memory and swap together; Docker's default is as much swap as memory.
            memory.set_swap(Some(bytes.saturating_mul(2)));
        }
        resources.set_memory(Some(memory));
    }
    if limits.pids > 0 {
        let mut pids = LinuxPids::default();
        pids.set_limit(limits.pids);
        resources.set_pids(Some(pids));
    }
    resources
}

/// All devices are denied but the harmless ones; the runtime adds what every container gets.
fn device_rules() -> Vec<LinuxDeviceCgroup> {
    let rule = |is_allowed: bool, kind, number: Option<(i64, i64)>| {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(is_allowed)
            .set_typ(Some(kind))
            .set_major(number.map(|(major, _)| major))
            .set_minor(number.map(|(_, minor)| minor))
            .set_access(Some("rwm".to_owned()));
        rule
    };
    let mut rules = vec![rule(false, LinuxDeviceType::A, None)];
    rules.extend(DEFAULT_DEVICES.map(|number| rule(true, LinuxDeviceType::C, Some(number))));
    rules.push(rule(false, LinuxDeviceType::C, Some((10, 229))));
    rules
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
