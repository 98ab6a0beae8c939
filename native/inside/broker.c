/* The broker: opens a cell's files for an engine that is not root of the host, and so may not.
 *
 * A process of its own inside the user namespace, forked by the nursery before anything else, for such engines only. It
 * owns one end of a channel to the engine and no other descriptor that leads anywhere; what it opens lies beneath the
 * directory that came with the request, by the rules of sbx_open_beneath(). With an owner it acts as that id, without
 * any right beyond the owner's; without one as the namespace's root, whose rights end at ids of this namespace: that is
 * how a file that a program made 0600, or 0000, is read when the program is dead.
 *
 * It reads fixed structs of the engine only, blocks on nothing but their arrival, and is in no cell's pid namespace. A
 * message that it does not understand is its end, and the nursery's with it.
 */
#include "sandboxd.h"

enum { CHANNEL = 3 };

/* linux/filter.h, linux/seccomp.h, linux/audit.h */
struct instruction {
    uint16_t code;
    uint8_t yes, no;
    uint32_t k;
};
#define LOAD(at) {0x20, 0, 0, (at)}                  /* BPF_LD | BPF_W | BPF_ABS */
#define IF_EQUAL(value, yes, no) {0x15, (yes), (no), (value)} /* BPF_JMP | BPF_JEQ | BPF_K */
#define RETURN(value) {0x06, 0, 0, (value)}          /* BPF_RET | BPF_K */
#define ALLOW 0x7fff0000U
#define KILL_PROCESS 0x80000000U
#define ARCH_X86_64 0xc000003eU

static const struct instruction filter[] = {
    LOAD(4 /* arch */),
    IF_EQUAL(ARCH_X86_64, 0, 11),
    LOAD(0 /* nr; x32's numbers have bit 30 set and match none */),
    IF_EQUAL(SBX_NR_recvmsg, 8, 0),
    IF_EQUAL(SBX_NR_sendmsg, 7, 0),
    IF_EQUAL(SBX_NR_close, 6, 0),
    IF_EQUAL(SBX_NR_openat2, 5, 0),
    IF_EQUAL(SBX_NR_mkdirat, 4, 0),
    IF_EQUAL(SBX_NR_renameat2, 3, 0),
    IF_EQUAL(SBX_NR_setfsuid, 2, 0),
    IF_EQUAL(SBX_NR_setfsgid, 1, 0),
    IF_EQUAL(SBX_NR_exit_group, 0, 1),
    RETURN(ALLOW),
    RETURN(KILL_PROCESS),
};

static _Noreturn void
quit(int status)
{
    for (;;)
        sbx_call(SBX_NR_exit_group, status);
}

/* Only what opening as root of the namespace and as an owner takes. */
static long
keep_few_caps(void)
{
    enum { DAC_OVERRIDE = 1, DAC_READ_SEARCH = 2, SETGID = 6, SETUID = 7 };
    const uint32_t few = 1U << DAC_OVERRIDE | 1U << DAC_READ_SEARCH | 1U << SETGID | 1U << SETUID;
    struct {
        uint32_t version;
        int32_t pid;
    } header = {.version = 0x20080522 /* _LINUX_CAPABILITY_VERSION_3 */};
    const uint32_t data[6] = {few, few, 0, 0, 0, 0}; /* effective, permitted, inheritable; then the upper halves */

    return sbx_call(SBX_NR_capset, &header, data);
}

static const uint64_t allowed_flags = SBX_O_WRONLY | SBX_O_CREAT | SBX_O_EXCL | SBX_O_NOFOLLOW | SBX_O_DIRECTORY;

/* The length of the path's first name, when it is one name and no more before the NUL. */
static int
is_name(const char *name)
{
    if (!name[0] || (name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]))))
        return 0;
    for (; *name; name++)
        if (*name == '/')
            return 0;
    return 1;
}

