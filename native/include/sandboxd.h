/* What the three faces of native/ share: the engine's extension (cffi), the cell's extension, the nursery executable.
 *
 * Convention: a function returns >= 0 on success and a negated errno on failure; it logs nothing and allocates nothing.
 */
#ifndef SANDBOXD_H
#define SANDBOXD_H

#include "kernel.h"

/* Where a set-up step stands. Python turns the number into words (sandboxd/kernel/stages.py); only append. */
enum sbx_stage {
    SBX_STAGE_NONE = 0,
    SBX_STAGE_CLONE = 1,     /* clone3 with the namespaces */
    SBX_STAGE_MAPS = 2,      /* waiting for the id maps, becoming the mapped root */
    SBX_STAGE_PRIVATE = 3,   /* mount propagation off */
    SBX_STAGE_ROOT = 4,      /* the tmpfs that becomes the root */
    SBX_STAGE_MOUNTS = 5,    /* what is put on it; detail = index of the operation */
    SBX_STAGE_PIVOT = 6,     /* pivot_root and letting go of the host's tree */
    SBX_STAGE_HOSTNAME = 7,
    SBX_STAGE_FDS = 8,       /* descriptors put in place, all others closed */
    SBX_STAGE_EXEC = 9,
    SBX_STAGE_TMPFS = 10,    /* the cell's own writable file systems */
    SBX_STAGE_PIPES = 11,
    SBX_STAGE_NETNS = 12,    /* making or entering the leased network namespace */
    SBX_STAGE_PROC = 13,
    SBX_STAGE_ATTACH = 14,   /* moving those file systems into place */
    SBX_STAGE_CGROUP = 15,   /* entering the leaf */
    SBX_STAGE_NAMESPACES = 16, /* joining what the init made */
    SBX_STAGE_CGROUPNS = 17,
    SBX_STAGE_SESSION = 18,
    SBX_STAGE_OOM = 19,
    SBX_STAGE_RLIMITS = 20,
    SBX_STAGE_IDS = 21,
    SBX_STAGE_CAPS = 22,
    SBX_STAGE_NNP = 23,
    SBX_STAGE_LANDLOCK = 24,
    SBX_STAGE_SECCOMP = 25,
    SBX_STAGE_REQUEST = 26,  /* a request that makes no sense */
    SBX_STAGE_THREADS = 27,  /* the zygote has more than one thread */
    SBX_STAGE_ORDINARY = 29, /* the caller's priorities and personality given up */
    SBX_STAGE_FORGO = 28,    /* a session keyring of its own; no user namespaces below */
};

/* The nursery's descriptors, as the engine's child places them (spawn.c) and the nursery finds them (nursery.c). */
enum sbx_nursery_fd {
    SBX_NURSERY_NULL = 0,
    SBX_NURSERY_OUT = 1, /* the engine's log, as is 2 */
    SBX_NURSERY_ERR = 2,
    SBX_NURSERY_ENGINE = 3,
    SBX_NURSERY_ZYGOTE = 4,
    SBX_NURSERY_OWNER = 5,
    SBX_NURSERY_PROGRAM = 6, /* until exec */
    SBX_NURSERY_REPORT = 7,  /* until exec */
    SBX_NURSERY_BROKER = 8,
};

/* Those of the same program when it only holds a user namespace. */
enum sbx_holder_fd { SBX_HOLDER_WAIT = 0, SBX_HOLDER_REPORT = 2 };

/* Parts of the step NAMESPACES that a test may leave out alone; bits of walls_down beside the stages'. */
enum sbx_wall { SBX_WALL_NETWORK = 48, SBX_WALL_IPC = 49, SBX_WALL_UTS = 50 };

/* What a child that failed says on its report descriptor: one write, far below PIPE_BUF. */
struct sbx_report {
    uint32_t stage;
    int32_t error;
    uint32_t detail;
};

/* With stage 0, from a zygote's first process: what it could not give up; the engine lists it as missing. */
#define SBX_KEPT_KEYRING 1
#define SBX_KEPT_USER_NAMESPACES 2

/* fd.c */
int sbx_close(int fd);
int sbx_close_from(unsigned int first);
void sbx_close_all(const int *fds, unsigned int count);
int sbx_move_fd(int from, int to);
int sbx_open_beneath(int dirfd, const char *path, uint64_t flags, uint32_t mode);
int sbx_pidfd_open(int pid);
int sbx_pidfd_kill(int pidfd, int sig);
int sbx_write_all(int fd, const void *data, size_t length);
int sbx_read_all(int fd, void *data, size_t length);
/* One SEQPACKET message with descriptors. recv: received descriptors are close-on-exec; a truncated message or
 * control block closes them all and is -EMSGSIZE; *nfds is room on entry, count on return. Returns the length, 0 on
 * end of file. */
long sbx_send_fds(int sock, const void *data, size_t length, const int *fds, unsigned int nfds);
long sbx_recv_fds(int sock, void *data, size_t room, int *fds, unsigned int *nfds);

