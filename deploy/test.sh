#!/bin/sh
# Builds the workspace once, as whoever calls it, and runs all tests; the test programs themselves
# run as root, since they make namespaces. Arguments go to `cargo test`.
set -eu
cd "$(dirname "$0")/.."
deploy/prerequisites.sh
# `skep` is built before the tests that start it, and by the same build.
deploy/with-rust.sh cargo build --workspace --all-targets
exec deploy/with-rust.sh cargo test --workspace --config "target.'cfg(unix)'.runner=['$PWD/deploy/as-root.sh']" "$@"
