#!/usr/bin/env bash
# Makes what the machines of test-vm.sh boot from: OUT/vmlinuz, OUT/initramfs and the disk OUT/disk, with
# the programs SKEP (its shared libraries too, where it has any) and busybox, and the FILEs in /root.
# KERNEL is a directory that kernel.sh made.
#
# Usage: image.sh KERNEL OUT SKEP FILE…
set -euo pipefail
kernel=$1 out=$2 skep=$3
shift 3
here=$(dirname "$0")

version=$(basename "$kernel"/lib/modules/*)
cp "$kernel/boot/vmlinuz-$version" "$out/vmlinuz"

# What mounts the disk.
first=$out/first
mkdir -p "$first"/{bin,dev,proc,root,sbin} "$first/lib/modules/$version/kernel/drivers/block"
cp "$(command -v busybox)" "$first/bin/busybox"
ln -s /bin/busybox "$first/sbin/modprobe"
cp -r "$kernel/lib/modules/$version/kernel/drivers/virtio" "$first/lib/modules/$version/kernel/drivers/"
cp "$kernel/lib/modules/$version/kernel/drivers/block/virtio_blk.ko" "$first/lib/modules/$version/kernel/drivers/block/"
busybox depmod -b "$first" "$version"
install "$here/initramfs.sh" "$first/init"
(cd "$first" && find . | cpio --quiet -o -H newc) >"$out/initramfs"

# The disk.
root=$out/root
mkdir -p "$root"/{bin,dev,etc,lib,proc,root,run,sbin,sys,tmp,usr/local/bin,var/lib}
cp "$(command -v busybox)" "$root/bin/busybox"
for applet in $(busybox --list); do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
ln -s /bin/busybox "$root/sbin/modprobe"
install "$here/init.sh" "$root/sbin/init"
install "$here/serve.sh" "$root/sbin/serve"
echo "root:x:0:0:root:/root:/bin/sh" >"$root/etc/passwd"
echo "root:x:0:" >"$root/etc/group"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
cp -r "$kernel/lib/modules" "$root/lib/modules"
strip -o "$root/usr/local/bin/skep" "$skep"
# A static program has no libraries to list.
for library in $(ldd "$skep" 2>/dev/null | grep -o '/[^ ]*'); do
    install -D "$library" "$root$library"
done
[ $# -eq 0 ] || cp "$@" "$root/root/"
truncate --size 2G "$out/disk"
mkfs.ext4 -q -E lazy_itable_init=0 -d "$root" "$out/disk"
rm -rf "$first" "$root"
