/* sandboxd.inside._cell: the spawn path of a zygote, and the walls of a cell. Limited API, no cffi, so that one object
 * serves every interpreter from 3.11 on that an operator names.
 *
 * serve() is the zygote's whole life after warming: it forks a cell for each init that the nursery made, reaps those that
 * end, and returns only in a cell, sealed. The zygote has one thread (checked before each fork) and reads fixed structs
 * of the nursery only. Descriptors: 3 to the engine, 4 to the nursery.
 *
 * The filter is in two layers, whose more restrictive answer counts: prepare() installs the one that every cell inherits,
 * which still lets through what a fork and a cell's set-up need; the cell adds the short rest as its last step.
 *
 * In the cell, between clone3 and the return into Python, the steps of steps[] run in their order as the root of the
 * zygote's user namespace, without touching Python: at-fork hooks of libraries run afterwards, when every wall is up.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>

#include "sandboxd.h"

enum { CHANNEL = 3, FIRST_FREE = 4 };

static struct {
    struct sbx_filter filter; /* the cell's own layer */
    uint64_t tid_address;     /* where glibc keeps the thread id */
    int landlock_abi;
    int prepared;
    uint64_t walls_down; /* bit = enum sbx_stage or below; only tests of the walls themselves set any */
} seal;

/* The cells that were forked and not reaped yet: what the kernel calls them, and what the engine does. In memory that no
 * cell inherits. */
enum { CELLS = 8192 };
static struct {
    int32_t pid;
    uint32_t id;
} *cells;
static unsigned int ncells;

/* mmap(2), and MADV_DONTFORK of madvise(2). */
static long
make_table(void)
{
    const size_t size = CELLS * sizeof(*cells);
    long r;

    if (cells)
        return 0;
    r = sbx_call(SBX_NR_mmap, 0, size, SBX_PROT_READ | SBX_PROT_WRITE, SBX_MAP_PRIVATE | SBX_MAP_ANONYMOUS,
                 -1, 0);
    if (r < 0)
        return r;
    cells = (void *)(uintptr_t)r;
    return sbx_call(SBX_NR_madvise, cells, size, SBX_MADV_DONTFORK);
}


static int
is_down(int wall)
{
    return (int)(seal.walls_down >> wall & 1);
}

struct cell_plan {
    const struct sbx_cell_limits *request;
    int init, stdio[3], channel, tasks_from;
    const int *fds;
};

/* cgroup v1: writing 0 moves the writer, and moving oneself skips the lock that moving another takes. The descriptors
 * were opened by the engine, whose credentials count (cgroup1_procs_write). On v2 clone3 has put us there already. */
static int
enter_cgroup(const struct cell_plan *plan)
{
    for (unsigned int i = 0; i < plan->request->ntasks; i++) {
        int r = sbx_write_all(plan->fds[(unsigned int)plan->tasks_from + i], "0", 1);

        if (r < 0)
            return r;
    }
    return 0;
}

/* setns(2) with a pidfd, Linux 5.8: all of the init's namespaces at once, root and cwd with them. */
static int
join_namespaces(const struct cell_plan *plan)
{
    unsigned long flags = SBX_CLONE_NEWNS;

    if (!is_down(SBX_WALL_NETWORK))
        flags |= SBX_CLONE_NEWNET;
    if (!is_down(SBX_WALL_IPC))
        flags |= SBX_CLONE_NEWIPC;
    if (!is_down(SBX_WALL_UTS))
        flags |= SBX_CLONE_NEWUTS;
    return (int)sbx_call(SBX_NR_setns, plan->init, flags);
}

/* Now that the leaf is entered: it becomes the root of what /proc/self/cgroup shows. */
static int
hide_cgroup(const struct cell_plan *plan)
{
    (void)plan;
    return (int)sbx_call(SBX_NR_unshare, SBX_CLONE_NEWCGROUP);
}

static int
new_session(const struct cell_plan *plan)
{
    long r = sbx_call(SBX_NR_setsid);

    (void)plan;
    if (r >= 0)
        r = sbx_call(SBX_NR_chdir, "/workspace");
    sbx_call(SBX_NR_umask, 022);
    return r < 0 ? (int)r : 0;
}

