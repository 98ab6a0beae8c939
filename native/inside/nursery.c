/* The nursery: pid 1 of a zygote's namespaces, and the maker of the inits.
 *
 * Theory of operation
 *   engine --exec--> nursery (pid 1 of the zygote's pid namespace, root of its user namespace)
 *     |-- zygote: the interpreter that forks cells (argv[1...])
 *     |-- broker: opens cells' files, for an engine that is not root of the host (broker.c); else there is none
 *     `-- init, one for each cell: pid 1 of the cell's pid namespace, with the cell's mount, ipc and uts namespaces and
 *         its file systems in place; without capabilities, under an id of its own, all descriptors closed, asleep.
 *
 * Descriptors: 0 /dev/null, 1 and 2 the engine's log, 3 the engine's channel, 4 the zygote's end of its channel to the
 * engine (only until the zygote runs), 5 a pidfd of the engine, 8 the broker's end of its channel to the engine (only
 * until the broker runs). When the engine is gone (end of file on 3, or 5 readable) or the zygote or the broker is, the
 * nursery exits, and the kernel takes every process of these pid namespaces with it.
 *
 * By the name of "one-id" it serves a namespace that maps a single id. Without arguments it is none, but holds a new user
 * namespace until the engine has mapped its ids (spawn.c).
 *
 * A request is served in one go: init made, the engine told, the zygote asked to fork the cell. Nobody waits here for the
 * fork, which takes longer: the next init is made beside it.
 *
 * Freestanding: no libc, no heap, no interpreter; what a fork of it copies is a few pages. It reads fixed structs from
 * the engine only; nothing that a tenant wrote comes here.
 */
#include "sandboxd.h"

enum {
    ENGINE = SBX_NURSERY_ENGINE,
    ZYGOTE = SBX_NURSERY_ZYGOTE,
    OWNER = SBX_NURSERY_OWNER,
    BROKER = SBX_NURSERY_BROKER,
};
enum { SLOTS = 8192, ZYGOTE_PID = 30011, INIT_ID = 1 };

static int netns_of[SLOTS]; /* descriptor + 1, by slot: leased to the slot's present cell, empty in between */
static int sockstat_of[SLOTS]; /* descriptor + 1 of its /proc/net/sockstat: how many sockets are left in it */
static int home_netns;
static int zygote_channel = -1;
static int single_id; /* no id but 0 is mapped: inits and cells are 0, too, without its rights */

/* The inits that live, by slot; a slot has one at a time. */
static struct {
    int32_t pid;
    uint32_t id;
} inits[SLOTS];
static uint32_t slots_used; /* none at or above this */

void *memset(void *to, int byte, size_t n);
void *memcpy(void *to, const void *from, size_t n);

void *
memset(void *to, int byte, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((volatile char *)to)[i] = (char)byte;
    return to;
}

void *
memcpy(void *to, const void *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((volatile char *)to)[i] = ((const char *)from)[i];
    return to;
}

static _Noreturn void
quit(int status)
{
    for (;;)
        sbx_call(SBX_NR_exit_group, status);
}

/* Append "key=number" and a comma to a mount option string. */
static char *
put_option(char *at, const char *key, uint64_t value, unsigned int base)
{
    char digits[24];
    int n = 0;

    while (*key)
        *at++ = *key++;
    do {
        digits[n++] = (char)('0' + value % base);
        value /= base;
    } while (value);
    while (n > 0)
        *at++ = digits[--n];
    *at++ = ',';
    *at = '\0';
    return at;
}

static int
make_tmpfs(uint64_t bytes, uint64_t files, uint32_t mode, uint32_t id)
{
    char options[160], *at = options;

    at = put_option(at, "size=", bytes, 10);
    at = put_option(at, "nr_inodes=", files, 10);
    at = put_option(at, "mode=", mode, 8);
    at = put_option(at, "uid=", id, 10);
    at = put_option(at, "gid=", id, 10);
    at[-1] = '\0';
    return sbx_make_fs("tmpfs", options, SBX_MOUNT_ATTR_NOSUID | SBX_MOUNT_ATTR_NODEV);
}

/* Whether no socket is left: those that were passed around in a circle outlive their processes until the kernel's
 * collector comes (unix_gc), and their abstract names could be read by the next run. The first line counts them. */
