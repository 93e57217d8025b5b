//! What this host offers to containers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use skep_worker_core::oci::{Arch, CgroupLayout, Controller, HostFacts};

/// Where cgroups are mounted, by convention and by libcontainer.
pub(super) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Reads what the specification's builder must know of the host.
pub fn facts() -> io::Result<HostFacts> {
    let cgroup = cgroup_layout(&fs::read_to_string("/proc/self/mountinfo")?);
    let last_capability = fs::read_to_string("/proc/sys/kernel/cap_last_cap")?;
    Ok(HostFacts {
        arch: Arch::NATIVE,
        has_swap_limit: has_swap_limit(&cgroup),
        cgroup,
        last_capability: last_capability.trim().parse().map_err(io::Error::other)?,
        masked_paths: thermal_paths(),
    })
}

/// The layout by the text of a mountinfo file, proc_pid_mountinfo(5).
pub fn cgroup_layout(mountinfo: &str) -> CgroupLayout {
    let mut controllers = Vec::new();
    for line in mountinfo.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else { continue };
        let Some(mount_point) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut fields = file_system.split(' ');
        match fields.next() {
            Some("cgroup2") if mount_point == Path::new(CGROUP_ROOT) => return CgroupLayout::V2,
            Some("cgroup") => {
                // The super block's options name the controllers: `rw,cpu,cpuacct`.
                let options = fields.nth(1).unwrap_or("");
                let names = options.split(',').filter(|name| !matches!(*name, "rw" | "ro"));
                let names = names.map(String::from).collect();
                controllers.push(Controller { names, mount_point });
            }
            _ => {}
        }
    }
    CgroupLayout::V1(controllers)
}

fn has_swap_limit(layout: &CgroupLayout) -> bool {
    match layout {
        CgroupLayout::V1(controllers) => controllers
            .iter()
            .filter(|controller| controller.names.iter().any(|name| name == "memory"))
            .any(|controller| controller.mount_point.join("memory.memsw.limit_in_bytes").exists()),
        // The root has no limits; any cgroup below it shows what the kernel can do.
        CgroupLayout::V2 => fs::read_dir(CGROUP_ROOT).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.path().join("memory.swap.max").exists())
        }),
    }
}

/// Per-processor counters that containers must not see (GHSA-6fw5-f8r9-fgfm).
fn thermal_paths() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path().join("thermal_throttle"));
    let mut paths: Vec<String> = paths
        .filter(|path| path.is_dir())
        .filter_map(|path| path.to_str().map(String::from))
        .collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_told_apart() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(cgroup_layout(v2), CgroupLayout::V2);

        let hybrid = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let controller = |names: &[&str], mount_point: &str| Controller {
            names: names.iter().map(ToString::to_string).collect(),
            mount_point: mount_point.into(),
        };
        let expect = CgroupLayout::V1(vec![
            controller(&["cpu", "cpuacct"], "/sys/fs/cgroup/cpu,cpuacct"),
            controller(&["name=systemd"], "/sys/fs/cgroup/systemd"),
        ]);
        assert_eq!(cgroup_layout(hybrid), expect);
    }
}