static long
make_directory(int directory, char *path, uint32_t mode)
{
    char *name = path;
    long parent, r;

    for (char *at = path; *at; at++)
        if (*at == '/')
            name = at + 1;
    if (!is_name(name))
        return -SBX_EINVAL;
    if (name == path) {
        parent = sbx_open_beneath(directory, ".", SBX_O_PATH | SBX_O_DIRECTORY, 0);
    } else {
        name[-1] = '\0';
        parent = sbx_open_beneath(directory, path, SBX_O_PATH | SBX_O_DIRECTORY, 0);
    }
    if (parent < 0)
        return parent;
    r = sbx_call(SBX_NR_mkdirat, parent, name, mode);
    sbx_close((int)parent);
    return r;
}

/* "old NUL new NUL": both names in the directory itself. */
static long
rename_in(int directory, const char *path, size_t length)
{
    size_t first = 0;
    long r, parent;

    while (first < length && path[first])
        first++;
    if (first + 1 >= length || !is_name(path) || !is_name(path + first + 1))
        return -SBX_EINVAL;
    parent = sbx_open_beneath(directory, ".", SBX_O_PATH | SBX_O_DIRECTORY, 0);
    if (parent < 0)
        return parent;
    r = sbx_call(SBX_NR_renameat2, parent, path, parent, path + first + 1, 1 /* RENAME_NOREPLACE */);
    sbx_close((int)parent);
    return r;
}

/* What became of one request: a descriptor or 0, or a negated errno. */
static long
perform(const struct sbx_broker_request *q, char *path, size_t length, int directory)
{
    const int owned = q->owner != SBX_BROKER_ROOT;
    long r;

    if (owned && sbx_file_ids(q->owner, q->owner) < 0) {
        if (sbx_file_ids(0, 0) < 0)
            quit(5);
        return -SBX_EPERM;
    }
    switch (q->operation) {
    case SBX_BROKER_OPEN:
        if (q->flags & ~allowed_flags || q->mode & ~0777U)
            r = -SBX_EINVAL;
        else
            r = sbx_open_beneath(directory, path, q->flags | SBX_O_NONBLOCK | SBX_O_NOCTTY, q->mode);
        break;
    case SBX_BROKER_MKDIR:
        r = q->mode & ~0777U ? -SBX_EINVAL : make_directory(directory, path, q->mode);
        break;
    case SBX_BROKER_RENAME:
        r = rename_in(directory, path, length);
        break;
    default:
        r = -SBX_EINVAL;
    }
    if (owned && sbx_file_ids(0, 0) < 0)
        quit(5); /* as an owner the next request would be refused what it may have */
    return r;
}

/* Never returns. *channel* is the engine's; the caller has set no_new_privs. */
_Noreturn void
sbx_broker_main(int channel)
{
    static struct {
        struct sbx_broker_request head;
        char path[SBX_BROKER_PATH];
    } request;
    const struct sbx_filter program = {.length = ARRAY_SIZE(filter), .program = filter};

    sbx_call(SBX_NR_prctl, SBX_PR_SET_NAME, "broker", 0, 0, 0);
    sbx_call(SBX_NR_umask, 0); /* modes are the engine's, to the letter */
    if (sbx_call(SBX_NR_setsid) < 0 || sbx_move_fd(channel, CHANNEL) < 0 || sbx_close_from(CHANNEL + 1) < 0 ||
        sbx_drop_bounding() < 0 || keep_few_caps() < 0 || sbx_seccomp_install(&program) < 0)
        quit(3);
    for (;;) {
        struct sbx_broker_answer answer = {0};
        unsigned int nfds = 1;
        int directory, fd;
        size_t length;
        long r, n = sbx_recv_fds(CHANNEL, &request, sizeof(request), &directory, &nfds);

        if (n == 0)
            quit(0); /* the engine is gone */
        if (n <= (long)sizeof(request.head) || nfds != 1)
            quit(4);
        length = (size_t)n - sizeof(request.head);
        if (request.path[length - 1] != '\0')
            quit(4);
        r = perform(&request.head, request.path, length, directory);
        sbx_close(directory);
        answer.error = r < 0 ? (int32_t)-r : 0;
        fd = r >= 0 && request.head.operation == SBX_BROKER_OPEN ? (int)r : -1;
        n = sbx_send_fds(CHANNEL, &answer, sizeof(answer), &fd, fd >= 0);
        sbx_close(fd);
        if (n < 0)
            quit(0);
    }
}