/* When the whole engine runs out of memory, a cell goes before the engine and its zygotes. */
static int
volunteer_for_oom(const struct cell_plan *plan)
{
    int r, fd = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/self/oom_score_adj", SBX_O_WRONLY | SBX_O_CLOEXEC, 0);

    (void)plan;
    if (fd < 0)
        return fd;
    r = sbx_write_all(fd, "900", 3);
    sbx_close(fd);
    return r;
}

/* 0, 1, 2 and the channel; close-on-exec only the channel. Nothing else stays open. The received numbers all lie above
 * CHANNEL, since 0 to 3 are taken in the zygote. */
static int
place_fds(const struct cell_plan *plan)
{
    int r = 0;

    for (int i = 0; i < 3 && r >= 0; i++)
        r = (int)sbx_call(SBX_NR_dup3, plan->stdio[i], i, 0);
    if (r >= 0)
        r = (int)sbx_call(SBX_NR_dup3, plan->channel, CHANNEL, SBX_O_CLOEXEC);
    if (r >= 0 && !is_down(SBX_STAGE_FDS))
        r = sbx_close_from(FIRST_FREE);
    return r;
}

static int
limit_resources(const struct cell_plan *plan)
{
    return sbx_set_rlimits(plan->request->limits, plan->request->nlimits);
}

static int
drop_ids(const struct cell_plan *plan)
{
    /* No cell is 0 but where that is all there is; the nursery sees to it. */
    return sbx_become(plan->request->uid, plan->request->uid, plan->request->uid == 0);
}

/* Changing ids made the process non-dumpable, which would give its own /proc/self to root. It holds no secret and no
 * other process has its uid. */
static int
drop_caps(const struct cell_plan *plan)
{
    int r = sbx_drop_caps();

    (void)plan;
    if (r >= 0)
        r = (int)sbx_call(SBX_NR_prctl, SBX_PR_SET_DUMPABLE, 1, 0, 0, 0);
    return r;
}

static int
no_new_privs(const struct cell_plan *plan)
{
    (void)plan;
    return sbx_no_new_privs();
}

static int
restrict_paths(const struct cell_plan *plan)
{
    (void)plan;
    if (seal.landlock_abi == 0)
        return 0; /* the policy does not require it: the engine asked prepare() and went on */
    return sbx_landlock_seal(seal.landlock_abi);
}

static int
load_filter(const struct cell_plan *plan)
{
    (void)plan;
    return sbx_seccomp_install(&seal.filter);
}

static const struct {
    enum sbx_stage stage;
    int (*run)(const struct cell_plan *);
} steps[] = {
    {SBX_STAGE_CGROUP, enter_cgroup},        /* first: everything later is charged to the cell */
    {SBX_STAGE_NAMESPACES, join_namespaces}, /* needs CAP_SYS_ADMIN and CAP_SYS_CHROOT, so before the ids go */
    {SBX_STAGE_CGROUPNS, hide_cgroup},
    {SBX_STAGE_SESSION, new_session},
    {SBX_STAGE_OOM, volunteer_for_oom},
    {SBX_STAGE_FDS, place_fds},
    {SBX_STAGE_RLIMITS, limit_resources},    /* after the descriptors: RLIMIT_NOFILE counts numbers */
    {SBX_STAGE_IDS, drop_ids},
    {SBX_STAGE_CAPS, drop_caps},
    {SBX_STAGE_NNP, no_new_privs},           /* lets Landlock and the filter load without privilege */
    {SBX_STAGE_LANDLOCK, restrict_paths},
    {SBX_STAGE_SECCOMP, load_filter},        /* last: forbids most of the above */
};

static _Noreturn void
cell_fail(int channel, enum sbx_stage stage, int error)
{
    struct sbx_cell_hello hello = {.magic = {'S', 'B', 'X', 'C'}, .report = {.stage = (uint32_t)stage, .error = error}};

    sbx_send_fds(channel, &hello, sizeof(hello), 0, 0);
    for (;;)
        sbx_call(SBX_NR_exit_group, 1);
}

/* In the cell: raise every wall, then say so. Returns only when all are up. */
static void
cell_seal(const struct cell_plan *plan)
{
    struct sbx_cell_hello hello = {.magic = {'S', 'B', 'X', 'C'}};
    int channel = plan->channel;

    for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
        /* Descriptors are placed in any case: without them no program runs. */
        int r = is_down((int)steps[i].stage) && steps[i].stage != SBX_STAGE_FDS ? 0 : steps[i].run(plan);

        if (steps[i].stage == SBX_STAGE_FDS && r >= 0)
            channel = CHANNEL;
        if (r < 0)
            cell_fail(channel, steps[i].stage, -r);
    }
    if (sbx_send_fds(CHANNEL, &hello, sizeof(hello), 0, 0) < 0)
        for (;;)
            sbx_call(SBX_NR_exit_group, 1);
}

