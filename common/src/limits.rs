//! Named bounds. Each says why it has this value.

use std::time::Duration;

/// A node's heartbeat period where the swarm's settings name none, in swarms of up to [`NODES_AT_USUAL_PACE`] nodes.
/// Swarm has 5 s; a third of the loss time, so that one lost beat is no news.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_secs(1);
/// The period of the largest swarms, see [`times_slower`]: Swarm's, of all its swarms.
pub const HEARTBEAT_PERIOD_LARGE: Duration = Duration::from_secs(5);
/// Nodes that a leader serves at the usual pace. Each is 0.2 ms of its processor time with a heartbeat, and a millisecond
/// when it comes back after a leader's end.
pub const NODES_AT_USUAL_PACE: usize = 1000;
/// What [`times_slower`] says at most: managers and machines that vanished are to be noticed.
const SLOWER_MAX: usize = 5;

/// How many times slower a swarm of so many nodes sends heartbeats, and how many times as patient its nodes are.
pub fn times_slower(n_nodes: usize) -> u32 {
    let times = n_nodes.div_ceil(NODES_AT_USUAL_PACE).clamp(1, SLOWER_MAX);
    u32::try_from(times).unwrap_or(u32::MAX)
}

/// How long replacements wait when more than a third of the nodes fall silent at once: it is then
/// likelier that this manager is cut off than that they all died.
pub const MASS_SILENCE_WAIT: Duration = Duration::from_secs(15);
/// How long replacements wait for a node whose machine accepts connections and whose daemon is silent: its
/// containers run, and a daemon that was stopped or starved goes on.
pub const HANGING_DAEMON_WAIT: Duration = Duration::from_secs(15);
/// How long the removal of a task waits for the balancers of nodes that are not down.
pub const DRAIN_ACK_WAIT: Duration = Duration::from_secs(2);
/// The same for a node that is heard: it is at work, only slow, and goes on sending connections there until it has the
/// table. A node that lets this pass is given [`DRAIN_ACK_WAIT`] alone until it acknowledges something.
pub const DRAIN_ACK_WAIT_HEARD: Duration = Duration::from_secs(10);
/// Finished tasks kept per slot. SwarmKit's `TaskHistoryRetentionLimit`.
pub const TASK_HISTORY_LIMIT: i64 = 5;
/// The highest `MaxAttempts` of a restart policy that is a limit.
pub const MAX_ATTEMPTS_COUNTED: u64 = 100;
/// Largest gRPC message: a full assignment set or a list of some ten thousand tasks.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Largest certificate request, token or other message of a peer without a certificate.
pub const ANONYMOUS_MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Deadline of a unary call between nodes.
pub const RPC_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of a TCP connect to a peer: a dead peer must not hold votes or replication.
pub const CONNECT_DEADLINE: Duration = Duration::from_millis(200);
/// Deadline of the TLS handshake that follows: the machine is there, and its daemon may have a thousand others to
/// greet. Each that is given up is begun again.
pub const TLS_DEADLINE: Duration = Duration::from_secs(2);
/// Entries of a bounded queue between two tasks of one daemon where nothing better is known.
pub const QUEUE_LENGTH: usize = 256;

/// Single containers of one node, stopped ones too: what a node's user runs by hand, and not more than a node of
/// services has. Each is an object of the store, which every manager keeps in memory.
pub const CONTAINERS_PER_NODE_MAX: usize = 1000;
/// The spec of a single container as text: a thousand environment variables of 256 characters.
pub const CONTAINER_SPEC_BYTES_MAX: usize = 256 << 10;
/// What a node says of itself as text: names, labels and addresses.
pub const DESCRIPTION_BYTES_MAX: usize = 64 << 10;
/// A node's description and conditions are written at most this often: each time is an entry of the log.
pub const DESCRIPTION_PERIOD: Duration = Duration::from_millis(250);
/// IPv6 addresses of one node that the swarm knows.
pub const IPV6_ADDRESSES_MAX: usize = 64;
/// Published ports that one node says it cannot serve: more than anybody reads.
pub const PORT_CONDITIONS_MAX: usize = 256;
/// Characters of what a node says of one port: a sentence with a program's command line.
pub const CONDITION_CHARS_MAX: usize = 512;

/// Health checks, stop grace and the like of Docker's engine, used where neither service nor image
/// names a value.
pub mod defaults {
    use std::time::Duration;

    /// Between SIGTERM and SIGKILL.
    pub const STOP_GRACE_PERIOD: Duration = Duration::from_secs(10);
    /// Between the end of one health check and the start of the next.
    pub const HEALTH_INTERVAL: Duration = Duration::from_secs(30);
    /// After this a health check counts as failed.
    pub const HEALTH_TIMEOUT: Duration = Duration::from_secs(30);
    /// Consecutive failures that make a container unhealthy.
    pub const HEALTH_RETRIES: u32 = 3;
    /// Between checks while the start period lasts.
    pub const HEALTH_START_INTERVAL: Duration = Duration::from_secs(5);
    /// Between the failure of a task and its replacement's start.
    pub const RESTART_DELAY: Duration = Duration::from_secs(5);
    /// Slots replaced at once by an update.
    pub const UPDATE_PARALLELISM: u64 = 1;
}
