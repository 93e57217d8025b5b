//! Panics of the thread that simulates: tasks and runtimes catch them, and none may be overlooked.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

static HOOK: Once = Once::new();

/// Remembers the first panic of each thread from now on.
pub(crate) fn watch() {
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            FIRST.with_borrow_mut(|first| {
                first.get_or_insert_with(|| panic.to_string());
            });
            before(panic);
        }));
    });
    drop(take());
}

/// The first panic of this thread since it was asked for the last time.
pub(crate) fn take() -> Option<String> {
    FIRST.take()
}
