//! Waiting for a condition, and the rules of what is skipped.

use std::time::Duration;

use skep_runtime::clock::monotonic;

/// How long to wait between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Says how far a story is.
pub fn step(text: &str) {
    eprintln!("--- {text}");
}

/// Looks until `look` gives something; panics after `deadline` with what was seen last.
///
/// `look` also returns that: the state it looked at, in words.
#[track_caller]
pub fn wait_until<T>(
    deadline: Duration,
    what: &str,
    mut look: impl FnMut() -> (Option<T>, String),
) -> T {
    let started = monotonic();
    loop {
        let (found, seen) = look();
        if let Some(found) = found {
            return found;
        }
        assert!(
            started.elapsed() < deadline,
            "not within {} s: {what}\nlast seen: {seen}",
            deadline.as_secs_f32()
        );
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Tells whether this test may run; prints why not, and panics where a skip would hide a gap.
#[track_caller]
pub fn is_root_or_skip() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!is_ci, "this test needs root, and CI=true allows no skip");
    eprintln!("skipped: needs root, since it makes namespaces; run it with sudo");
    false
}

/// Whether the long tests were asked for: `make test-long`.
pub fn is_long() -> bool {
    std::env::var("SKEP_TEST_LONG").is_ok_and(|value| value == "1")
}

/// Tells whether this machine has a Docker Engine, which only the long tests install; prints that it has
/// not, and panics where they were asked for.
#[track_caller]
pub fn has_docker_or_skip() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join("dockerd").exists()) {
        return true;
    }
    assert!(!is_long(), "this test needs dockerd: deploy/prerequisites.sh installs it");
    eprintln!("skipped: needs dockerd, which `make test-long` installs");
    false
}
