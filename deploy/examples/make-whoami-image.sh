#!/bin/sh
# Compiles whoami into a static program and packs it as a root file system for `skep image import`.
#
# Usage: make-whoami-image.sh OUT.tar
#
# Needs rustc and GNU tar. The archive has no times and no owners of this machine in it: the same
# compiler makes the same archive, and so the same image, everywhere.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 OUT.tar" >&2
    exit 2
fi
out=$1
examples=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir "$work/root" "$work/root/tmp"
rustc --edition 2024 -O -C target-feature=+crt-static -C strip=symbols \
    --remap-path-prefix "$examples=." -o "$work/root/whoami" "$examples/whoami/whoami.rs"
chmod 755 "$work/root" "$work/root/whoami"
chmod 1777 "$work/root/tmp"

tar --create --file "$work/out.tar" --directory "$work/root" --format ustar --sort name \
    --mtime @0 --owner 0 --group 0 --numeric-owner .
mv "$work/out.tar" "$out"

echo "$out is ready. Next:" >&2
echo "  skep image import --change 'ENTRYPOINT [\"/whoami\"]' $out whoami:latest" >&2
