"""Reading and writing what is not the cell's. BAIT is a directory of the host's in a bound tree (bait.py)."""

from __future__ import annotations

from tests.attacks.base import Attack

_HOST = "the mount namespace holds nothing of the host's but what is bound, and cannot be taken down"
_BOUND = {"read-only": "EROFS", "landlock": "EACCES"}

ATTACKS = (
    Attack("host-shadow", "the host's passwords", 'open("/etc/shadow")', "ENOENT", why=_HOST),
    Attack(
        "host-marker", "a file that everybody on the host may read", 'open(os.environ["MARKER"])', "ENOENT", why=_HOST
    ),
    Attack(
        "host-marker-dotdot",
        "the same from every open descriptor upwards",
        """
        for fd in range(64):
            try:
                os.open("../" * 40 + os.environ["MARKER"].lstrip("/"), os.O_RDONLY, dir_fd=fd)
            except OSError:
                continue
            return
        raise Refused("nowhere")
        """,
        "nowhere",
        {"fds": "nowhere", "landlock": "nowhere"},
    ),
    Attack(
        "host-marker-self-root",
        "the same through /proc/self/root",
        'open("/proc/self/root" + os.environ["MARKER"])',
        "ENOENT",
        why=_HOST,
    ),
    Attack(
        "root-of-init",
        "the root of pid 1",
        'os.listdir("/proc/1/root")',
        "ENOENT",
        {"ids": "ENOENT", "caps": "ENOENT", "landlock": "ENOENT"},
    ),
    Attack(
        "overwrite-nursery",
        "the program of pid 1, for writing (CVE-2019-5736)",
        'os.open("/proc/1/exe", os.O_WRONLY)',
        "ENOENT",
        {"ids": "ENOENT", "caps": "ENOENT", "landlock": "ENOENT"},
        opens=("EPERM", "ETXTBSY"),
    ),
    Attack(
        "overwrite-interpreter",
        "the interpreter, for writing",
        'os.open("/proc/self/exe", os.O_WRONLY)',
        "EACCES",
        why="its owner is not mapped: see bait-write for the other walls",
    ),
    Attack(
        "write-usr",
        "a file in /usr",
        'open("/usr/x", "w")',
        "EROFS",
        why="its owner is not mapped: see bait-create for the other walls",
    ),
    Attack(
        "write-package",
        "the directory of the cell's own program",
        'open("/sandboxd/x.py", "w")',
        "EROFS",
        why="its owner is not mapped: see bait-create",
    ),
    Attack(
        "write-site-packages",
        "a module for the next run",
        'import site; open(site.getsitepackages()[0] + "/x.pth", "w")',
        "EROFS",
        why="its owner is not mapped: see bait-create",
    ),
    Attack(
        "write-root",
        "a file in /",
        'open("/x", "w")',
        "EROFS",
        why="the root is sealed read-only by the nursery's set-up, before anything runs",
    ),
    Attack(
        "write-etc",
        "another user",
        'open("/etc/passwd", "a")',
        "EACCES",
        why="the root is sealed read-only by the nursery's set-up, before anything runs",
        single_id="EROFS",
    ),
    Attack(
        "write-code",
        "a module beside the program",
        'open("/code/sitecustomize.py", "w")',
        "EACCES",
        {"ids": "EACCES", "landlock": "EACCES"},
    ),
    Attack(
        "replace-code",
        "the program's own source",
        'os.chmod("/code/main.py", 0o666)',
        "EPERM",
        {"ids": "EPERM"},
        single_id="done",
    ),
    Attack(
        "bait-write", "a file that everybody may write", 'os.open(BAIT + "/open.txt", os.O_WRONLY)', "EROFS", _BOUND
    ),
    Attack("bait-truncate", "empty it", 'os.truncate(BAIT + "/open.txt", 0)', "EROFS", _BOUND),
    Attack(
        "bait-create",
        "a new file where everybody may make one",
        'open(BAIT + "/open/new", "w").close(); os.unlink(BAIT + "/open/new")',
        "EROFS",
        _BOUND,
    ),
    Attack(
        "bait-directory",
        "a new directory there",
        'os.mkdir(BAIT + "/open/dir"); os.rmdir(BAIT + "/open/dir")',
        "EROFS",
        _BOUND,
    ),
    Attack(
        "bait-symlink",
        "a new symlink there",
        'os.symlink("/etc", BAIT + "/open/link"); os.unlink(BAIT + "/open/link")',
        "EROFS",
        _BOUND,
    ),
    Attack(
        "bait-fifo",
        "a new fifo there",
        'os.mkfifo(BAIT + "/open/fifo"); os.unlink(BAIT + "/open/fifo")',
        "EROFS",
        _BOUND,
    ),
    Attack(
        "bait-rename",
        "rename there",
        'os.rename(BAIT + "/open/a", BAIT + "/open/b"); os.rename(BAIT + "/open/b", BAIT + "/open/a")',
        "EROFS",
        _BOUND,
    ),
    Attack(
        "bait-link",
        "a second name for the host's file",
        'os.link(BAIT + "/open.txt", BAIT + "/open/hard"); os.unlink(BAIT + "/open/hard")',
        "EROFS",
        _BOUND,
    ),
    Attack(
        "bait-times",
        "its times, which no path rule covers",
        'os.utime(BAIT + "/open.txt")',
        "EROFS",
        {"read-only": "EROFS"},
    ),
    Attack(
        "bait-attribute",
        "an extended attribute",
        'os.setxattr(BAIT + "/open.txt", "user.x", b"1"); os.removexattr(BAIT + "/open.txt", "user.x")',
        "ENOTSUP",
        {"seccomp": "ENOTSUP", "read-only": "EROFS"},
    ),
    Attack(
        "bait-write-fifo",
        "talk to a host's process through its fifo: read-only does not cover it",
        'os.open(BAIT + "/fifo", os.O_WRONLY | os.O_NONBLOCK)',
        "EACCES",
        {"landlock": "EACCES"},
        opens=("ENXIO",),
    ),
    Attack(
        "bait-secret",
        "a file of the host's root",
        'open(BAIT + "/secret.txt")',
        "EACCES",
        why="its owner is not mapped, so even the mapped root is a stranger to it",
        single_id="done",
    ),
    Attack("bait-symlink-out", "a symlink to the host's passwords", 'open(BAIT + "/shadow")', "ENOENT", why=_HOST),
    Attack(
        "bait-device",
        "a device node in a bound tree",
        'open(BAIT + "/null")',
        "EACCES",
        why="every bound tree is nodev, and that of a user namespace for good",
    ),
    Attack(
        "hard-link-out",
        "a host's file in the workspace",
        'os.link("/usr/bin/env", "/tmp/env")',
        "EXDEV",
        why="another file system",
    ),
    Attack(
        "make-device",
        "a device node of one's own",
        'os.mknod("/tmp/sda", stat.S_IFBLK | 0o666, os.makedev(8, 0))',
        "EPERM",
        why="devices need a capability over the host; the filter says the same",
    ),
    Attack(
        "rename-across",
        "a file into another place by rename",
        'open("/tmp/x", "w").close(); os.rename("/tmp/x", "/dev/shm/x")',
        "EXDEV",
        why="another file system",
    ),
    Attack(
        "block-device",
        "the host's disk",
        'open("/dev/vda")',
        "ENOENT",
        why="there is no such device in the cell's /dev",
    ),
    Attack(
        "memory-device",
        "the machine's memory",
        'open("/dev/mem")',
        "ENOENT",
        why="there is no such device in the cell's /dev",
    ),
    Attack("kvm", "the hypervisor", 'open("/dev/kvm")', "ENOENT", why="there is no such device in the cell's /dev"),
    Attack(
        "fuse",
        "a file system in user space",
        'open("/dev/fuse")',
        "ENOENT",
        why="there is no such device in the cell's /dev",
    ),
    Attack("docker-socket", "the container engine's socket", 'open("/var/run/docker.sock")', "ENOENT", why=_HOST),
    Attack(
        "large-file",
        "a file beyond file_bytes",
        'fd = os.open("/tmp/x", os.O_CREAT | os.O_WRONLY); os.ftruncate(fd, 10 << 30)',
        "EFBIG",
        {"rlimits": "EFBIG"},
    ),
    Attack(
        "many-descriptors",
        "more descriptors than open_files",
        "kept = [os.dup(0) for _ in range(300)]",
        "EMFILE",
        {"rlimits": "EMFILE"},
    ),
    Attack(
        "leaked-directory",
        "a directory of the host's among the descriptors (CVE-2024-21626)",
        """
        for name in os.listdir("/proc/self/fd"):
            path = "/proc/self/fd/" + name
            if int(name) > 3 and os.path.isdir(path) and not os.readlink(path).startswith("/proc/"):
                return
        raise Refused("none")
        """,
        "none",
        {"fds": "none"},
        absent=("none",),
    ),
    Attack(
        "leaked-descriptors",
        "anything but the streams and the channel",
        """
        here = os.open("/proc/self/fd", os.O_RDONLY)
        if sorted(int(name) for name in os.listdir(here) if int(name) not in (here, here + 1)) == [0, 1, 2, 3]:
            raise Refused("none")
        """,
        "none",
        {"fds": "none"},
    ),
    Attack(
        "leave-cgroup",
        "write to a cgroup file through a leaked descriptor",
        """
        for fd in range(4, 64):
            try:
                os.write(fd, b"0")
            except OSError:
                continue
            return
        raise OSError(errno.EBADF, "none")
        """,
        "EBADF",
        {"fds": "EBADF"},
    ),
)
