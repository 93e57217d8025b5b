//! The swarm's own settings: what may be asked, and what follows where nothing was.

use std::time::Duration;

use skep_common::limits::{HEARTBEAT_PERIOD, times_slower};
use skep_common::object::Cluster;
use skep_common::spec::{Base64, SwarmSpec};

use crate::store::State;

/// Life of node certificates where the swarm's settings name none. SwarmKit's value.
pub(crate) const CERTIFICATE_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// Shorter lives of certificates would be renewed all the time. Docker's minimum.
pub const CERTIFICATE_LIFE_MIN: Duration = Duration::from_secs(3600);
/// Heartbeats more often than this keep the leader busy, and a node down for a hiccup.
pub const HEARTBEAT_MIN: Duration = Duration::from_millis(200);
/// With fewer heartbeats than one a minute, a dead node would be found after minutes.
pub const HEARTBEAT_MAX: Duration = Duration::from_secs(60);
/// Periods of silence after which a node counts as down, as in Swarm.
pub const SILENT_PERIODS: u32 = 3;

/// Why the settings of a swarm are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Docker's words.
    #[error("minimum certificate expiry time must be 1h0m0s")]
    CertificateLife,
    /// Out of bounds.
    #[error("invalid heartbeat period: it must be from 200ms to 1m0s")]
    Heartbeat,
    /// The log would grow for ever.
    #[error("invalid snapshot interval 0: a snapshot must be made after some number of entries")]
    SnapshotInterval,
    /// There is one swarm, and it has this name.
    #[error("a swarm is named \"default\", not {0:?}")]
    Name(String),
    /// Managers sign certificates themselves.
    #[error(
        "external certificate authorities are not supported: managers sign certificates themselves"
    )]
    ExternalAuthority,
    /// There is no key to change.
    #[error(
        "the unlock key cannot be changed: managers do not start locked; have them do with `skep swarm update --autolock`"
    )]
    NotLocked,
    /// Changing the root is a request of its own.
    #[error("the root of certificates is changed with `skep swarm ca --rotate`")]
    Root,
}

/// Checks the settings of a new swarm.
pub fn check(spec: &SwarmSpec) -> Result<(), Error> {
    if !matches!(spec.name.as_str(), "" | "default") {
        return Err(Error::Name(spec.name.clone()));
    }
    if let Some(config) = &spec.ca_config {
        if config.node_cert_expiry.is_some_and(|expiry| expiry.duration() < CERTIFICATE_LIFE_MIN) {
            return Err(Error::CertificateLife);
        }
        let is_none = |value: &serde_json::Value| {
            value.is_null() || value.as_array().is_some_and(Vec::is_empty)
        };
        if config.extra.get("ExternalCAs").is_some_and(|value| !is_none(value)) {
            return Err(Error::ExternalAuthority);
        }
        let is_root_named = config.force_rotate.is_some_and(|counter| counter > 0)
            || config.signing_ca_cert.as_ref().is_some_and(|pem| !pem.is_empty())
            || config.signing_ca_key.as_ref().is_some_and(|pem| !pem.is_empty());
        if is_root_named {
            return Err(Error::Root);
        }
    }
    let period = spec.dispatcher.as_ref().and_then(|config| config.heartbeat_period);
    if period.is_some_and(|period| !(HEARTBEAT_MIN..=HEARTBEAT_MAX).contains(&period.duration())) {
        return Err(Error::Heartbeat);
    }
    if spec.raft.as_ref().and_then(|config| config.snapshot_interval) == Some(0) {
        return Err(Error::SnapshotInterval);
    }
    Ok(())
}

/// The swarm with other settings, where they may be had. `new_key` draws an unlock key where one is needed:
/// when managers are to start locked from now on, and when another key is asked for.
pub fn with_spec(
    cluster: &Cluster,
    spec: SwarmSpec,
    is_key_rotated: bool,
    new_key: impl FnOnce() -> Vec<u8>,
) -> Result<Cluster, Error> {
    check(&spec)?;
    let mut changed = cluster.clone();
    changed.spec = SwarmSpec { name: "default".into(), ..spec };
    let life = certificate_life(&cluster.spec);
    if life > CERTIFICATE_LIFE.max(certificate_life(&changed.spec)) {
        // Certificates of then outlive those that are signed from now on.
        changed.longest_node_cert_expiry = changed.longest_node_cert_expiry.max(Some(life.into()));
    }
    let is_locked = starts_locked(&changed.spec);
    if is_key_rotated && !is_locked {
        return Err(Error::NotLocked);
    }
    if is_key_rotated || is_locked != changed.unlock_key.is_some() {
        changed.unlock_key = is_locked.then(|| Base64(new_key()));
        changed.unlock_key_version += 1;
    }
    Ok(changed)
}

/// Whether managers need the unlock key when they start.
pub fn starts_locked(spec: &SwarmSpec) -> bool {
    let config = spec.encryption_config.as_ref();
    config.and_then(|config| config.auto_lock_managers).unwrap_or(false)
}

/// How long node certificates are good.
pub fn certificate_life(spec: &SwarmSpec) -> Duration {
    let expiry = spec.ca_config.as_ref().and_then(|config| config.node_cert_expiry);
    expiry.map_or(CERTIFICATE_LIFE, |expiry| expiry.duration().max(CERTIFICATE_LIFE_MIN))
}

