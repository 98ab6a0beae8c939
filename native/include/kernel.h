/* Structs and constants of the kernel that several files use, as x86-64 has them. Freestanding code has no other headers. */
#ifndef SANDBOXD_KERNEL_H
#define SANDBOXD_KERNEL_H

#include "syscall.h"

struct sbx_stat { /* struct stat, stat(2) */
    uint64_t dev, ino, nlink;
    uint32_t mode, uid, gid, pad;
    uint64_t rdev;
    int64_t size, rest[12];
};

struct sbx_statfs { /* struct statfs, statfs(2) */
    int64_t type, block_bytes;
    uint64_t blocks, blocks_free, blocks_available, files, files_free;
    int64_t rest[8];
};

struct sbx_sigaction { /* struct kernel_sigaction: all zero is the default action */
    uint64_t handler, flags, restorer, mask;
};

struct sbx_siginfo { /* siginfo_t of SIGCHLD, waitid(2) */
    int32_t signo, error, code, pad, pid;
    uint32_t uid;
    int32_t status, rest[25];
};

struct sbx_pollfd { /* struct pollfd, poll(2) */
    int fd;
    short events, revents;
};
#define SBX_POLLIN 1

/* rt_sigprocmask(2) */
#define SBX_SIG_BLOCK 0
#define SBX_SIG_UNBLOCK 1
#define SBX_SIG_SETMASK 2
#define SBX_SIGNALS 64
#define SBX_SIGSET_BYTES sizeof(uint64_t)

/* fcntl(2) */
#define SBX_F_GETFD 1
#define SBX_F_SETFD 2
#define SBX_FD_CLOEXEC 1
#define SBX_F_DUPFD_CLOEXEC 1030
#define SBX_F_ADD_SEALS 1033
#define SBX_SEALS_ALL 0xf /* SEAL, SHRINK, GROW, WRITE */

/* mmap(2), mprotect(2), madvise(2) */
#define SBX_PROT_READ 1
#define SBX_PROT_WRITE 2
#define SBX_PROT_EXEC 4
#define SBX_MAP_PRIVATE 0x02
#define SBX_MAP_FIXED 0x10
#define SBX_MAP_ANONYMOUS 0x20
#define SBX_MAP_NORESERVE 0x4000
#define SBX_MADV_DONTFORK 10
#define SBX_MADV_POPULATE_READ 22  /* 5.14 */
#define SBX_MADV_POPULATE_WRITE 23 /* 5.14 */

/* memfd_create(2) */
#define SBX_MFD_CLOEXEC 1
#define SBX_MFD_ALLOW_SEALING 2
#define SBX_MFD_NOEXEC_SEAL 8 /* 6.3 */

#define SBX_ARCH_GET_FS 0x1003 /* arch_prctl(2) */
#define SBX_RLIMIT_CORE 4      /* setrlimit(2) */
#define SBX_AF_UNIX 1          /* socketpair(2) */
#define SBX_SOCK_SEQPACKET 5

#endif