/* One thread, else a fork would copy locks that nobody will release. A process's task directory has 2 + threads links
 * (proc_task_getattr in fs/proc/base.c). */
static int
check_single_threaded(void)
{
    struct sbx_stat st;
    long r = sbx_call(SBX_NR_newfstatat, SBX_AT_FDCWD, "/proc/self/task", &st, 0);

    if (r < 0)
        return (int)r;
    return st.nlink == 3 ? 0 : -SBX_EBUSY;
}

static void
block_sigchld(int how) /* SBX_SIG_BLOCK or SBX_SIG_UNBLOCK */
{
    uint64_t sigchld = 1ULL << (SBX_SIGCHLD - 1);

    sbx_call(SBX_NR_rt_sigprocmask, how, &sigchld, 0, SBX_SIGSET_BYTES);
}

/* Fork one cell. Returns 0 in the cell, sealed; in the zygote the pid, or a negated errno and *stage. */
static long
fork_cell(const struct sbx_cell_limits *request, const int *fds, enum sbx_stage *stage)
{
    struct cell_plan plan = {
        .request = request,
        .init = fds[0],
        .stdio = {fds[1], fds[2], fds[3]},
        .channel = fds[4],
        .tasks_from = request->has_cgroup ? 6 : 5,
        .fds = fds,
    };
    struct sbx_clone_args args = {
        .flags = SBX_CLONE_CHILD_SETTID | SBX_CLONE_CHILD_CLEARTID,
        /* glibc keeps the thread id in user memory; without this the cell would hold the zygote's (checked: 2.36). */
        .child_tid = seal.tid_address,
        .exit_signal = SBX_SIGCHLD,
    };
    long pid, r;

    *stage = SBX_STAGE_THREADS;
    r = check_single_threaded();
    if (r < 0)
        return r;
    *stage = SBX_STAGE_CLONE;
    if (ncells == CELLS)
        return -SBX_EAGAIN;
    if (request->has_cgroup) {
        args.flags |= SBX_CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)fds[5];
    }
    r = sbx_call(SBX_NR_setns, fds[0], SBX_CLONE_NEWPID); /* for children only: the next fork lands there */
    if (r < 0)
        return r;
    PyOS_BeforeFork();
    pid = sbx_call(SBX_NR_clone3, &args, sizeof(args));
    if (pid == 0) {
        block_sigchld(SBX_SIG_UNBLOCK);
        cell_seal(&plan);
        PyOS_AfterFork_Child();
        return 0;
    }
    PyOS_AfterFork_Parent();
    return pid;
}

/* What became of one request of the nursery: in the zygote, in the cell, in a cell that a run waits for. Beside these
 * serve() returns READABLE. */
enum { SERVED = 0, FORKED = 1, WANTED = 2, READABLE = 3, GONE = 4 };

/* One request of the nursery. Returns one of these, or a negated errno. */
static int
fork_asked(int engine, int nursery)
{
    struct sbx_fork_request request;
    struct sbx_event event = {.kind = SBX_EVENT_REFUSED};
    int fds[SBX_FORK_FDS];
    unsigned int nfds = SBX_FORK_FDS;
    enum sbx_stage stage = SBX_STAGE_REQUEST;
    const struct sbx_cell_limits *cell = &request.cell;
    long pid = -SBX_EINVAL, n = sbx_recv_fds(nursery, &request, sizeof(request), fds, &nfds);

    if (n == 0)
        return GONE;
    if (n != (long)sizeof(request))
        return n < 0 ? (int)n : -SBX_EPROTO;
    if (cell->nlimits <= SBX_RLIMITS && cell->has_cgroup <= 1 && cell->ntasks <= SBX_FORK_FDS &&
        nfds == 5 + cell->has_cgroup + cell->ntasks)
        pid = fork_cell(cell, fds, &stage);
    if (pid == 0)
        return cell->hurry ? WANTED : FORKED;
    for (unsigned int i = 0; i < nfds; i++)
        sbx_close(fds[i]);
    if (pid > 0) {
        cells[ncells].pid = (int32_t)pid;
        cells[ncells].id = request.id;
        ncells++;
        return SERVED;
    }
    event.id = request.id;
    event.report.stage = (uint32_t)stage;
    event.report.error = (int32_t)-pid;
    n = sbx_send_fds(engine, &event, sizeof(event), 0, 0);
    return n < 0 ? (int)n : 0;
}

