//! Connections that all are refused, one after the other and as fast as that goes: what becomes of another one passed
//! by the rules that lead to those who refuse.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

/// What became of them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Refused {
    pub(crate) count: u64,
    /// How many were not, by how they ended.
    pub(crate) others: BTreeMap<String, u64>,
}

impl Refused {
    /// Asserts that all were, and that they were many enough for so many changes of the rules.
    #[track_caller]
    pub(crate) fn assert_all(&self, n_changes: u32) {
        println!("{} connections in {n_changes} changes", self.count);
        assert!(self.others.is_empty(), "of {} connections: {:?}", self.count, self.others);
        assert!(self.count > u64::from(n_changes), "only {}", self.count);
    }
}

/// A thread that connects until its end.
#[derive(Debug)]
pub(crate) struct Storm {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Refused>,
}

impl Storm {
    pub(crate) fn begin(address: SocketAddr) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let until = is_over.clone();
        let thread = std::thread::spawn(move || run(address, &until));
        Self { is_over, thread }
    }

    pub(crate) fn end(self) -> Refused {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("what became of each")
    }
}

fn run(address: SocketAddr, is_over: &AtomicBool) -> Refused {
    let mut refused = Refused::default();
    while !is_over.load(Ordering::Relaxed) {
        let end = match TcpStream::connect(address) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                refused.count += 1;
                continue;
            }
            Err(error) => format!("{:?}", error.kind()),
            Ok(_) => "connected".to_owned(),
        };
        *refused.others.entry(end).or_default() += 1;
    }
    refused
}