static int
is_empty(int sockstat)
{
    static const char none[] = "sockets: used 0\n";
    char text[sizeof(none)];
    long n = sbx_call(SBX_NR_pread64, sockstat, text, sizeof(none) - 1, 0);

    if (n != (long)sizeof(none) - 1)
        return 0;
    for (size_t i = 0; i < sizeof(none) - 1; i++)
        if (text[i] != none[i])
            return 0;
    return 1;
}

/* The slot's network namespace: made once, empty, owned by this user namespace; used by one cell at a time, and again
 * only after the cell's pid namespace is gone. */
static int
lease_netns(uint32_t slot)
{
    long r;
    int fd, stat;

    if (netns_of[slot]) {
        if (is_empty(sockstat_of[slot] - 1))
            return netns_of[slot] - 1;
        sbx_close(netns_of[slot] - 1);
        sbx_close(sockstat_of[slot] - 1);
        netns_of[slot] = sockstat_of[slot] = 0;
    }
    r = sbx_call(SBX_NR_unshare, SBX_CLONE_NEWNET);
    if (r < 0)
        return (int)r;
    fd = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/self/ns/net", SBX_O_RDONLY | SBX_O_CLOEXEC, 0);
    stat = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/self/net/sockstat", SBX_O_RDONLY | SBX_O_CLOEXEC, 0);
    r = sbx_call(SBX_NR_setns, home_netns, SBX_CLONE_NEWNET);
    if (r < 0)
        quit(1); /* half in a cell's namespace: nothing sane can follow */
    if (fd < 0 || stat < 0) {
        sbx_close(fd);
        sbx_close(stat);
        return fd < 0 ? fd : stat;
    }
    netns_of[slot] = fd + 1;
    sockstat_of[slot] = stat + 1;
    return fd;
}

struct init_plan {
    int workspace, tmp, shm, code, netns, report;
};

static _Noreturn void
init_fail(int fd, enum sbx_stage stage, long error)
{
    struct sbx_report report = {.stage = (uint32_t)stage, .error = (int32_t)-error};

    sbx_write_all(fd, &report, sizeof(report));
    quit(1);
}

/* pid 1 of the cell. Its set-up needs this user namespace's root; then it keeps nothing and sleeps. SIGCHLD ignored
 * means that the kernel reaps the orphans (wait(2), NOTES). Being pid 1 without handlers, it cannot be signalled from
 * inside; killing it from outside ends everything in the namespace. */
static _Noreturn void
init_main(const struct init_plan *plan)
{
    const struct sbx_sigaction ignore = {.handler = 1 /* SIG_IGN */};
    struct sbx_report done = {0};
    const struct {
        int fd;
        const char *path;
    } places[] = {
        {plan->workspace, "/workspace"}, {plan->tmp, "/tmp"}, {plan->shm, "/dev/shm"}, {plan->code, "/code"}};
    int proc;
    long r = sbx_call(SBX_NR_setns, plan->netns, SBX_CLONE_NEWNET);

    if (r < 0)
        init_fail(plan->report, SBX_STAGE_NETNS, r);
    for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
        r = sbx_attach(places[i].fd, SBX_AT_FDCWD, places[i].path);
        if (r < 0)
            init_fail(plan->report, SBX_STAGE_ATTACH, r);
    }
    proc = sbx_make_fs("proc", "subset=pid,hidepid=invisible",
                       SBX_MOUNT_ATTR_NOSUID | SBX_MOUNT_ATTR_NODEV | SBX_MOUNT_ATTR_NOEXEC);
    if (proc < 0)
        init_fail(plan->report, SBX_STAGE_PROC, proc);
    r = sbx_attach(proc, SBX_AT_FDCWD, "/proc");
    if (r < 0)
        init_fail(plan->report, SBX_STAGE_PROC, r);
    sbx_call(SBX_NR_rt_sigaction, SBX_SIGCHLD, &ignore, 0, SBX_SIGSET_BYTES);
    sbx_call(SBX_NR_setsid);
    r = sbx_move_fd(plan->report, 0);
    if (r < 0)
        init_fail(plan->report, SBX_STAGE_FDS, r);
    r = sbx_close_from(1);
    if (r < 0)
        init_fail(0, SBX_STAGE_FDS, r);
    r = single_id ? sbx_become(0, 0, 1) : sbx_become(INIT_ID, INIT_ID, 0);
    if (r < 0)
        init_fail(0, SBX_STAGE_IDS, r);
    r = sbx_drop_caps();
    if (r < 0)
        init_fail(0, SBX_STAGE_CAPS, r);
    sbx_call(SBX_NR_prctl, SBX_PR_SET_NAME, "init", 0, 0, 0);
    sbx_write_all(0, &done, sizeof(done));
    sbx_close(0);
    for (;;)
        sbx_call(SBX_NR_pause);
}

