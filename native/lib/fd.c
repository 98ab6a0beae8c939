/* Descriptors: closing, passing, opening beneath a directory, pidfds. */
#include "sandboxd.h"

int
sbx_close(int fd)
{
    return fd < 0 ? 0 : (int)sbx_call(SBX_NR_close, fd);
}

/* close_range(2), Linux 5.9: everything from *first* on, in this process only. */
int
sbx_close_from(unsigned int first)
{
    return (int)sbx_call(SBX_NR_close_range, first, ~0U, 0);
}

/* Those that are not negative. */
void
sbx_close_all(const int *fds, unsigned int count)
{
    for (unsigned int i = 0; i < count; i++)
        sbx_close(fds[i]);
}

/* Put *from* at the number *to*, not close-on-exec, and close *from*. */
int
sbx_move_fd(int from, int to)
{
    long r;

    if (from == to) {
        r = sbx_call(SBX_NR_fcntl, from, 2 /* F_SETFD */, 0);
        return (int)r;
    }
    r = sbx_call(SBX_NR_dup2, from, to);
    if (r < 0)
        return (int)r;
    return sbx_close(from);
}

/* openat2(2), Linux 5.6; glibc has no wrapper. RESOLVE_BENEATH lets the kernel refuse "..", absolute symlinks and
 * magic links that leave dirfd; a check of ours would race with a rename. Returns a close-on-exec fd or -errno. */
int
sbx_open_beneath(int dirfd, const char *path, uint64_t flags, uint32_t mode)
{
    struct sbx_open_how how = {
        .flags = flags | SBX_O_CLOEXEC,
        .mode = mode,
        .resolve = SBX_RESOLVE_BENEATH | SBX_RESOLVE_NO_SYMLINKS | SBX_RESOLVE_NO_MAGICLINKS | SBX_RESOLVE_NO_XDEV,
    };

    return (int)sbx_call(SBX_NR_openat2, dirfd, path, &how, sizeof(how));
}

/* pidfd_open(2), Linux 5.3. */
int
sbx_pidfd_open(int pid)
{
    return (int)sbx_call(SBX_NR_pidfd_open, pid, 0);
}

/* pidfd_send_signal(2), Linux 5.1: never another process that got the number meanwhile. */
int
sbx_pidfd_kill(int pidfd, int sig)
{
    return (int)sbx_call(SBX_NR_pidfd_send_signal, pidfd, sig, 0, 0);
}

int
sbx_write_all(int fd, const void *data, size_t length)
{
    const char *at = data;

    while (length > 0) {
        long n = sbx_call(SBX_NR_write, fd, at, length);

        if (n == -SBX_EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? (int)n : -SBX_EIO;
        at += n;
        length -= (size_t)n;
    }
    return 0;
}

/* Read exactly *length* bytes. -EPIPE when the other end closed before that. */
int
sbx_read_all(int fd, void *data, size_t length)
{
    char *at = data;

    while (length > 0) {
        long n = sbx_call(SBX_NR_read, fd, at, length);

        if (n == -SBX_EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? (int)n : -SBX_EPIPE;
        at += n;
        length -= (size_t)n;
    }
    return 0;
}

/* sendmsg(2), recvmsg(2), cmsg(3), unix(7); layouts spelled out because a freestanding build has no sys/socket.h. */
struct iovec_ {
    const void *base;
    size_t length;
};

struct msghdr_ {
    void *name;
    uint32_t namelen, pad0;
    struct iovec_ *iov;
    size_t iovlen;
    void *control;
    size_t controllen;
    int32_t flags;
    uint32_t pad1;
};

struct cmsg_ {
    size_t length;
    int32_t level, type;
    int fds[32];
};

#define SOL_SOCKET_ 1
#define SCM_RIGHTS_ 1
#define MSG_CTRUNC_ 0x8
#define MSG_TRUNC_ 0x20
#define MSG_NOSIGNAL_ 0x4000
#define MSG_CMSG_CLOEXEC_ 0x40000000

long
sbx_send_fds(int sock, const void *data, size_t length, const int *fds, unsigned int nfds)
{
    struct iovec_ iov = {.base = data, .length = length};
    struct cmsg_ control;
    struct msghdr_ message = {.iov = &iov, .iovlen = 1};
    long n;

    if (nfds > ARRAY_SIZE(control.fds))
        return -SBX_EINVAL;
    if (nfds > 0) {
        control.length = offsetof(struct cmsg_, fds) + nfds * sizeof(int);
        control.level = SOL_SOCKET_;
        control.type = SCM_RIGHTS_;
        for (unsigned int i = 0; i < nfds; i++)
            control.fds[i] = fds[i];
        message.control = &control;
        message.controllen = (control.length + 7) & ~(size_t)7;
    }
    do
        n = sbx_call(SBX_NR_sendmsg, sock, &message, MSG_NOSIGNAL_);
    while (n == -SBX_EINTR);
    return n;
}

long
sbx_recv_fds(int sock, void *data, size_t room, int *fds, unsigned int *nfds)
{
    struct iovec_ iov = {.base = data, .length = room};
    struct cmsg_ control = {0};
    struct msghdr_ message = {.iov = &iov, .iovlen = 1, .control = &control, .controllen = sizeof(control)};
    unsigned int got = 0, want = *nfds;
    long n;

    do
        n = sbx_call(SBX_NR_recvmsg, sock, &message, MSG_CMSG_CLOEXEC_);
    while (n == -SBX_EINTR);
    *nfds = 0;
    if (n < 0)
        return n;
    if (message.controllen >= offsetof(struct cmsg_, fds) && control.level == SOL_SOCKET_ &&
        control.type == SCM_RIGHTS_)
        got = (unsigned int)((control.length - offsetof(struct cmsg_, fds)) / sizeof(int));
    if (got > want || (message.flags & (MSG_CTRUNC_ | MSG_TRUNC_))) {
        for (unsigned int i = 0; i < got; i++)
            sbx_close(control.fds[i]);
        return -SBX_EMSGSIZE;
    }
    for (unsigned int i = 0; i < got; i++)
        fds[i] = control.fds[i];
    *nfds = got;
    return n;
}
