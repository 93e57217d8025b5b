//! Waiting for a condition, and the rule of what is skipped.

use std::time::Duration;

use skep_runtime::clock::monotonic;

/// How long to wait between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

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
