#!/bin/sh
# Runs a command with cargo and rustc on its PATH: under `sudo make …` they are in the home directory
# of the user who typed it.
set -eu
if ! command -v cargo >/dev/null; then
    owner_home=$(getent passwd "${SUDO_USER:-$(id -un)}" | cut -d: -f6)
    if [ -x "$owner_home/.cargo/bin/cargo" ]; then
        export PATH="$owner_home/.cargo/bin:$PATH"
        export CARGO_HOME="${CARGO_HOME:-$owner_home/.cargo}"
        export RUSTUP_HOME="${RUSTUP_HOME:-$owner_home/.rustup}"
    else
        echo "cargo is missing: install Rust as https://rustup.rs says, then try again" >&2
        exit 1
    fi
fi
exec "$@"
