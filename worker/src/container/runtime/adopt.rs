//! Finds the containers of an earlier daemon.

use std::collections::BTreeSet;
use std::time::Duration;

use skep_common::Timestamp;
use skep_runtime::sys::PidFd;

use super::super::error::{Context, Error};
use super::super::process::Process;
use super::super::protocol::{Phase, ShimState, read_json};
use super::{
    ContainerRuntime, ExitStatus, Handle, Inner, blocking, ids_in, kill_process, open_process,
};

/// How long a shim whose daemon went away before the start may take to remove its container.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(10);

/// A container that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// Its id.
    pub id: String,
    /// What became of it.
    pub state: AdoptedState,
}

/// What became of a container while no daemon ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdoptedState {
    /// It runs, or ended just now; await its end as that of any other.
    Running {
        /// Its first process.
        pid: i32,
        /// Its shim.
        shim_pid: i32,
        /// When it was started.
        started_at: Timestamp,
    },
    /// It ended and its end was recorded.
    Exited(ExitStatus),
    /// Its shim, or the whole machine, went down; nothing of it runs any more.
    Lost,
}

/// What the blocking part found.
enum Found {
    Running {
        state: ShimState,
        shim: PidFd,
        init: PidFd,
    },
    Done(AdoptedState),
    /// Nothing is left: it had never been started.
    Gone,
}

impl ContainerRuntime {
    /// Takes the containers of an earlier daemon over: call it once, before anything else.
    ///
    /// Containers that never started are removed and not reported. What a dead shim left behind is
    /// killed and removed; logs stay until [`ContainerRuntime::remove`].
    pub async fn adopt(&self) -> Result<Vec<Adopted>, Error> {
        let inner = self.inner.clone();
        let found = blocking(move || inner.find_all()).await?;
        let mut adopted = Vec::new();
        for (id, found) in found {
            let state = match found {
                Found::Gone => continue,
                Found::Done(state) => state,
                Found::Running { state, shim, init } => self.take_over(&id, &state, &shim, init)?,
            };
            adopted.push(Adopted { id, state });
        }
        Ok(adopted)
    }

    fn take_over(
        &self,
        id: &str,
        state: &ShimState,
        shim: &PidFd,
        init: PidFd,
    ) -> Result<AdoptedState, Error> {
        let process = Process::new(shim, self.inner.reaper.clone())
            .during(|| format!("watch the shim of container {id}"))?;
        let control = tokio::sync::Mutex::new(None);
        self.inner.insert(id, Handle { shim: process, init, control });
        Ok(AdoptedState::Running {
            pid: state.init.map_or(0, |init| init.pid),
            shim_pid: state.shim.pid,
            started_at: state.started_at.unwrap_or_default(),
        })
    }
}

impl Inner {
    fn find_all(&self) -> Result<Vec<(String, Found)>, Error> {
        let mut ids: BTreeSet<String> = ids_in(&self.options.containers_dir)?.into_iter().collect();
        // A container with data alone ran before the machine was started again.
        ids.extend(ids_in(&self.options.state_dir)?);
        let known: BTreeSet<String> = self.lock_handles().keys().cloned().collect();
        let unknown = ids.difference(&known);
        unknown.map(|id| Ok((id.clone(), self.find(id)?))).collect()
    }

    fn find(&self, id: &str) -> Result<Found, Error> {
        let (run, _) = self.dirs(id);
        let Ok(mut state) = read_json::<ShimState>(&run.state()) else {
            // Its shim never came to write its name down, so that it made nothing either, and finds
            // its socket closed should it still come to it.
            return self.find_ended(id);
        };
        if let Some(shim) = open_process(state.shim)? {
            if state.phase != Phase::Running && !shim_ends(&shim)? {
                // Either it was told to start a moment before its daemon went, or it hangs.
                match read_json::<ShimState>(&run.state()) {
                    Ok(newer) if newer.phase == Phase::Running => state = newer,
                    _ => kill_process(&shim)?,
                }
            }
            let init = state.init.map(open_process).transpose()?.flatten();
            if let (Phase::Running, Some(init)) = (state.phase, init)
                && open_process(state.shim)?.is_some()
            {
                return Ok(Found::Running { state, shim, init });
            }
            if state.phase == Phase::Running && !shim_ends(&shim)? {
                // Its container has ended and it does not come to say so.
                kill_process(&shim)?;
            }
        }
        self.find_ended(id)
    }

    /// A container without a shim.
    fn find_ended(&self, id: &str) -> Result<Found, Error> {
        match self.settle(id) {
            Ok(exit) => Ok(Found::Done(AdoptedState::Exited(exit))),
            Err(Error::Lost(_)) => Ok(Found::Done(AdoptedState::Lost)),
            Err(Error::NotFound(_)) => Ok(Found::Gone),
            Err(error) => Err(error),
        }
    }
}

/// Waits for a shim that is about to end.
fn shim_ends(shim: &PidFd) -> Result<bool, Error> {
    shim.wait_exit(Some(ABANDON_TIMEOUT)).during(|| "wait for a shim".into())
}
