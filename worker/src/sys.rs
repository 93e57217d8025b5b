//! System calls that neither the standard library nor `nix` wraps safely.
//!
//! The only file of this package that holds `unsafe` code. It decides nothing; callers are the
//! container shim and the container runtime.

#![expect(unsafe_code, reason = "the one place for system calls without a safe wrapper")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{ForkResult, Pid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Sends signal `number`, which may be a real-time one, through a pidfd.
///
/// A process that is gone already is no error.
pub fn send_signal(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open while it is borrowed, and a null `info` is allowed.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), number, info, 0) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens a socket that receives every Ethernet frame of one type, on whichever interface of the calling
/// thread's network namespace.
pub fn frame_socket(ether_type: u16) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes three integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(ether_type.to_be())) };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has every packet of a socket carry the don't-fragment flag, whatever the kernel knows of the path.
pub fn never_fragment(socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = libc::IP_PMTUDISC_PROBE;
    let length = libc::socklen_t::try_from(size_of_val(&value)).expect("an integer is short");
    // SAFETY: the descriptor is open while it is borrowed, and the value lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            std::ptr::from_ref(&value).cast(),
            length,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Closes every descriptor but standard input, output and error.
///
/// For a process that has just started: descriptors that a library opened would be closed under it.
pub fn close_inherited_fds() -> io::Result<()> {
    // SAFETY: close_range(2) takes three integers; the caller has opened nothing yet that it uses.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0) };
    Errno::result(result)?;
    Ok(())
}

/// Unblocks all signals and gives each its default action back.
///
/// A program that is started with `exec` inherits what is blocked and what is ignored: SIGPIPE by
/// Rust, others by whoever started the daemon.
pub fn reset_signals() -> io::Result<()> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: the default action runs no code of this process. SIGKILL and SIGSTOP refuse it.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    Ok(())
}

/// Forks; gives the child's pid in the parent and `None` in the child.
///
/// Only for processes with one thread: the child goes on with this process's memory, and a lock
/// that another thread holds would stay locked in it.
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: by the contract above no other thread exists whose locks could be copied.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Has the tokio runtime tell when `fd` can be read.
pub fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the registration owns the descriptor, which therefore stays open and the same one
    // until both are dropped.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    registered.map_err(|error| error.into_parts().1)
}

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal, which may be a real-time one.
    Signaled(i32),
}

impl Ended {
    /// The exit code as shells and Docker count it.
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
        }
    }
}

/// Reaps one child that has ended; `None` when no child has.
///
/// Unlike nix's, it knows real-time signals: a child that one of them ended must not be lost.
pub fn reap_child() -> Option<(i32, Ended)> {
    loop {
        let mut status = 0;
        // SAFETY: the status is written to a local integer.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match pid {
            -1 if Errno::last() == Errno::EINTR => {}
            // ECHILD: there are no children. Nothing else can fail with these arguments.
            -1 | 0 => return None,
            pid if libc::WIFSIGNALED(status) => {
                return Some((pid, Ended::Signaled(libc::WTERMSIG(status))));
            }
            pid if libc::WIFEXITED(status) => {
                return Some((pid, Ended::Exited(libc::WEXITSTATUS(status))));
            }
            _ => {}
        }
    }
}

/// Waits for a signal of `set`, which is blocked, and gives its number.
pub fn wait_signal(set: &SigSet) -> io::Result<i32> {
    // SAFETY: the set outlives the call, and no details are asked for.
    let number = unsafe { libc::sigwaitinfo(set.as_ref(), std::ptr::null_mut()) };
    Ok(Errno::result(number)?)
}

/// Sends signal `number`, which may be a real-time one, to a process that is gone or not.
pub fn kill(pid: i32, number: i32) {
    // SAFETY: kill takes two integers. The only failure here is that the process has ended.
    unsafe { libc::kill(pid, number) };
}

/// Gives freed memory back to the kernel, where the C library can.
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Takes ownership of a descriptor that a control message has just brought.
///
/// Only for a number that `recvmsg` returned and that nothing else has taken.
pub fn own_received_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: by the contract above the kernel has just made it for this process.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A copy of descriptor `number` of another process.
pub fn copy_fd(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd(2) takes an open descriptor and two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Drops this process's mappings of program code and constants; what is used again is mapped again.
///
/// For a process that ran much code once and will run little of it from now on. Only pages that
/// nothing ever writes are touched: code, and the first part of a program or library, which is
/// mapped from the start of its file.
pub fn release_program_pages() -> io::Result<()> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(access), Some(offset)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let is_file = fields.nth(2).is_some_and(|path| path.starts_with('/'));
        let is_never_written = access == "r-xp" || (access == "r--p" && offset == "00000000");
        let Some((begin, end)) = range.split_once('-').filter(|_| is_file && is_never_written)
        else {
            continue;
        };
        let address = |text| usize::from_str_radix(text, 16).map_err(io::Error::other);
        let (begin, end) = (address(begin)?, address(end)?);
        // SAFETY: the range is a mapping of this process that it cannot write and never wrote
        // (such programs have no relocations in it), so that its pages equal the file's and come
        // back from it.
        let result =
            unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_DONTNEED) };
        Errno::result(result)?;
    }
    Ok(())
}

/// Makes a detached read-only mount of one file and opens it, for `exec` through /proc/self/fd.
///
/// A process that runs from it cannot be used to overwrite the file: /proc/PID/exe leads to the
/// read-only mount (compare CVE-2019-5736). Needs Linux 5.12.
pub fn open_read_only_mount(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    let mount = unsafe { OwnedFd::from_raw_fd(fd) };

    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, the struct lives through the call, its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result)?;
    Ok(mount)
}

/// Opens the TUN device `name` of the calling thread's network namespace, making it where there is none.
/// Reads and writes are whole IP packets and never wait. The device stays when it is closed.
pub fn open_tun(name: &str) -> io::Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all fields of the struct are integers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the struct lives through the call.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw const request) };
    Errno::result(result)?;
    // SAFETY: the descriptor is open, and the argument is an integer.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST as _, 1) };
    Errno::result(result)?;
    Ok(device)
}

/// The fields of the kernel's `union bpf_attr` for `BPF_PROG_LOAD`, up to the log's.
#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    program_type: u32,
    n_instructions: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    program_flags: u32,
    name: [u8; 16],
    interface_index: u32,
    expected_attach_type: u32,
}

/// The fields of the kernel's `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
#[derive(Default)]
struct ProgramAttach {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// The program may stand beside those of others on the same cgroup; all of them must allow.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Attaches a device filter to a cgroup v2 directory; it lives as long as the cgroup.
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, instructions: &[u64]) -> io::Result<()> {
    let mut load = ProgramLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        n_instructions: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..ProgramLoad::default()
    };
    load.name[..12].copy_from_slice(b"skep_devices");
    // SAFETY: the struct, the instructions and the license live through the call; the kernel reads
    // `n_instructions` words of eight bytes, which is the slice, and writes no log.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<ProgramLoad>())
    };
    let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };

    let attach = ProgramAttach {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        program_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the struct lives through the call and holds two open descriptors.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<ProgramAttach>())
    };
    Errno::result(result)?;
    Ok(())
}
