# Makes a machine of the namespaces it starts in: everything of the host is there, and whatever is
# changed lasts until its end. Process 1 of the machine is this shell; it ends with its input.
# DIR: folder of the machine (root/ empty, srv/ lasting); NAME; PROGRAMS: put into /usr/sbin;
# PROC_DRBD: the status file is also to be /proc/drbd.
set -e
exec 2>&1
mount --make-rprivate /
mount -t tmpfs none "$DIR/root"
mkdir "$DIR/root/upper" "$DIR/root/work" "$DIR/root/all"
cd "$DIR/root"
mount -t overlay overlay -o "lowerdir=${LOWER:-/},upperdir=$PWD/upper,workdir=$PWD/work" all
cd all
mkdir -p proc sys run tmp dev srv
for name in run tmp dev; do mount -t tmpfs none $name; done
chmod 1777 tmp
mount --rbind /sys sys
for name in null zero full random urandom tty fuse loop-control loop0 loop1 loop2 loop3; do
    if [ -e /dev/$name ]; then cp -a /dev/$name dev/; fi
done
mkdir -p dev/pts dev/shm run/lock run/realproc run/newproc
mount -t tmpfs none dev/shm
ln -s /proc/self/fd dev/fd
mount --bind "$DIR/srv" srv
for program in $PROGRAMS; do
    file=usr/sbin/${program##*/}
    rm -f "$file"
    : >"$file"
    mount --bind "$program" "$file"
done
mkdir .old
pivot_root . .old
mount -t proc proc /proc
if [ -n "$PROC_DRBD" ]; then
    # procfs takes no new names: a folder of links into the real one does.
    mount -t proc proc /run/realproc
    mount -t tmpfs -o nr_inodes=0 none /run/newproc
    ln -s /run/realproc/[!0-9]* /run/realproc/{1..4000} /run/newproc/
    ln -s /run/drbd/proc-drbd /run/newproc/drbd
    mount --rbind /run/newproc /proc
fi
umount -l /.old
rmdir /.old
hostname "$NAME"
ip link set lo up
cd /
echo up
# Not exec: the shell waits for all orphans of the machine.
cat >/dev/null
