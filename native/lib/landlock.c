/* Landlock, the second wall around files: read and execute everywhere, write only where the cell's own tmpfs is. It
 * still holds when a mount or a descriptor leaked into the tree. Documentation/userspace-api/landlock.rst. */
#include "sandboxd.h"

enum {
    FS_EXECUTE = 1 << 0,
    FS_WRITE_FILE = 1 << 1,
    FS_READ_FILE = 1 << 2,
    FS_READ_DIR = 1 << 3,
    FS_REMOVE_DIR = 1 << 4,
    FS_REMOVE_FILE = 1 << 5,
    FS_MAKE_CHAR = 1 << 6,
    FS_MAKE_DIR = 1 << 7,
    FS_MAKE_REG = 1 << 8,
    FS_MAKE_SOCK = 1 << 9,
    FS_MAKE_FIFO = 1 << 10,
    FS_MAKE_BLOCK = 1 << 11,
    FS_MAKE_SYM = 1 << 12,
    FS_REFER = 1 << 13,     /* ABI 2, 5.19 */
    FS_TRUNCATE = 1 << 14,  /* ABI 3, 6.2 */
    FS_IOCTL_DEV = 1 << 15, /* ABI 5, 6.10 */
    /* ABI 9, 7.1: connect(2), and sendmsg(2) with an address, to a pathname socket that was made outside the domain. */
    FS_RESOLVE_UNIX = 1 << 16,
};
/* Flags of landlock_restrict_self(2), ABI 7, 6.15. By default, and where the host's audit is on, every denial is a record
 * until the program calls execve(2), which a cell need not do: one loop floods the host's log. The first flag keeps this
 * domain's denials out; the second those of domains that a program makes on top of it, whatever flags it gives. */
enum {
    LOG_SAME_EXEC_OFF = 1 << 0,
    LOG_SUBDOMAINS_OFF = 1 << 2,
};
#define FS_READ (FS_EXECUTE | FS_READ_FILE | FS_READ_DIR)
#define FS_ABI1 0x1fff
#define FS_OWN (FS_ABI1 | FS_REFER | FS_TRUNCATE | FS_RESOLVE_UNIX)
#define FS_DEVICES (FS_MAKE_CHAR | FS_MAKE_BLOCK | FS_IOCTL_DEV)

struct ruleset_attr {
    uint64_t fs;     /* ABI 1 */
    uint64_t net;    /* ABI 4, 6.7: TCP bind and connect */
    uint64_t scoped; /* ABI 6, 6.12: abstract sockets and signals */
};

struct path_beneath {
    uint64_t access;
    int32_t parent_fd;
} __attribute__((packed));

static const struct {
    const char *path;
    uint32_t access;
} rules[] = {
    {"/", FS_READ},
    {"/workspace", FS_OWN},
    {"/tmp", FS_OWN},
    {"/dev/shm", FS_OWN},
    {"/dev/null", FS_READ_FILE | FS_WRITE_FILE | FS_TRUNCATE},
    {"/dev/zero", FS_READ_FILE | FS_WRITE_FILE | FS_TRUNCATE},
    {"/dev/full", FS_READ_FILE | FS_WRITE_FILE | FS_TRUNCATE},
    {"/dev/random", FS_READ_FILE},
    {"/dev/urandom", FS_READ_FILE},
};

/* The running kernel's ABI, or -errno (ENOSYS: not built in, EOPNOTSUPP: off at boot). */
int
sbx_landlock_abi(void)
{
    return (int)sbx_call(SBX_NR_landlock_create_ruleset, 0, 0, 1 /* LANDLOCK_CREATE_RULESET_VERSION */);
}

/* Restrict this thread. Every right above that *abi* knows is handled, so what is not granted below is refused. */
int
sbx_landlock_seal(int abi)
{
    struct ruleset_attr attr = {.fs = FS_ABI1};
    size_t size = sizeof(attr.fs);
    long r;
    int ruleset;

    if (abi < 1)
        return -SBX_ENOSYS;
    if (abi >= 2)
        attr.fs |= FS_REFER;
    if (abi >= 3)
        attr.fs |= FS_TRUNCATE;
    if (abi >= 4) {
        attr.net = 3;
        size = offsetof(struct ruleset_attr, scoped);
    }
    if (abi >= 5)
        attr.fs |= FS_IOCTL_DEV;
    if (abi >= 6) {
        attr.scoped = 3;
        size = sizeof(attr);
    }
    if (abi >= 9)
        attr.fs |= FS_RESOLVE_UNIX;
    ruleset = (int)sbx_call(SBX_NR_landlock_create_ruleset, &attr, size, 0);
    if (ruleset < 0)
        return ruleset;
    r = 0;
    for (size_t i = 0; i < ARRAY_SIZE(rules) && r >= 0; i++) {
        struct path_beneath rule = {.access = rules[i].access & attr.fs & ~(uint64_t)FS_DEVICES};

        rule.parent_fd = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, rules[i].path, SBX_O_PATH | SBX_O_CLOEXEC, 0);
        if (rule.parent_fd < 0) {
            r = rule.parent_fd;
            break;
        }
        r = sbx_call(SBX_NR_landlock_add_rule, ruleset, 1 /* LANDLOCK_RULE_PATH_BENEATH */, &rule, 0);
        sbx_close(rule.parent_fd);
    }
    if (r >= 0)
        r = sbx_call(SBX_NR_landlock_restrict_self, ruleset, abi >= 7 ? LOG_SAME_EXEC_OFF | LOG_SUBDOMAINS_OFF : 0);
    sbx_close(ruleset);
    return (int)r;
}
