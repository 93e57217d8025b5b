//! A stand-in for the daemon, for tests of the lab itself.
//!
//! It is what a lab sees of a daemon: it takes the same arguments, listens on the client socket,
//! answers HTTP on port 8080 with its host name and the client's address, makes a cgroup below the
//! parent it is given, and keeps a "container" in it, a process of a session of its own that
//! survives the daemon.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

fn main() -> io::Result<()> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("daemon") => {
            let mut options = std::collections::BTreeMap::new();
            while let (Some(name), Some(value)) = (args.next(), args.next()) {
                options.insert(name, value);
            }
            let option = |name: &str| {
                options.get(name).cloned().ok_or_else(|| io::Error::other(format!("no {name}")))
            };
            daemon(
                &option("--hostname")?,
                Path::new(&option("--data-dir")?),
                Path::new(&option("--run-dir")?),
                &option("--advertise-addr")?,
                &option("--cgroup-parent")?,
            )
        }
        Some("container") => container(Path::new(&args.next().unwrap_or_default())),
        other => Err(io::Error::other(format!("what is {other:?}?"))),
    }
}

fn daemon(name: &str, data: &Path, run: &Path, address: &str, cgroup: &str) -> io::Result<()> {
    eprintln!("{name} starts at {address}");
    let mut starts = OpenOptions::new().create(true).append(true).open(data.join("starts"))?;
    writeln!(starts, "start")?;
    let pid_file = run.join("container.pid");
    if !pid_file.exists() {
        start_container(data, cgroup, &pid_file)?;
    }
    let http = TcpListener::bind((address, 8080))?;
    let name = name.to_owned();
    std::thread::spawn(move || {
        for stream in http.incoming().flatten() {
            let name = name.clone();
            std::thread::spawn(move || serve(&stream, &name));
        }
    });
    let socket = run.join("skep.sock");
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for stream in UnixListener::bind(socket)?.incoming() {
        // An HTTP/2 server begins with its settings; a client that is gone already missed nothing.
        let _ = stream?.write_all(b"\0\0\0\x04\0\0\0\0\0");
    }
    Ok(())
}

/// Answers every request of a connection until the client closes it.
fn serve(stream: &TcpStream, name: &str) -> io::Result<()> {
    let body = format!("{name} {}", stream.peer_addr()?.ip());
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next() {
        let line = line?;
        if line.is_empty() {
            let length = body.len();
            write!(&mut &*stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}")?;
        }
        if line.eq_ignore_ascii_case("connection: close") {
            while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close");
            return write!(&mut &*stream, "{head}\r\n\r\n{body}");
        }
    }
    Ok(())
}

fn start_container(data: &Path, cgroup: &str, pid_file: &Path) -> io::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("container").arg(data).stdin(Stdio::null()).process_group(0);
    let child = command.spawn()?;
    for dir in cgroup_dirs()? {
        let dir = dir.join(cgroup.trim_start_matches('/')).join("task");
        fs::create_dir_all(&dir)?;
        for file in ["cpuset.cpus", "cpuset.mems"].map(|file| dir.join(file)) {
            if file.exists() && !dir.join("cgroup.controllers").exists() {
                let above =
                    dir.parent().map(|above| above.join(file.file_name().unwrap_or_default()));
                fs::write(&file, fs::read_to_string(above.unwrap_or_default())?.trim())?;
            }
        }
        fs::write(dir.join("cgroup.procs"), child.id().to_string())?;
    }
    fs::write(pid_file, child.id().to_string())
}

fn cgroup_dirs() -> io::Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let dirs = text.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    });
    Ok(dirs.collect())
}

/// Has a mount namespace and a mount of its own, as a container has, and runs until it is killed.
fn container(data: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC)?;
    let root = data.join("container");
    fs::create_dir_all(&root)?;
    let none = None::<&str>;
    mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), none)?;
    let held = File::create(root.join("held"))?;
    loop {
        std::thread::park();
        held.sync_all()?;
    }
}