/* Descriptors of one cell before they go their two ways. */
enum cell_fd { INIT, WORKSPACE, TMP, SHM, CODE, IN_READ, IN_WRITE, OUT_READ, OUT_WRITE, ERR_READ, ERR_WRITE,
               CHANNEL_OURS, CHANNEL_CELL, CELL_FDS };

static int
make_streams(uint32_t id, int *fds)
{
    /* A pipe's inode belongs to the fsuid of its maker: the cell may open its own /dev/stderr again. */
    int r = sbx_file_ids(id, id);

    for (int i = IN_READ; i <= ERR_READ && r >= 0; i += 2)
        r = (int)sbx_call(SBX_NR_pipe2, &fds[i], SBX_O_CLOEXEC);
    if (sbx_file_ids(0, 0) < 0)
        quit(1); /* as a cell's id nothing that follows would be right */
    /* The engine's ends do not block it; each end of a pipe, and of a socket pair, has flags of its own. */
    for (int i = IN_WRITE; i <= ERR_READ && r >= 0; i++)
        if (i == IN_WRITE || i == OUT_READ || i == ERR_READ)
            r = (int)sbx_call(SBX_NR_fcntl, fds[i], 4 /* F_SETFL */, SBX_O_NONBLOCK);
    if (r >= 0)
        r = (int)sbx_call(SBX_NR_socketpair, SBX_AF_UNIX, SBX_SOCK_SEQPACKET | SBX_O_CLOEXEC, 0,
                          &fds[CHANNEL_OURS]);
    if (r >= 0)
        r = (int)sbx_call(SBX_NR_fcntl, fds[CHANNEL_OURS], 4 /* F_SETFL */, SBX_O_NONBLOCK);
    return r;
}

/* Make one init. Fills *fds* (CELL_FDS) on success; on failure the report says where and all is closed. */
static void
make_init(const struct sbx_make_request *q, struct sbx_report *report, int *fds)
{
    struct init_plan plan = {.workspace = -1, .tmp = -1, .shm = -1, .code = -1};
    const uint32_t id = q->cell.uid;
    int pidfd = -1, pipe[2] = {-1, -1};
    struct sbx_clone_args args = {
        .flags = SBX_CLONE_PIDFD | SBX_CLONE_NEWPID | SBX_CLONE_NEWNS | SBX_CLONE_NEWIPC | SBX_CLONE_NEWUTS,
        .pidfd = (uint64_t)(uintptr_t)&pidfd,
        .exit_signal = SBX_SIGCHLD,
    };
    enum sbx_stage stage = SBX_STAGE_REQUEST;
    long r = -SBX_EINVAL;

    for (int i = 0; i < CELL_FDS; i++)
        fds[i] = -1;
    if (q->slot >= SLOTS || (single_id ? id != 0 : id <= INIT_ID) || inits[q->slot].pid)
        goto fail;
    stage = SBX_STAGE_TMPFS;
    if ((r = plan.workspace = make_tmpfs(q->workspace_bytes, q->workspace_files, 0700, id)) < 0 ||
        (r = plan.tmp = make_tmpfs(q->tmp_bytes, q->tmp_files, 01777, id)) < 0 ||
        (r = plan.shm = make_tmpfs(q->shm_bytes, q->shm_files, 01777, id)) < 0 ||
        (r = plan.code = make_tmpfs(q->code_bytes, 64, 0755, 0)) < 0)
        goto fail;
    stage = SBX_STAGE_PIPES;
    if ((r = make_streams(id, fds)) < 0 || (r = sbx_call(SBX_NR_pipe2, pipe, SBX_O_CLOEXEC)) < 0)
        goto fail;
    stage = SBX_STAGE_NETNS;
    if ((r = plan.netns = lease_netns(q->slot)) < 0)
        goto fail;
    plan.report = pipe[1];
    stage = SBX_STAGE_CLONE;
    r = sbx_call(SBX_NR_clone3, &args, sizeof(args));
    if (r == 0)
        init_main(&plan);
    if (r < 0)
        goto fail;
    inits[q->slot].pid = (int32_t)r;
    inits[q->slot].id = q->id;
    if (slots_used <= q->slot)
        slots_used = q->slot + 1;
    fds[INIT] = pidfd;
    sbx_close(pipe[1]);
    pipe[1] = -1;
    r = sbx_read_all(pipe[0], report, sizeof(*report));
    if (r < 0) { /* died without a word, or so fast that none came */
        report->stage = SBX_STAGE_CLONE;
        report->error = (int32_t)-r;
    }
    stage = SBX_STAGE_NONE;
fail:
    if (stage != SBX_STAGE_NONE) {
        report->stage = (uint32_t)stage;
        report->error = (int32_t)-r;
    }
    fds[WORKSPACE] = plan.workspace;
    fds[TMP] = plan.tmp;
    fds[SHM] = plan.shm;
    fds[CODE] = plan.code;
    if (report->stage != SBX_STAGE_NONE) {
        if (pidfd >= 0) {
            sbx_pidfd_kill(pidfd, SBX_SIGKILL);
            inits[q->slot].pid = 0; /* refused is the last word on this cell */
        }
        for (int i = 0; i < CELL_FDS; i++)
            sbx_close(fds[i]);
    }
    sbx_close(pipe[0]);
    sbx_close(pipe[1]);
}

