//! Processors that have more to do than they can.

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Of each processor; at normal priority, a daemon gets a third of one while it wants all of it.
const N_THREADS_PER_CORE: usize = 2;

/// Threads that do nothing but work, until this is dropped.
#[derive(Debug)]
pub struct Busy {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// Saturates all processors of this machine.
    pub fn start() -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let is_over = Arc::new(AtomicBool::new(false));
        let start = |_| {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    spin_loop();
                }
            })
        };
        let threads = (0..N_THREADS_PER_CORE * n_cores).map(start).collect();
        Self { is_over, threads }
    }

    /// How many threads there are.
    pub fn n_threads(&self) -> usize {
        self.threads.len()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic; and a panic here would hide another.
            let _ = thread.join();
        }
    }
}
