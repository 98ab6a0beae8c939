/* Raw system calls and the constants that older headers lack.
 *
 * Everything in native/ calls the kernel through sbx_call(): it returns the kernel's own answer, a negated errno on
 * failure, touches no libc state and so is as good between clone and exec, in a freestanding executable and in a child
 * that shares no thread with anybody. x86-64 only: another architecture needs another sbx_call() and nothing else here.
 */
#ifndef SANDBOXD_SYSCALL_H
#define SANDBOXD_SYSCALL_H

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || defined(__ILP32__)
#error "sandboxd supports x86-64 only"
#endif

static inline long
sbx_call6(long nr, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* Missing arguments are zero; pointers and integers are both taken. */
#define SBX_ARG(x) ((long)(x))
#define SBX_CALL_7(nr, a, b, c, d, e, f, ...) \
    sbx_call6((nr), SBX_ARG(a), SBX_ARG(b), SBX_ARG(c), SBX_ARG(d), SBX_ARG(e), SBX_ARG(f))
#define sbx_call(...) SBX_CALL_7(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

/* Numbers, x86-64 (arch/x86/entry/syscalls/syscall_64.tbl). Kernel versions where newer than 5.0. */
enum sbx_nr {
    SBX_NR_read = 0,
    SBX_NR_write = 1,
    SBX_NR_close = 3,
    SBX_NR_poll = 7,
    SBX_NR_mmap = 9,
    SBX_NR_mprotect = 10,
    SBX_NR_munmap = 11,
    SBX_NR_rt_sigaction = 13,
    SBX_NR_rt_sigprocmask = 14,
    SBX_NR_pread64 = 17,
    SBX_NR_madvise = 28,
    SBX_NR_dup2 = 33,
    SBX_NR_pause = 34,
    SBX_NR_sendmsg = 46,
    SBX_NR_recvmsg = 47,
    SBX_NR_socketpair = 53,
    SBX_NR_execve = 59,
    SBX_NR_wait4 = 61,
    SBX_NR_fcntl = 72,
    SBX_NR_ftruncate = 77,
    SBX_NR_chdir = 80,
    SBX_NR_fchdir = 81,
    SBX_NR_umask = 95,
    SBX_NR_setsid = 112,
    SBX_NR_setgroups = 116,
    SBX_NR_setresuid = 117,
    SBX_NR_setresgid = 119,
    SBX_NR_setfsuid = 122,
    SBX_NR_setfsgid = 123,
    SBX_NR_capset = 126,
    SBX_NR_personality = 135,
    SBX_NR_fstatfs = 138,
    SBX_NR_getpriority = 140,
    SBX_NR_setpriority = 141,
    SBX_NR_sched_setscheduler = 144,
    SBX_NR_pivot_root = 155,
    SBX_NR_prctl = 157,
    SBX_NR_arch_prctl = 158,
    SBX_NR_mount = 165,
    SBX_NR_umount2 = 166,
    SBX_NR_sethostname = 170,
    SBX_NR_exit_group = 231,
    SBX_NR_waitid = 247,
    SBX_NR_keyctl = 250,
    SBX_NR_ioprio_set = 251,
    SBX_NR_openat = 257,
    SBX_NR_mkdirat = 258,
    SBX_NR_newfstatat = 262,
    SBX_NR_symlinkat = 266,
    SBX_NR_unshare = 272,
    SBX_NR_timerfd_create = 283,
    SBX_NR_timerfd_settime = 286,
    SBX_NR_timerfd_gettime = 287,
    SBX_NR_signalfd4 = 289,
    SBX_NR_dup3 = 292,
    SBX_NR_pipe2 = 293,
    SBX_NR_prlimit64 = 302,
    SBX_NR_setns = 308,
    SBX_NR_renameat2 = 316,
    SBX_NR_seccomp = 317,
    SBX_NR_getrandom = 318,
    SBX_NR_memfd_create = 319,
    SBX_NR_execveat = 322,
    SBX_NR_pidfd_send_signal = 424, /* 5.1 */
    SBX_NR_open_tree = 428,         /* 5.2 */
    SBX_NR_move_mount = 429,        /* 5.2 */
    SBX_NR_fsopen = 430,            /* 5.2 */
    SBX_NR_fsconfig = 431,          /* 5.2 */
    SBX_NR_fsmount = 432,           /* 5.2 */
    SBX_NR_pidfd_open = 434,        /* 5.3 */
    SBX_NR_clone3 = 435,            /* 5.3 */
    SBX_NR_close_range = 436,       /* 5.9 */
    SBX_NR_openat2 = 437,           /* 5.6 */
    SBX_NR_mount_setattr = 442,     /* 5.12 */
    SBX_NR_landlock_create_ruleset = 444, /* 5.13 */
    SBX_NR_landlock_add_rule = 445,       /* 5.13 */
    SBX_NR_landlock_restrict_self = 446,  /* 5.13 */
};

/* Errors that the code itself looks at. */
enum sbx_errno {
    SBX_EPERM = 1,
    SBX_EINTR = 4,
    SBX_EIO = 5,
    SBX_EAGAIN = 11,
    SBX_ENOENT = 2,
    SBX_EACCES = 13,
    SBX_EBUSY = 16,
    SBX_EINVAL = 22,
    SBX_EROFS = 30,
    SBX_EPIPE = 32,
    SBX_ENAMETOOLONG = 36,
    SBX_ENOSYS = 38,
    SBX_EPROTO = 71,
    SBX_EMSGSIZE = 90,
};

#define SBX_AT_FDCWD (-100)
#define SBX_AT_SYMLINK_NOFOLLOW 0x100
#define SBX_AT_EMPTY_PATH 0x1000
#define SBX_AT_RECURSIVE 0x8000

#define SBX_O_RDONLY 0
#define SBX_O_WRONLY 01
#define SBX_O_CREAT 0100
#define SBX_O_EXCL 0200
#define SBX_O_NOCTTY 0400
#define SBX_O_NONBLOCK 04000
#define SBX_O_DIRECTORY 0200000
#define SBX_O_NOFOLLOW 0400000
#define SBX_O_CLOEXEC 02000000
#define SBX_O_PATH 010000000

/* clone3(2), setns(2), unshare(2) */
#define SBX_CLONE_FILES 0x00000400UL
#define SBX_CLONE_PIDFD 0x00001000UL
#define SBX_CLONE_PARENT 0x00008000UL
#define SBX_CLONE_NEWNS 0x00020000UL
#define SBX_CLONE_CHILD_CLEARTID 0x00200000UL
#define SBX_CLONE_CHILD_SETTID 0x01000000UL
#define SBX_CLONE_NEWCGROUP 0x02000000UL
#define SBX_CLONE_NEWUTS 0x04000000UL
#define SBX_CLONE_NEWIPC 0x08000000UL
#define SBX_CLONE_NEWUSER 0x10000000UL
#define SBX_CLONE_NEWPID 0x20000000UL
#define SBX_CLONE_NEWNET 0x40000000UL
#define SBX_CLONE_INTO_CGROUP 0x200000000ULL /* 5.7 */

struct sbx_clone_args { /* linux/sched.h, struct clone_args, 88 bytes since 5.7 */
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

/* mount API */
#define SBX_MOUNT_ATTR_RDONLY 0x1
#define SBX_MOUNT_ATTR_NOSUID 0x2
#define SBX_MOUNT_ATTR_NODEV 0x4
#define SBX_MOUNT_ATTR_NOEXEC 0x8
#define SBX_OPEN_TREE_CLONE 1
#define SBX_MOVE_MOUNT_F_EMPTY_PATH 0x4
#define SBX_FSOPEN_CLOEXEC 1
#define SBX_FSMOUNT_CLOEXEC 1
#define SBX_FSCONFIG_SET_STRING 1
#define SBX_FSCONFIG_CMD_CREATE 6
#define SBX_MS_REC 16384
#define SBX_MS_PRIVATE (1 << 18)
#define SBX_MNT_DETACH 2

struct sbx_mount_attr { /* linux/mount.h */
    uint64_t attr_set, attr_clr, propagation, userns_fd;
};

/* openat2(2) */
#define SBX_RESOLVE_NO_XDEV 0x01
#define SBX_RESOLVE_NO_MAGICLINKS 0x02
#define SBX_RESOLVE_NO_SYMLINKS 0x04
#define SBX_RESOLVE_BENEATH 0x08

struct sbx_open_how { /* linux/openat2.h */
    uint64_t flags, mode, resolve;
};

/* prctl(2) */
#define SBX_PR_SET_DUMPABLE 4
#define SBX_PR_SET_NAME 15
#define SBX_PR_CAPBSET_DROP 24
#define SBX_PR_SET_NO_NEW_PRIVS 38
#define SBX_PR_GET_NO_NEW_PRIVS 39
#define SBX_PR_GET_TID_ADDRESS 40
#define SBX_PR_CAP_AMBIENT 47
#define SBX_PR_CAP_AMBIENT_CLEAR_ALL 4

/* seccomp(2) */
#define SBX_SECCOMP_SET_MODE_FILTER 1

#define SBX_SIGKILL 9
#define SBX_SIGCHLD 17
#define SBX_P_ALL 0
#define SBX_WNOHANG 1
#define SBX_WEXITED 4
#define SBX_WALL 0x40000000

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#endif
