//! Dedicated threads for work that blocks on netlink or enters another network namespace.

use std::fmt;

use tokio::sync::{mpsc, oneshot};

use super::Error;

/// Jobs that may wait for one thread. Each is one call of this node's agent, which awaits it.
const QUEUE_MAX: usize = 256;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A thread that owns a state and runs jobs on it, one after the other.
///
/// Dropping the handle ends the thread after the jobs that are queued.
pub struct KernelThread<S> {
    name: &'static str,
    jobs: mpsc::Sender<Job<S>>,
}

impl<S> fmt::Debug for KernelThread<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelThread").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<S: Send + 'static> KernelThread<S> {
    /// Starts a thread in the network namespace of the calling thread; `init` makes its state
    /// there, along with what the caller wants to know of it.
    pub async fn start<T, F>(name: &'static str, init: F) -> Result<(Self, T), Error>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<(S, T), Error> + Send + 'static,
    {
        let (sender, mut jobs) = mpsc::channel::<Job<S>>(QUEUE_MAX);
        let (answer, ready) = oneshot::channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut state = match init() {
                Ok((state, report)) => {
                    drop(answer.send(Ok(report)));
                    state
                }
                Err(error) => return drop(answer.send(Err(error))),
            };
            while let Some(job) = jobs.blocking_recv() {
                job(&mut state);
            }
        });
        thread.map_err(|e| Error::kernel(format!("start the thread {name}"), e))?;
        let report = ready.await.map_err(|_| Error::ThreadGone { name })??;
        Ok((Self { name, jobs: sender }, report))
    }

    /// Runs `job` on the thread and returns what it returned.
    ///
    /// The job runs to its end also when the caller stops waiting for it.
    pub async fn run<T, F>(&self, job: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut S) -> T + Send + 'static,
    {
        let gone = || Error::ThreadGone { name: self.name };
        let (answer, result) = oneshot::channel();
        let job: Job<S> = Box::new(move |state| drop(answer.send(job(state))));
        self.jobs.send(job).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_run_in_order_on_one_state() {
        let thread = KernelThread::start("test-jobs", || Ok((Vec::new(), ()))).await.unwrap().0;
        for n in 0..5 {
            thread.run(move |state: &mut Vec<i32>| state.push(n)).await.unwrap();
        }
        assert_eq!(thread.run(|state| state.clone()).await.unwrap(), [0, 1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn a_thread_that_panicked_is_reported() {
        let thread = KernelThread::start("test-panic", || Ok(((), ()))).await.unwrap().0;
        let result = thread.run(|()| panic!("expected by this test")).await;
        assert!(matches!(result, Err::<(), _>(Error::ThreadGone { name: "test-panic" })));
        assert!(thread.run(|()| ()).await.is_err());
    }

    #[tokio::test]
    async fn a_state_that_cannot_be_made_is_an_error() {
        let init = || Err::<((), ()), _>(Error::MarkField { shift: 21 });
        let result = KernelThread::start("test-init", init).await;
        assert!(matches!(result, Err(Error::MarkField { shift: 21 })));
    }
}
