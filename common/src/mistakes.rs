//! Mistakes that tests plant, one at a time, to see that they are caught.
//!
//! The code asks [`is`] at the place where the mistake would be made. Outside of tests the answer is always
//! no, and nothing of this is left in the program. What checks for violations does not look here.

/// One mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mistake {
    /// A task's state is allowed to fall.
    StateFalls,
    /// A node follows a leader whose term is over.
    DeposedAssignment,
    /// An address is given up before the container that has it has stopped.
    AddressFreedEarly,
    /// A new leader places tasks that have a node.
    PlacedTwice,
    /// A node is given a secret whose task it refused.
    SecretToRefused,
    /// A task is stopped before the nodes balance to it no more.
    DrainWithoutWait,
    /// A manager says that a write is durable before it is.
    AcknowledgedEarly,
    /// A manager answers a read with what it has, and asks no majority.
    StaleRead,
    /// A leader whose term is over still writes.
    DeposedWrite,
    /// A leader counts a manager that was taken out towards its majority.
    RemovedCounted,
    /// A manager is called a worker, and the others go on counting its vote.
    RetiredEarly,
    /// A manager writes for a user what another manager does not understand.
    LevelIgnored,
}

impl Mistake {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::StateFalls,
        Self::DeposedAssignment,
        Self::AddressFreedEarly,
        Self::PlacedTwice,
        Self::SecretToRefused,
        Self::DrainWithoutWait,
        Self::AcknowledgedEarly,
        Self::StaleRead,
        Self::DeposedWrite,
        Self::RemovedCounted,
        Self::RetiredEarly,
        Self::LevelIgnored,
    ];
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Mistake>> = const { std::cell::Cell::new(None) };
}

/// Whether this mistake is to be made on this thread.
#[cfg(any(test, feature = "testing"))]
pub fn is(mistake: Mistake) -> bool {
    PLANTED.get() == Some(mistake)
}

/// Whether this mistake is to be made: never.
#[cfg(not(any(test, feature = "testing")))]
pub const fn is(_mistake: Mistake) -> bool {
    false
}

/// Has `work` make a mistake, on this thread alone, until it returns or panics.
#[cfg(any(test, feature = "testing"))]
pub fn plant<T>(mistake: Mistake, work: impl FnOnce() -> T) -> T {
    struct Planted(Option<Mistake>);
    impl Drop for Planted {
        fn drop(&mut self) {
            PLANTED.set(self.0);
        }
    }
    let _before = Planted(PLANTED.replace(Some(mistake)));
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_made_by_its_thread_alone_and_only_while_it_is_planted() {
        for mistake in Mistake::ALL {
            assert!(!is(mistake));
            plant(mistake, || {
                let made = Mistake::ALL.into_iter().filter(|one| is(*one));
                assert_eq!(made.collect::<Vec<_>>(), [mistake]);
                assert!(!std::thread::spawn(move || is(mistake)).join().unwrap());
            });
            assert!(std::panic::catch_unwind(|| plant(mistake, || panic!("on purpose"))).is_err());
            assert!(!is(mistake));
        }
    }
}
