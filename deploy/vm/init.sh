#!/bin/sh
# The init of a machine of test-vm.sh: the mounts that systemd would make, the network, the daemon.
#
# The kernel's command line has `skep.hostname`, `skep.address` and, separated by commas, `skep.without` for
# modules that the machine is not to have. Modules come as they do on other
# machines: the kernel asks modprobe for what is used, and nothing is loaded in advance but the card.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mount -t tmpfs -o nosuid,nodev,mode=755 run /run
mount -t tmpfs -o nosuid,nodev,mode=1777 tmp /tmp
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm /dev/net
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev shm /dev/shm
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
echo "/sbin/modprobe" >/proc/sys/kernel/modprobe

without=
for word in $(cat /proc/cmdline); do
    case $word in
    skep.hostname=*) hostname "${word#*=}" ;;
    skep.address=*) address=${word#*=} ;;
    skep.without=*) without=${word#*=} ;;
    esac
done
# A kernel that was built without these.
for module in $(echo "$without" | tr , ' '); do
    find /lib/modules -name "$module.ko" -exec rm {} +
done
[ -z "$without" ] || depmod
modprobe virtio_net
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up

nc -ll -p 1 -e /sbin/serve &
# A daemon that ends is started again, as by its unit.
while true; do
    skep daemon
    echo "the daemon ended with exit code $?"
    sleep 2
done
