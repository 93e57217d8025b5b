//! The tasks that the daemon gives a port's connections to, and who of them accepts none.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use skep_common::spec::ProxyProtocol;
use skep_runtime::clock;
use skep_worker_core::mesh::{Change, Endpoint, PortKey, Reason, Relay, Target, Turns, Verdict};
use tokio::sync::watch;

use super::ejection::report;

/// How long clients may wait to be accepted who came before the rules took their port.
const HANDOVER: Duration = Duration::from_secs(5);

/// The tasks of a port that the daemon balances to, and whose turn it is.
#[derive(Debug)]
pub(super) struct Balance {
    port: PortKey,
    state: Mutex<State>,
    /// Whether clients that wait for a task must look at the tasks again.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing where the rules balanced from the start.
    tasks: Option<Tasks>,
    /// When the rules took the port.
    by_rules_since: Option<Instant>,
    /// Tasks that the node tries itself, each one once at a time.
    tried: BTreeSet<Target>,
    /// Whether it was said that clients found no task in time, and none has found one since.
    is_told: bool,
}

#[derive(Debug, Default)]
struct Tasks {
    turns: Turns,
    proxy_protocol: Option<ProxyProtocol>,
}

/// Whom a client is given to.
pub(super) enum Next {
    /// Whomever the rules choose.
    ByRules,
    Task(Target, Option<ProxyProtocol>),
    Nobody,
}

impl Balance {
    /// Of a port that the rules balance, until there is something else to say.
    pub(super) fn new(port: PortKey) -> Self {
        Self { port, state: Mutex::default(), changed: watch::Sender::default() }
    }

    /// The port.
    pub(super) fn port(&self) -> PortKey {
        self.port
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on connections go to these tasks. Those that are established go on.
    pub(super) fn set(&self, relay: &Relay) {
        let mut state = self.lock();
        state.by_rules_since = None;
        let tasks = state.tasks.get_or_insert_default();
        tasks.turns.set(&relay.backends);
        tasks.proxy_protocol = relay.proxy_protocol;
        self.changed.send_replace(());
    }

    /// Whom the rules give the port's connections to by now, which took it before: also who came before them
    /// goes to no other task.
    pub(super) fn follow_rules(&self, relay: &Relay) {
        let mut state = self.lock();
        if let Some(tasks) = &mut state.tasks {
            tasks.turns.set(&relay.backends);
        }
        self.changed.send_replace(());
    }

    /// From now on no task is given a connection, also of clients that are between two tasks.
    pub(super) fn withdraw(&self) {
        let mut state = self.lock();
        if let Some(tasks) = &mut state.tasks {
            tasks.turns.set(&[]);
        }
        self.changed.send_replace(());
    }

    /// From now on the rules take connections; whoever came before them still goes to the tasks.
    pub(super) fn leave_to_rules(&self) {
        let mut state = self.lock();
        state.by_rules_since.get_or_insert_with(clock::monotonic);
    }

    /// Returns when a client whom these tasks failed is not to wait for the task any more: the table withdrew it, or
    /// another one is better.
    pub(super) async fn given_up(&self, target: &Target, failed: &BTreeSet<Target>) {
        let mut changed = self.changed.subscribe();
        let is_given = || self.lock().turns().is_some_and(|turns| turns.is_given(target, failed));
        while is_given() {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Leaves a task out that did not accept, where there is another one.
    pub(super) fn leave_out(&self, target: &Target, reason: Reason) {
        let verdict = match self.lock().turns() {
            Some(turns) => turns.leave_out(target, reason),
            None => None,
        };
        let Some(verdict) = verdict else { return };
        self.changed.send_replace(());
        let change = match verdict {
            Verdict::LeftOut(reason) => Change::LeftOut(self.port, endpoint(target), reason),
            Verdict::NoneAnswers => Change::NoneAnswers(self.port),
        };
        report(&change, &target.task_id);
    }

    /// The node's own attempt succeeded.
    pub(super) fn take_back(&self, target: &Target) {
        let is_news = self.lock().turns().is_some_and(|turns| turns.take_back(target));
        if is_news {
            self.changed.send_replace(());
            report(&Change::TakenBack(self.port, endpoint(target)), &target.task_id);
        }
    }

    /// Whether the node is to try the task itself from now on, until [`Self::ends_trial`].
    pub(super) fn begins_trial(&self, target: &Target) -> bool {
        let mut state = self.lock();
        state.turns().is_some_and(|turns| turns.has_choice(target))
            && state.tried.insert(target.clone())
    }

    /// Whether the task needs no more attempts: it accepts, or the table names it no longer.
    pub(super) fn ends_trial(&self, target: &Target) -> bool {
        let mut state = self.lock();
        let is_over = !state.turns().is_some_and(|turns| turns.is_left_out(target));
        if is_over {
            state.tried.remove(target);
        }
        is_over
    }

    /// A client was given to a task.
    pub(super) fn note_served(&self) {
        self.lock().is_told = false;
    }

    /// A client found no task in time. Said once, until another one does.
    pub(super) fn note_unserved(&self, waited: Duration) {
        if !std::mem::replace(&mut self.lock().is_told, true) {
            tracing::warn!(
                port = %self.port, ?waited,
                "no task accepted a client in that time, so it was reset; look at the port's service"
            );
        }
    }

    /// Clients that wait for a task to accept.
    #[cfg(test)]
    pub(super) fn n_waiting(&self) -> usize {
        self.changed.receiver_count()
    }

    /// Whom a client is given to that came to that address, and whom these tasks failed.
    pub(super) fn next(&self, failed: &BTreeSet<Target>, server: IpAddr) -> Next {
        let mut state = self.lock();
        let is_past = |since: Instant| clock::monotonic() - since > HANDOVER;
        if state.by_rules_since.is_some_and(|since| server.is_loopback() || is_past(since)) {
            return Next::ByRules;
        }
        let Some(tasks) = &mut state.tasks else { return Next::ByRules };
        match tasks.turns.take(failed) {
            Some(target) => Next::Task(target, tasks.proxy_protocol),
            None => Next::Nobody,
        }
    }
}

impl State {
    fn turns(&mut self) -> Option<&mut Turns> {
        self.tasks.as_mut().map(|tasks| &mut tasks.turns)
    }
}

fn endpoint(target: &Target) -> Endpoint {
    Endpoint { address: (*target.address.ip()).into(), port: target.address.port() }
}
