//! Puts a container's secrets and configs on a tmpfs that nobody else sees.
//!
//! They come over the daemon's socket, and are in no file outside of this tmpfs: it is mounted in the
//! shim's own mount namespace, and is gone with the container.

use std::fs;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, fchown};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use skep_worker_core::oci::payloads::{PayloadFile, layout};

use super::dirs::RunDir;
use super::error::{Context, Error};

/// A tmpfs counts by pages.
const PAGE_BYTES: usize = 4096;

/// Reads the files that the daemon sends: `n_bytes` of JSON, before anything else.
pub(super) fn receive(mut socket: impl Read, n_bytes: usize) -> io::Result<Vec<PayloadFile>> {
    if n_bytes == 0 {
        return Ok(Vec::new());
    }
    let mut text = vec![0; n_bytes];
    socket.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Mounts the tmpfs and writes the files. The mount namespace must be this process's own.
pub(super) fn write(run: &RunDir, files: &[PayloadFile]) -> Result<(), Error> {
    if files.is_empty() {
        return Ok(());
    }
    let base = run.payloads();
    let context = || format!("mount a tmpfs at {}", base.display());
    fs::create_dir_all(&base).during(context)?;
    let n_pages: usize = files.iter().map(|file| file.data.0.len().div_ceil(PAGE_BYTES) + 1).sum();
    // Swap is a disk. Kernels before 6.4 do not know the option.
    let options = format!("mode=0755,size={}", (n_pages + 1) * PAGE_BYTES);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let try_mount =
        |options: &str| mount(Some("tmpfs"), &base, Some("tmpfs"), flags, Some(options));
    match try_mount(&format!("{options},noswap")) {
        Err(Errno::EINVAL) => try_mount(&options),
        mounted => mounted,
    }
    .during(context)?;
    for (path, file) in layout(files) {
        let path = base.join(path);
        // Its bytes are in no message.
        write_file(&path, file).during(|| format!("write {}", file.target.display()))?;
    }
    Ok(())
}

fn write_file(path: &std::path::Path, file: &PayloadFile) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut made = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    made.write_all(&file.data.0)?;
    fchown(&made, Some(file.uid), Some(file.gid))?;
    // After the owner: a change of that takes bits away.
    made.set_permissions(fs::Permissions::from_mode(file.mode))
}