static void
event_send(enum sbx_event_kind kind, uint32_t id, const struct sbx_report *report, const int *fds, unsigned int nfds)
{
    struct sbx_event event = {.kind = kind, .id = id};

    if (report)
        event.report = *report;
    if (sbx_send_fds(ENGINE, &event, sizeof(event), fds, nfds) < 0)
        quit(1);
}

/* One request of the engine. */
static void
request_serve(void)
{
    struct sbx_make_request request;
    struct sbx_report report = {0};
    int entries[SBX_ENTRY_FDS], fds[CELL_FDS];
    unsigned int nentries = SBX_ENTRY_FDS;
    long n = sbx_recv_fds(ENGINE, &request, sizeof(request), entries, &nentries);

    if (n == -SBX_EAGAIN)
        return;
    if (n != (long)sizeof(request))
        quit(n == 0 ? 0 : 1); /* the engine is gone, or talks nonsense */
    make_init(&request, &report, fds);
    if (report.stage != SBX_STAGE_NONE) {
        event_send(SBX_EVENT_REFUSED, request.id, &report, 0, 0);
    } else {
        const int made[SBX_MADE_FDS] = {fds[INIT],     fds[WORKSPACE], fds[TMP],      fds[SHM],         fds[CODE],
                                        fds[IN_WRITE], fds[OUT_READ],  fds[ERR_READ], fds[CHANNEL_OURS]};
        int forked[SBX_FORK_FDS] = {fds[INIT], fds[IN_READ], fds[OUT_WRITE], fds[ERR_WRITE], fds[CHANNEL_CELL]};
        struct sbx_fork_request fork = {.id = request.id, .cell = request.cell};

        for (unsigned int i = 0; i < nentries; i++)
            forked[5 + i] = entries[i];
        event_send(SBX_EVENT_MADE, request.id, 0, made, SBX_MADE_FDS);
        if (sbx_send_fds(zygote_channel, &fork, sizeof(fork), forked, 5 + nentries) < 0)
            quit(2);
        for (int i = 0; i < CELL_FDS; i++)
            sbx_close(fds[i]);
    }
    for (unsigned int i = 0; i < nentries; i++)
        sbx_close(entries[i]);
}

/* Start the zygote under a pid that no cell's program has: libraries that notice a fork by getpid(2) (OpenSSL's random
 * generator) would otherwise see none, zygote and cell both being the second process of their namespaces. */
static int
start_zygote(char **argv, char **envp, int channel)
{
    static const char no_exec[] = "nursery: the interpreter cannot be executed\n";
    uint32_t tid = ZYGOTE_PID;
    struct sbx_clone_args args = {
        .exit_signal = SBX_SIGCHLD, .set_tid = (uint64_t)(uintptr_t)&tid, .set_tid_size = 1};
    uint64_t none = 0;
    long pid = sbx_call(SBX_NR_clone3, &args, sizeof(args));

    if (pid != 0)
        return (int)pid;
    sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &none, 0, SBX_SIGSET_BYTES);
    sbx_call(SBX_NR_setsid);
    if (sbx_move_fd(ZYGOTE, ENGINE) < 0 || sbx_move_fd(channel, ENGINE + 1) < 0 || sbx_close_from(ENGINE + 2) < 0)
        quit(126);
    sbx_call(SBX_NR_execve, argv[1], argv + 1, envp);
    sbx_write_all(2, no_exec, sizeof(no_exec) - 1);
    quit(127);
}

