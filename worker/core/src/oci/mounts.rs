//! The mounts that every container has.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

use super::input::{CgroupLayout, GeneratedFiles, SpecInput};

/// Size of /dev/shm where nothing else is asked; Docker's default.
pub const SHM_BYTES: u64 = 64 * 1024 * 1024;

/// Paths that are hidden from containers. Source: moby `daemon/pkg/oci/defaults.go`.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths that containers may read only. Same source.
pub const READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Controllers that the runtime makes a container's cgroup in; others are not shown to it.
const SHOWN_CONTROLLERS: [&str; 12] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "hugetlb",
    "memory",
    "pids",
    "perf_event",
    "blkio",
    "net_prio",
    "net_cls",
    "freezer",
];

/// Where cgroups are mounted in a container.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// All mounts of a container, in the order they are made.
pub fn all(input: &SpecInput, cgroup: &CgroupLayout) -> Vec<Mount> {
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ];
    mounts.extend(cgroup_mounts(cgroup, &input.cgroup_path()));
    mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]));
    let size = format!("size={}", input.container.shm_bytes.unwrap_or(SHM_BYTES));
    mounts.push(mount(
        "/dev/shm",
        "tmpfs",
        "shm",
        &["nosuid", "noexec", "nodev", "mode=1777", &size],
    ));
    mounts.extend(files(&input.files, input.container.read_only));
    mounts.extend(input.container.mounts.iter().map(|extra| {
        let options: Vec<&str> = extra.options.iter().map(String::as_str).collect();
        mount(&extra.target, &extra.kind, &extra.source, &options)
    }));
    mounts
}

/// Read-only cgroups. On v1 each hierarchy is bound by itself: the runtime's own `cgroup` mount
/// would leave them writable, and root in the container could lift its limits.
fn cgroup_mounts(layout: &CgroupLayout, cgroup_path: &str) -> Vec<Mount> {
    let flags = ["nosuid", "noexec", "nodev"];
    let controllers = match layout {
        CgroupLayout::V2 => {
            return vec![mount(
                CGROUP_ROOT,
                "cgroup",
                "cgroup",
                &["ro", "nosuid", "noexec", "nodev"],
            )];
        }
        CgroupLayout::V1(controllers) => controllers,
    };
    let mut mounts =
        vec![mount(CGROUP_ROOT, "tmpfs", "tmpfs", &[flags.as_slice(), &["mode=755"]].concat())];
    for controller in controllers {
        let is_shown =
            controller.names.iter().any(|name| SHOWN_CONTROLLERS.contains(&name.as_str()));
        let Some(name) = controller.mount_point.file_name().filter(|_| is_shown) else { continue };
        let source = controller.mount_point.join(cgroup_path.trim_start_matches('/'));
        let options = [&["bind", "ro"], flags.as_slice()].concat();
        mounts.push(mount(&Path::new(CGROUP_ROOT).join(name), "bind", &source, &options));
    }
    mounts
}

/// The files of /etc. Docker makes them read-only with the root file system.
fn files(files: &GeneratedFiles, is_read_only: bool) -> [Mount; 3] {
    let mode = if is_read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", mode];
    [
        mount("/etc/resolv.conf", "bind", &files.resolv_conf, &options),
        mount("/etc/hostname", "bind", &files.hostname, &options),
        mount("/etc/hosts", "bind", &files.hosts, &options),
    ]
}

fn mount<P, S>(target: &P, kind: &str, source: &S, options: &[&str]) -> Mount
where
    P: AsRef<Path> + ?Sized,
    S: AsRef<Path> + ?Sized,
{
    let mut mount = Mount::default();
    mount
        .set_destination(target.as_ref().to_path_buf())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(PathBuf::from(source.as_ref())))
        .set_options(Some(options.iter().map(ToString::to_string).collect()));
    mount
}
