#!/bin/busybox sh
# The first process of the machine, on busybox alone. Of the host it sees its files, read-only, and the directory of this
# run, which it may write to: there is run.conf, and there it leaves the exit status.
set -e
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do [ ! -e "$module" ] || insmod "$module"; done
mount -t 9p -o "ro,cache=loose,$SHARED" host /host
mount -t 9p -o "$SHARED" run /run
. /run/run.conf

# The host's files, and above them what is gone with the machine.
mount -t tmpfs -o size=75% memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root
[ -z "$MODULES" ] || {
    modules=usr/lib/modules/$(uname -r)
    mkdir -p "/root/$modules"
    mount --bind "/host$MODULES/lib/modules/$(uname -r)" "/root/$modules"
}

cd /root
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o nosuid,nodev,noexec sys sys
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 sys/fs/cgroup
mount -t securityfs -o nosuid,nodev,noexec securityfs sys/kernel/security
mount -t bpf -o nosuid,nodev,noexec bpf sys/fs/bpf
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm dev/mqueue
mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 shm dev/shm
mount -t mqueue -o nosuid,nodev,noexec mqueue dev/mqueue
mount -t tmpfs -o nosuid,nodev,mode=755 run run
ln -s /proc/self/fd dev/fd
mkdir run/corral-vm
mount --move /run run/corral-vm
# overlayfs takes no upper directory on itself: what tests write lies on a disk.
mount -t ext4 -o relatime,discard /dev/vda var/tmp
chmod 1777 var/tmp
for module in $LOAD; do chroot . modprobe "$module" || :; done
echo corral-vm > proc/sys/kernel/hostname
ip link set lo up
[ -z "$SYSTEMD" ] || {
    mkdir -p run/systemd/system
    cp run/corral-vm/corral-vm.* run/systemd/system
    : > etc/fstab
    exec switch_root /root /usr/lib/systemd/systemd --unit=corral-vm.target
}
exec switch_root /root /bin/sh /run/corral-vm/command