/* The engine's hands. Returns its pid. */
static int
start_broker(void)
{
    struct sbx_clone_args args = {.exit_signal = SBX_SIGCHLD};
    long pid = sbx_call(SBX_NR_clone3, &args, sizeof(args));
    if (pid == 0)
        sbx_broker_main(BROKER);
    sbx_close(BROKER);
    return (int)pid;
}

/* Reap whatever died. The zygote's death ends all, and the broker's; an init that could be reaped was the last of its
 * namespace. */
static void
reap(int signals, int zygote, int broker)
{
    char info[128];
    long pid;

    sbx_call(SBX_NR_read, signals, info, sizeof(info));
    while ((pid = sbx_call(SBX_NR_wait4, -1, 0, SBX_WNOHANG | SBX_WALL, 0)) > 0) {
        if (pid == zygote || pid == broker)
            quit(2);
        for (uint32_t slot = 0; slot < slots_used; slot++)
            if (inits[slot].pid == pid) {
                inits[slot].pid = 0;
                event_send(SBX_EVENT_DEAD, inits[slot].id, 0, 0, 0);
                break;
            }
    }
}

/* Until the engine closes its end of 0: this namespace is mapped by then, and held by the engine's descriptor. Executed,
 * it has no memory of the engine's, so it may be dumpable, as the owner of its /proc files has to be. */
static _Noreturn void
userns_hold(void)
{
    const struct sbx_report running = {0};
    char end;

    /* Told by itself: what closes at exec is closed before the process is dumpable. */
    sbx_write_all(SBX_HOLDER_REPORT, &running, sizeof(running));
    sbx_close(SBX_HOLDER_REPORT);
    while (sbx_call(SBX_NR_read, SBX_HOLDER_WAIT, &end, 1) == -SBX_EINTR)
        continue;
    quit(0);
}

__attribute__((used)) static _Noreturn void
nursery_main(long *stack)
{
    long argc = stack[0];
    char **argv = (char **)(stack + 1), **envp = argv + argc + 1;
    uint64_t sigchld = 1ULL << (SBX_SIGCHLD - 1);
    struct sbx_pollfd polls[3] = {
        {.fd = ENGINE, .events = SBX_POLLIN}, {.fd = OWNER, .events = SBX_POLLIN}, {.fd = -1, .events = SBX_POLLIN}};
    /* Asked before this process opens anything of its own. */
    const int with_broker = sbx_call(SBX_NR_fcntl, BROKER, SBX_F_GETFD) >= 0;
    int zygote, broker, pair[2];

    if (argc == 1)
        userns_hold();
    if (sbx_call(SBX_NR_prctl, SBX_PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        quit(3);
    sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &sigchld, 0, SBX_SIGSET_BYTES);
    polls[2].fd = (int)sbx_call(SBX_NR_signalfd4, -1, &sigchld, sizeof(uint64_t), SBX_O_NONBLOCK | SBX_O_CLOEXEC);
    home_netns = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/self/ns/net", SBX_O_RDONLY | SBX_O_CLOEXEC, 0);
    for (int fd = ENGINE; fd <= OWNER; fd++)
        sbx_call(SBX_NR_fcntl, fd, SBX_F_SETFD, SBX_FD_CLOEXEC);
    if (argc < 2 || polls[2].fd < 0 || home_netns < 0 || sbx_no_new_privs() < 0 ||
        sbx_call(SBX_NR_socketpair, SBX_AF_UNIX, SBX_SOCK_SEQPACKET | SBX_O_CLOEXEC, 0, pair) < 0)
        quit(3);
    single_id = argv[0][0] == 'o';
    zygote_channel = pair[0];
    broker = with_broker ? start_broker() : 0;
    if (broker < 0)
        quit(6);
    zygote = start_zygote(argv, envp, pair[1]);
    sbx_close(ZYGOTE);
    sbx_close(pair[1]);
    /* After the zygote is on its way: exec as root would otherwise find no capability to keep. */
    if (zygote < 0 || sbx_drop_bounding() < 0)
        quit(4);
    for (;;) {
        long n = sbx_call(SBX_NR_poll, polls, 3, -1);

        if (n < 0 && n != -SBX_EINTR)
            quit(5);
        if (polls[1].revents)
            quit(0);
        if (polls[2].revents)
            reap(polls[2].fd, zygote, broker);
        if (polls[0].revents)
            request_serve();
    }
}

__asm__(".text\n"
        ".globl _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call nursery_main\n"
        "    hlt\n");
