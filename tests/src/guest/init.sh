#!/bin/busybox sh
# First process of the guest. The command line says what to load and which addresses to take:
# drbdrs.name=NAME drbdrs.modules=A,B drbdrs.net=IFACE:ADDRESS/BITS,...
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
mkdir -p /run/lock /run/drbdrs /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
value() { sed -n "s/.*drbdrs\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
hostname "$(value name)"
for module in virtio_blk virtio_net $(value modules | tr , ' '); do
    modprobe "$module" || echo "init: cannot load $module" >/dev/console
done
ip link set lo up
# Only connected networks: without a default route a cut link does not lead around itself.
for net in $(value net | tr , ' '); do
    ip link set "${net%%:*}" up
    ip addr add "${net#*:}" dev "${net%%:*}"
done
# The kernel's log is read on demand; the console carries panics.
echo 1 >/proc/sys/kernel/printk
nc -ll -p 2222 -e /usr/sbin/guest-agent &
echo "guest-ready $(uname -r)" >/dev/ttyS0
while :; do sleep 1000; done