/* Reap every cell that has ended, and say how. */
static int
reap_cells(int engine, int signals)
{
    char info[128];
    struct sbx_siginfo ended = {0};

    sbx_call(SBX_NR_read, signals, info, sizeof(info));
    while (sbx_call(SBX_NR_waitid, SBX_P_ALL, 0, &ended, SBX_WEXITED | SBX_WNOHANG, 0) == 0 && ended.pid) {
        for (unsigned int i = 0; i < ncells; i++)
            if (cells[i].pid == ended.pid) {
                struct sbx_event event = {
                    .kind = SBX_EVENT_EXITED, .id = cells[i].id, .code = ended.code, .status = ended.status};
                long n;

                cells[i] = cells[--ncells];
                n = sbx_send_fds(engine, &event, sizeof(event), 0, 0);
                if (n < 0)
                    return (int)n;
                break;
            }
        ended.pid = 0;
    }
    return 0;
}

PyDoc_STRVAR(prepare_doc, "prepare(inherited, own, walls_down=0) -> int\n\n"
"Make this process fit to be a zygote: not dumpable, no core files, an empty capability bounding set, no_new_privs,\n"
"and under the seccomp program *inherited*, which its cells inherit. *own* is the program that every cell adds.\n"
"*walls_down* is a set of stages, as bits, that cells skip: the tests that prove each wall on its own need it, and the\n"
"receipt of every run then says so. Returns the kernel's Landlock ABI, 0 without: the engine refuses to serve when the\n"
"policy requires more. Raises OSError.");

static int
is_program(Py_ssize_t size)
{
    return size > 0 && size % 8 == 0 && size / 8 <= 4096;
}

/* What prepare() is asked to do. */
struct prepare_plan {
    struct sbx_filter inherited;
    uint64_t walls_down;
};

static int
remember_walls(const struct prepare_plan *plan)
{
    seal.walls_down = plan->walls_down;
    return 0;
}

static int
ask_landlock(const struct prepare_plan *plan)
{
    long r = sbx_landlock_abi();

    (void)plan;
    seal.landlock_abi = r < 0 ? 0 : (int)r;
    return 0;
}

static int
make_cell_table(const struct prepare_plan *plan)
{
    (void)plan;
    return (int)make_table();
}

static int
hide_memory(const struct prepare_plan *plan)
{
    (void)plan;
    return (int)sbx_call(SBX_NR_prctl, SBX_PR_SET_DUMPABLE, 0, 0, 0, 0);
}

static int
lock_privileges(const struct prepare_plan *plan)
{
    (void)plan;
    return sbx_no_new_privs();
}

static int
drop_bounding(const struct prepare_plan *plan)
{
    (void)plan;
    return sbx_drop_bounding();
}

static int
forbid_core_files(const struct prepare_plan *plan)
{
    static const struct sbx_rlimit no_core = {.resource = SBX_RLIMIT_CORE};

    (void)plan;
    return sbx_set_rlimits(&no_core, 1);
}

/* A library may have left SIGCHLD ignored, which would reap behind our back. */
static int
default_sigchld(const struct prepare_plan *plan)
{
    static const struct sbx_sigaction by_default = {0};

    (void)plan;
    return (int)sbx_call(SBX_NR_rt_sigaction, SBX_SIGCHLD, &by_default, 0, SBX_SIGSET_BYTES);
}

static int
find_tid_address(const struct prepare_plan *plan)
{
    (void)plan;
    return (int)sbx_call(SBX_NR_prctl, SBX_PR_GET_TID_ADDRESS, &seal.tid_address, 0, 0, 0);
}

static int
load_inherited_filter(const struct prepare_plan *plan)
{
    return is_down(SBX_STAGE_SECCOMP) ? 0 : sbx_seccomp_install(&plan->inherited);
}

static int (*const prepare_steps[])(const struct prepare_plan *) = {
    remember_walls,        /* first: the last step asks */
    ask_landlock,          /* before the filter, as all that follows: a profile may refuse to ask */
    make_cell_table,
    hide_memory,
    lock_privileges,       /* lets the filter load without privilege */
    drop_bounding,
    forbid_core_files,
    default_sigchld,       /* before the first cell is forked */
    find_tid_address,
    load_inherited_filter, /* last: forbids some of the above */
};

