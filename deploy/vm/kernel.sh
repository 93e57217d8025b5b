#!/usr/bin/env bash
# Has Debian's kernel for virtual machines in a directory, and prints which: its package is unpacked below
# CACHE and installed nowhere.
#
# Usage: kernel.sh CACHE
set -euo pipefail
cache=$1
mkdir -p "$cache"

kernel_package() {
    apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p'
}
download() { apt-get download -qq -o APT::Sandbox::User=root "$package" >&2; }

package=$(kernel_package)
[ -n "$package" ] || { apt-get update -qq >&2 && package=$(kernel_package); }
[ -n "$package" ] || { echo "the package lists have no linux-image-cloud-amd64: use Debian's" >&2; exit 1; }
kernel=$cache/$package
if [ ! -e "$kernel" ]; then
    # Made aside, so that another run finds it whole or not at all.
    new=$(mktemp -d "$cache/new.XXXXXX")
    chmod 755 "$new"
    (
        cd "$new"
        download || { apt-get update -qq >&2 && download; }
        dpkg -x ./*.deb tree
        busybox depmod -b tree "${package#linux-image-}"
    )
    mv --no-target-directory "$new/tree" "$kernel" || [ -e "$kernel" ]
    rm -rf "$new"
fi
echo "$kernel"