/// How often nodes let hear of themselves: as the swarm's settings say, or once a second, and in swarms of more than
/// a thousand nodes less often.
///
/// A leader that is busy with heartbeats hears late who lives: nodes would be down that are not.
pub fn heartbeat_period(view: &State) -> Duration {
    let spec = view.cluster().and_then(|cluster| cluster.spec.dispatcher.as_ref());
    match spec.and_then(|config| config.heartbeat_period) {
        Some(period) => period.duration().clamp(HEARTBEAT_MIN, HEARTBEAT_MAX),
        None => HEARTBEAT_PERIOD * times_slower(view.nodes().len()),
    }
}

/// After how many entries of the log a snapshot is made; `None` where the swarm says nothing.
pub fn snapshot_interval(view: &State) -> Option<u64> {
    let spec = view.cluster().and_then(|cluster| cluster.spec.raft.as_ref());
    spec.and_then(|config| config.snapshot_interval).filter(|entries| *entries > 0)
}

/// How many snapshots are kept beside the newest.
pub fn old_snapshots_kept(view: &State) -> usize {
    let spec = view.cluster().and_then(|cluster| cluster.spec.raft.as_ref());
    let kept = spec.and_then(|config| config.keep_old_snapshots).unwrap_or(0);
    usize::try_from(kept).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use skep_common::spec::Nanos;
    use skep_common::{Object, Timestamp};

    use super::*;
    use crate::command::{Action, Command, Expect};

    #[test]
    fn an_unlock_key_is_drawn_when_it_is_needed_and_kept_until_then() {
        let mut cluster = crate::testing::cluster();
        let mut n_drawn = 0;
        // Whether managers shall start locked, whether another key is asked for: the key's number, its version.
        for (is_locked, is_rotated, expect) in [
            (false, false, Ok((None, 0))),
            (false, true, Err(Error::NotLocked)),
            (true, false, Ok((Some(1), 1))),
            (true, false, Ok((Some(1), 1))),
            (true, true, Ok((Some(2), 2))),
            (false, false, Ok((None, 3))),
            (true, true, Ok((Some(3), 4))),
        ] {
            let mut spec = SwarmSpec::default();
            spec.encryption_config.get_or_insert_default().auto_lock_managers = Some(is_locked);
            let changed = with_spec(&cluster, spec, is_rotated, || {
                n_drawn += 1;
                vec![n_drawn]
            });
            if let Ok(changed) = &changed {
                cluster = changed.clone();
            }
            let key = |changed: Cluster| {
                let key = changed.unlock_key.map(|key| key.0[0]);
                (key, changed.unlock_key_version)
            };
            assert_eq!(changed.map(key), expect, "{is_locked} {is_rotated}");
        }
    }

    #[test]
    fn nodes_let_hear_of_themselves_less_often_in_large_swarms() {
        let swarm = |n_nodes: u16, period: Option<i64>| {
            let mut state = State::default();
            let put = |object| Action::Put { object, expect: Expect::Absent };
            let mut cluster = crate::testing::cluster();
            cluster.spec.dispatcher.get_or_insert_default().heartbeat_period = period.map(Nanos);
            let mut actions = vec![put(Object::Cluster(Box::new(cluster)))];
            let node = |id| put(Object::Node(Box::new(crate::testing::node(id))));
            actions.extend((1..=n_nodes).map(node));
            state.apply(1, &Command::new(Timestamp(1), actions));
            state
        };
        for (n_nodes, set, expect) in [
            (0, None, 1000),
            (1, None, 1000),
            (1000, None, 1000),
            (1001, None, 2000),
            (4000, None, 4000),
            (9500, None, 5000),
            (1001, Some(500), 500),
        ] {
            let state = swarm(n_nodes, set.map(|millis: i64| millis * 1_000_000));
            assert_eq!(heartbeat_period(&state).as_millis(), expect, "{n_nodes} nodes, {set:?}");
        }
    }

    #[test]
    fn settings_are_within_bounds() {
        let hour = 3_600_000_000_000i64;
        for (json, expect) in [
            ("{}".to_owned(), Ok(())),
            (r#"{"Name":"default"}"#.to_owned(), Ok(())),
            (r#"{"Name":"web"}"#.to_owned(), Err(Error::Name("web".into()))),
            (format!(r#"{{"CAConfig":{{"NodeCertExpiry":{hour}}}}}"#), Ok(())),
            (
                format!(r#"{{"CAConfig":{{"NodeCertExpiry":{}}}}}"#, hour - 1),
                Err(Error::CertificateLife),
            ),
            (r#"{"CAConfig":{"ExternalCAs":[]}}"#.to_owned(), Ok(())),
            (
                r#"{"CAConfig":{"ExternalCAs":[{"URL":"u"}]}}"#.to_owned(),
                Err(Error::ExternalAuthority),
            ),
            (r#"{"CAConfig":{"ForceRotate":0}}"#.to_owned(), Ok(())),
            (r#"{"CAConfig":{"ForceRotate":1}}"#.to_owned(), Err(Error::Root)),
            (r#"{"Dispatcher":{"HeartbeatPeriod":200000000}}"#.to_owned(), Ok(())),
            (r#"{"Dispatcher":{"HeartbeatPeriod":199999999}}"#.to_owned(), Err(Error::Heartbeat)),
            (r#"{"Dispatcher":{"HeartbeatPeriod":60000000001}}"#.to_owned(), Err(Error::Heartbeat)),
            (r#"{"Raft":{"SnapshotInterval":1}}"#.to_owned(), Ok(())),
            (r#"{"Raft":{"SnapshotInterval":0}}"#.to_owned(), Err(Error::SnapshotInterval)),
        ] {
            let spec: SwarmSpec = serde_json::from_str(&json).unwrap();
            assert_eq!(check(&spec), expect, "{json}");
        }
    }
}