static PyObject *
cell_prepare(PyObject *self, PyObject *args)
{
    const char *first, *second;
    Py_ssize_t first_size, second_size;
    unsigned long long walls_down = 0;
    struct prepare_plan plan;
    void *copy;
    int r = 0;

    (void)self;
    if (!PyArg_ParseTuple(args, "y#y#|K:prepare", &first, &first_size, &second, &second_size, &walls_down))
        return NULL;
    if (!is_program(first_size) || !is_program(second_size)) {
        PyErr_SetString(PyExc_ValueError, "a seccomp program has 1 to 4096 instructions of 8 bytes");
        return NULL;
    }
    copy = PyMem_Malloc((size_t)second_size);
    if (copy == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < second_size; i++)
        ((char *)copy)[i] = second[i];
    plan = (struct prepare_plan){
        .inherited = {.program = first, .length = (uint16_t)(first_size / 8)}, .walls_down = walls_down};
    for (size_t i = 0; i < ARRAY_SIZE(prepare_steps) && r >= 0; i++)
        r = prepare_steps[i](&plan);
    if (r < 0) {
        PyMem_Free(copy);
        errno = -r;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyMem_Free((void *)(uintptr_t)seal.filter.program);
    seal.filter.program = copy;
    seal.filter.length = (uint16_t)(second_size / 8);
    seal.prepared = 1;
    return PyLong_FromLong(seal.landlock_abi);
}

PyDoc_STRVAR(serve_doc, "serve(engine, nursery, until=-1) -> int\n\n"
"Fork cells for the nursery on the descriptor *nursery*, and tell the engine on *engine* what became of them. Returns\n"
"1 in each cell, sealed, with its streams at 0 to 2 and its own channel at 3, or 2 when a run waits for it; in the\n"
"zygote 0 when the engine or the nursery has gone, and 3 when *until* can be read: serve again then. Raises OSError.");

static PyObject *
cell_serve(PyObject *self, PyObject *args)
{
    struct {
        int fd;
        short events, revents;
    } polls[4] = {{.events = 0}, {.events = 1}, {.events = 1}, {.events = 1}}; /* below 0 a descriptor is passed over */
    uint64_t sigchld = 1ULL << (SBX_SIGCHLD - 1);
    int engine, nursery, until = -1, signals, r = 0;

    (void)self;
    if (!PyArg_ParseTuple(args, "ii|i:serve", &engine, &nursery, &until))
        return NULL;
    if (!seal.prepared) {
        PyErr_SetString(PyExc_RuntimeError, "prepare() comes first");
        return NULL;
    }
    block_sigchld(SBX_SIG_BLOCK);
    signals = (int)sbx_call(SBX_NR_signalfd4, -1, &sigchld, sizeof(uint64_t), SBX_O_NONBLOCK | SBX_O_CLOEXEC);
    polls[0].fd = engine;
    polls[1].fd = nursery;
    polls[2].fd = signals;
    polls[3].fd = until;
    if (signals < 0)
        r = signals;
    while (r >= 0) {
        long n = sbx_call(SBX_NR_poll, polls, ARRAY_SIZE(polls), -1);

        if (n == -SBX_EINTR)
            continue;
        if (n < 0 || polls[0].revents) { /* the engine says nothing any more: only its end is seen here */
            r = (int)n;
            break;
        }
        if (polls[2].revents)
            r = reap_cells(engine, signals);
        if (r >= 0 && polls[1].revents) {
            r = fork_asked(engine, nursery);
            if (r == GONE)
                break;
            if (r > SERVED)
                return PyLong_FromLong(r);
        }
        if (r >= 0 && polls[3].revents) {
            sbx_close(signals); /* SIGCHLD stays blocked: one that comes in between is there for the next call */
            return PyLong_FromLong(READABLE);
        }
    }
    if (r >= 0)
        return PyLong_FromLong(0);
    errno = -r;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyMethodDef methods[] = {
    {"prepare", cell_prepare, METH_VARARGS, prepare_doc},
    {"serve", cell_serve, METH_VARARGS, serve_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_cell",
    .m_doc = "The spawn path of a zygote and the walls of a cell.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cell(void);

PyMODINIT_FUNC
PyInit__cell(void)
{
    return PyModule_Create(&module);
}
