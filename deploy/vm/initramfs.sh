#!/bin/busybox sh
# The first program of a machine of test-vm.sh: mounts its disk and hands over to the init that is there.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox modprobe virtio_pci
/bin/busybox modprobe virtio_blk
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount -t devtmpfs dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root -c /dev/console /root /sbin/init
