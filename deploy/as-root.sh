#!/bin/sh
# Runs a command as root: as it is when that is so already, through sudo otherwise. The environment
# stays, and with it the user's Rust, which is in the user's home directory.
set -eu
if [ "$(id -u)" -eq 0 ]; then
    exec "$@"
fi
if ! command -v sudo >/dev/null; then
    echo "this needs root, and there is no sudo here: run it as root" >&2
    exit 1
fi
exec sudo --preserve-env env "PATH=$PATH" "CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}" \
    "RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}" "$@"