/* mount.c */
struct sbx_op { /* one operation on the future root, as sandboxd/rootfs/plan.py encodes it; data follows */
    uint32_t kind, flags, mode, target_len, source_len, data_len;
};
enum sbx_op_kind { SBX_OP_DIR = 1, SBX_OP_FILE, SBX_OP_SYMLINK, SBX_OP_BIND, SBX_OP_TMPFS, SBX_OP_PROC };

int sbx_make_fs(const char *type, const char *options, uint64_t attrs);
int sbx_attach(int mount_fd, int dirfd, const char *path);
int sbx_new_root(void);
#define SBX_TREES 128
int sbx_open_trees(const unsigned char *ops, size_t length, int *trees, uint32_t *failed);
int sbx_build_root(int root, const unsigned char *ops, size_t length, const int *trees, uint32_t *failed);
int sbx_enter_root(int root);

/* ids.c */
#define SBX_RLIMITS 16
struct sbx_rlimit {
    uint32_t resource, pad;
    uint64_t soft, hard;
};

int sbx_become(uint32_t uid, uint32_t gid, int single_id);
int sbx_file_ids(uint32_t uid, uint32_t gid);
int sbx_drop_bounding(void);
int sbx_drop_caps(void);
int sbx_no_new_privs(void);
int sbx_set_rlimits(const struct sbx_rlimit *limits, unsigned int count);

/* broker.c, of the nursery's program only. A request is the head and a path with its NUL, one descriptor with it: a
 * directory of a cell. The answer is one struct, with one descriptor when something was opened. */
enum sbx_broker_operation { SBX_BROKER_OPEN = 1, SBX_BROKER_MKDIR = 2, SBX_BROKER_RENAME = 3 };
#define SBX_BROKER_ROOT 0xffffffffU /* owner: the namespace's root, with its rights over other ids' files */
#define SBX_BROKER_PATH 8192
struct sbx_broker_request {
    uint32_t operation, owner, mode, pad;
    uint64_t flags; /* of open(2): a few */
};
struct sbx_broker_answer {
    int32_t error; /* errno, or 0 */
};

_Noreturn void sbx_broker_main(int channel);

/* landlock.c */
int sbx_landlock_abi(void);
int sbx_landlock_seal(int abi);

/* seccomp.c */
struct sbx_filter { /* struct sock_fprog */
    uint16_t length; /* instructions */
    uint16_t pad[3];
    const void *program;
};
int sbx_seccomp_install(const struct sbx_filter *filter);

/* Messages: SOCK_SEQPACKET, fixed size, host byte order: all ends are of one build. The *id* is the engine's name for a
 * cell in all that is said about it.
 *
 *     engine -> nursery    sbx_make_request: make an init, then have the zygote fork the cell
 *     nursery -> engine    sbx_event MADE with descriptors, or REFUSED; later DEAD: the init, and so the pid namespace
 *     nursery -> zygote    sbx_fork_request with descriptors
 *     zygote -> engine     sbx_event REFUSED: no cell was forked; or, once, EXITED: the cell was, and is reaped;
 *                          once, where there is a warm-up, WARM
 */
struct sbx_cell_limits {
    uint32_t uid; /* within the user namespace; also the gid */
    uint32_t has_cgroup, ntasks, nlimits;
    uint32_t hurry; /* a run waits for it: no time to rehearse */
    uint32_t pad;
    struct sbx_rlimit limits[SBX_RLIMITS];
};

/* Carries the leaf's directory if has_cgroup, then ntasks descriptors of v1 tasks files. */
#define SBX_ENTRY_FDS 9
struct sbx_make_request {
    uint32_t id, slot;
    uint64_t workspace_bytes, workspace_files, tmp_bytes, tmp_files, shm_bytes, shm_files, code_bytes;
    struct sbx_cell_limits cell;
};

/* Carries: pidfd of the init, stdin, stdout, stderr, channel, then what sbx_make_request carried. */
#define SBX_FORK_FDS (5 + SBX_ENTRY_FDS)
struct sbx_fork_request {
    uint32_t id, pad;
    struct sbx_cell_limits cell;
};

enum sbx_event_kind {
    SBX_EVENT_MADE = 1,
    SBX_EVENT_REFUSED = 2,
    SBX_EVENT_DEAD = 3,
    SBX_EVENT_EXITED = 4,
    SBX_EVENT_WARM = 5,
};

/* MADE carries: pidfd of the init, mounts of /workspace, /tmp, /dev/shm and /code, the engine's ends of stdin, stdout,
 * stderr and of the cell's channel. REFUSED says where. EXITED says how: code and status as in siginfo_t. WARM is of no cell: those that
 * are forked from now on know what the warm-up touches. */
#define SBX_MADE_FDS 9
struct sbx_event {
    uint32_t kind, id;
    int32_t code, status;
    struct sbx_report report;
};

/* First packet on a cell's channel, sent by the cell itself. */
struct sbx_cell_hello {
    char magic[4]; /* "SBXC" */
    struct sbx_report report; /* stage 0: every wall is up */
};

#endif
