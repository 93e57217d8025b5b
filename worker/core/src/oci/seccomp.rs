//! The default system call filter, by architecture and capability.
//!
//! What is not listed fails with EPERM. Names that the linked libseccomp or the kernel does not
//! know are skipped when the filter is loaded. The set is Docker's; source: `moby/profiles`,
//! `seccomp/default_linux.go`, of 2026.

use std::collections::BTreeSet;

use oci_spec::runtime::{
    Arch as SeccompArch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::capabilities::{self, Set};
use super::input::Arch;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Flags of `clone` that make namespaces.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// Execution domains that `personality` may set: PER_LINUX, PER_LINUX32, with UNAME26, and a query.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Address families that are closed: the kernel's cryptography, and the host of this machine.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// Calls of every container.
const COMMON: &str = "
accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64
fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl
fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64
fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32 geteuid
geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid
getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit get_robust_list
getrusage getsid getsockname getsockopt get_thread_area gettid gettimeofday getuid getuid32 getxattr
getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel ioctl io_destroy
io_getevents io_pgetevents io_pgetevents_time64 ioprio_get ioprio_set io_setup io_submit ipc kill
landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link
linkat listen listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat
lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod
mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv
msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat _newselect open openat
openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv
process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink
readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr
removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max
sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl
semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto setfsgid
setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority
setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit
set_robust_list setsid setsockopt set_thread_area set_tid_address setuid setuid32 setxattr
setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn
socketcall socketpair splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync
sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime
timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask
uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid
waitpid write writev";

/// Calls that one architecture needs.
const BY_ARCH: [(Arch, &str); 2] = [
    (Arch::X86_64, "arch_prctl modify_ldt"),
    (
        Arch::Aarch64,
        "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    ),
];

/// Calls that come with a capability.
const BY_CAPABILITY: [(&str, &str); 14] = [
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie
         lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog
         umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// The filter of a container with `capabilities` on `arch`.
pub fn default_profile(arch: Arch, capabilities: &Set) -> LinuxSeccomp {
    let for_arch = BY_ARCH.iter().filter(|(of, _)| *of == arch).map(|(_, names)| *names);
    let for_capabilities = BY_CAPABILITY
        .iter()
        .filter(|(name, _)| capabilities::has(capabilities, name))
        .map(|(_, names)| *names);
    // A set: two rules for one call would be refused when the filter is loaded.
    let names: BTreeSet<&str> = [COMMON]
        .into_iter()
        .chain(for_arch)
        .chain(for_capabilities)
        .flat_map(str::split_whitespace)
        .collect();

    let mut rules = vec![allow(&names.into_iter().collect::<Vec<_>>(), None)];
    for (value, operator) in [
        (AF_ALG, LinuxSeccompOperator::ScmpCmpLt),
        (AF_ALG + 1, LinuxSeccompOperator::ScmpCmpEq),
        (AF_VSOCK, LinuxSeccompOperator::ScmpCmpGt),
    ] {
        rules.push(allow(&["socket"], Some(argument(value, None, operator))));
    }
    for value in PERSONALITIES {
        let is_equal = argument(value, None, LinuxSeccompOperator::ScmpCmpEq);
        rules.push(allow(&["personality"], Some(is_equal)));
    }
    if !capabilities::has(capabilities, "CAP_SYS_ADMIN") {
        // No flag of the mask may be set: the masked value equals zero.
        let no_flag = argument(NAMESPACE_FLAGS, Some(0), LinuxSeccompOperator::ScmpCmpMaskedEq);
        rules.push(allow(&["clone"], Some(no_flag)));
        // The flags of clone3 are behind a pointer; "not implemented" makes libc use clone.
        let mut clone3 = rule(&["clone3"], LinuxSeccompAction::ScmpActErrno);
        clone3.set_errno_ret(Some(ENOSYS));
        rules.push(clone3);
    }

    let architectures = match arch {
        Arch::X86_64 => {
            vec![SeccompArch::ScmpArchX86_64, SeccompArch::ScmpArchX86, SeccompArch::ScmpArchX32]
        }
        Arch::Aarch64 => vec![SeccompArch::ScmpArchAarch64, SeccompArch::ScmpArchArm],
    };
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(architectures))
        .set_syscalls(Some(rules));
    profile
}

fn rule(names: &[&str], action: LinuxSeccompAction) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(ToString::to_string).collect()).set_action(action);
    rule
}

fn allow(names: &[&str], argument: Option<LinuxSeccompArg>) -> LinuxSyscall {
    let mut rule = rule(names, LinuxSeccompAction::ScmpActAllow);
    rule.set_args(argument.map(|argument| vec![argument]));
    rule
}

/// A test of the first argument.
fn argument(value: u64, other: Option<u64>, operator: LinuxSeccompOperator) -> LinuxSeccompArg {
    let argument = LinuxSeccompArgBuilder::default().index(0_usize).value(value).op(operator);
    let argument = match other {
        Some(other) => argument.value_two(other),
        None => argument,
    };
    argument.build().expect("index, value and operator are given")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(arch: Arch, add: &[&str]) -> BTreeSet<String> {
        let add: Vec<String> = add.iter().map(ToString::to_string).collect();
        let set = capabilities::tweak(&add, &[], 40).unwrap();
        let profile = default_profile(arch, &set);
        profile.syscalls().as_ref().unwrap()[0].names().iter().cloned().collect()
    }

    #[test]
    fn capabilities_open_their_calls() {
        let plain = names(Arch::X86_64, &[]);
        assert!(plain.contains("chroot") && plain.contains("arch_prctl"));
        for (capability, call) in [
            ("SYS_ADMIN", "mount"),
            ("SYS_TIME", "settimeofday"),
            ("SYS_MODULE", "init_module"),
            ("BPF", "bpf"),
        ] {
            assert!(!plain.contains(call), "{call}");
            assert!(names(Arch::X86_64, &[capability]).contains(call), "{call}");
        }
        for never in
            ["io_uring_setup", "kexec_load", "keyctl", "userfaultfd", "swapon", "nfsservctl"]
        {
            assert!(!names(Arch::X86_64, &["ALL"]).contains(never), "{never}");
        }
    }

    #[test]
    fn architectures_differ() {
        assert!(!names(Arch::Aarch64, &[]).contains("arch_prctl"));
        assert!(names(Arch::Aarch64, &[]).contains("sync_file_range2"));
    }
}
