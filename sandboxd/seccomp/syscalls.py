"""The x86-64 system calls: every name and number that the kernel ever assigned.

Our own table because the libraries lag behind: libseccomp 2.5.4 knows nothing after 5.17, and a name that cannot be
resolved must never be dropped from a filter. Numbers are the kernel's promise to user space and never change, so new
ones are added at the end, with the kernel version that brought them.

Source: arch/x86/entry/syscalls/syscall_64.tbl, the "common" and "64" entries. The x32 twins (512 to 547) are left out:
without bit 30 they are no calls of this ABI, with it the filter kills.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NAMES", "NEWEST", "NUMBERS", "SINCE", "X32_BIT", "nearest"]

X32_BIT: Final = 0x40000000
"""__X32_SYSCALL_BIT: set in the number of every call of the x32 ABI."""

# In the order of their numbers, ten to a paragraph of the table; the second block begins at 424 because the
# architectures agreed to number alike from there on (Linux 5.1).
_FROM_0: Final = """
    read write open close stat fstat lstat poll lseek mmap
    mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv
    writev access pipe select sched_yield mremap msync mincore madvise shmget
    shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid
    sendfile socket connect accept sendto recvfrom sendmsg recvmsg shutdown bind
    listen getsockname getpeername socketpair setsockopt getsockopt clone fork vfork execve
    exit wait4 kill uname semget semop semctl shmdt msgget msgsnd
    msgrcv msgctl fcntl flock fsync fdatasync truncate ftruncate getdents getcwd
    chdir fchdir rename mkdir rmdir creat link unlink symlink readlink
    chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo
    times ptrace getuid syslog getgid setuid setgid geteuid getegid setpgid
    getppid getpgrp setsid setreuid setregid getgroups setgroups setresuid getresuid setresgid
    getresgid getpgid setfsuid setfsgid getsid capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo
    rt_sigsuspend sigaltstack utime mknod uselib personality ustat statfs fstatfs sysfs
    getpriority setpriority sched_setparam sched_getparam sched_setscheduler sched_getscheduler
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock
    munlock mlockall munlockall vhangup modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex
    setrlimit chroot sync acct settimeofday mount umount2 swapon swapoff reboot
    sethostname setdomainname iopl ioperm create_module init_module delete_module get_kernel_syms query_module
    quotactl
    nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead setxattr lsetxattr
    fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr
    fremovexattr
    tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup io_destroy io_getevents
    io_submit
    io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old remap_file_pages
    getdents64 set_tid_address restart_syscall
    semtimedop fadvise64 timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime
    clock_gettime clock_getres
    clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy get_mempolicy
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key
    request_key
    keyctl ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat
    mknodat
    fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat
    pselect6 ppoll unshare set_robust_list get_robust_list splice tee sync_file_range vmsplice move_pages
    utimensat epoll_pwait signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4
    signalfd4
    eventfd2 epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg
    fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg
    setns getcpu
    process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp
    getrandom memfd_create
    kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect
    pkey_alloc pkey_free statx io_pgetevents rseq uretprobe uprobe
"""

_FROM_424: Final = """
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount
    fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2
    process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule
    landlock_restrict_self memfd_secret process_mrelease futex_waitv
    set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount
    listmount lsm_get_self_attr
    lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat removexattrat open_tree_attr
    file_getattr file_setattr
    listns rseq_slice_yield
"""


def _numbered() -> dict[str, int]:
    blocks = ((0, _FROM_0), (424, _FROM_424))
    return {name: number for first, block in blocks for number, name in enumerate(block.split(), first)}


NUMBERS: Final[Mapping[str, int]] = MappingProxyType(_numbered())
"""Name to number."""

NAMES: Final[Mapping[int, str]] = MappingProxyType({number: name for name, number in NUMBERS.items()})
"""Number to name."""

NEWEST: Final = max(NAMES)
"""The highest number in this table; what lies above it is unknown here and answers ENOSYS."""

SINCE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "epoll_pwait2": "5.11",
        "mount_setattr": "5.12",
        "landlock_create_ruleset": "5.13",
        "landlock_add_rule": "5.13",
        "landlock_restrict_self": "5.13",
        "quotactl_fd": "5.14",
        "memfd_secret": "5.14",
        "process_mrelease": "5.15",
        "futex_waitv": "5.16",
        "set_mempolicy_home_node": "5.17",
        "cachestat": "6.5",
        "fchmodat2": "6.6",
        "map_shadow_stack": "6.6",
        "futex_wake": "6.7",
        "futex_wait": "6.7",
        "futex_requeue": "6.7",
        "statmount": "6.8",
        "listmount": "6.8",
        "lsm_get_self_attr": "6.8",
        "lsm_set_self_attr": "6.8",
        "lsm_list_modules": "6.8",
        "mseal": "6.10",
        "uretprobe": "6.11",
        "setxattrat": "6.13",
        "getxattrat": "6.13",
        "listxattrat": "6.13",
        "removexattrat": "6.13",
        "open_tree_attr": "6.15",
        "file_getattr": "6.17",
        "file_setattr": "6.17",
        "uprobe": "6.18",
        "listns": "6.19",
        "rseq_slice_yield": "7.0",
    }
)
"""The kernel version that brought a call, for those after 5.10."""


def nearest(name: str) -> str | None:
    """The known name most like *name*, for an error message; None when nothing is like it."""
    import difflib  # only errors need it

    found = difflib.get_close_matches(name, NUMBERS, n=1, cutoff=0.6)
    return found[0] if found else None
