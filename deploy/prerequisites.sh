#!/bin/sh
# Installs what building and testing need and this machine has not; does nothing where nothing is
# missing. Rust itself comes from rustup: rust-toolchain.toml names the version.
set -eu
cd "$(dirname "$0")"
missing=""
need() { # PACKAGE CHECK…: the package is missing unless the check succeeds
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
# Root's programs are not on every user's PATH.
PATH="$PATH:/usr/sbin:/sbin"
has_static_busybox() {
    busybox=$(command -v busybox) && ! ldd "$busybox"
}
has_static_seccomp() {
    [ -e /usr/include/seccomp.h ] && ls /usr/lib/*/libseccomp.a /usr/lib/libseccomp.a 2>/dev/null | grep -q .
}
need build-essential command -v cc
need libseccomp-dev has_static_seccomp
need busybox-static has_static_busybox
need iproute2 command -v ip
need nftables command -v nft
need iptables command -v iptables-nft
need curl command -v curl
need ca-certificates [ -d /etc/ssl/certs ]
need procps command -v ps
# The long tests run beside a Docker Engine.
[ "${SKEP_TEST_LONG-}" != 1 ] || need docker.io command -v dockerd
# `make test-vm` runs virtual machines.
if [ "${SKEP_TEST_VM-}" = 1 ]; then
    need qemu-system-x86 command -v qemu-system-x86_64
    need cpio command -v cpio
    need e2fsprogs command -v mkfs.ext4
    need util-linux command -v unshare
fi

[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "please install, under the names your distribution has for them:$missing" >&2
    exit 1
fi
echo "installing:$missing" >&2
install() { ./as-root.sh env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2; }
# A machine without fresh lists fails at first; the lists are fetched only then.
# shellcheck disable=SC2086 # one word a package
install $missing || { ./as-root.sh apt-get update -qq >&2 && install $missing; }
