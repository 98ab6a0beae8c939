/* sandboxd.inside._cell: the spawn path of a zygote, and the walls of a cell. Limited API, no cffi, so that one object
 * serves every interpreter from 3.11 on that an operator names.
 *
 * serve() is the zygote's whole life after warming: it forks a cell for each request of the engine and returns only in
 * the cell, sealed. The zygote has one thread (checked before each fork) and reads fixed structs of the engine only.
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
    struct sbx_filter filter;
    int landlock_abi;
    int prepared;
    uint64_t walls_down; /* bit = enum sbx_stage or below; only tests of the walls themselves set any */
} seal;

/* Parts of one step that can be left out alone (sandboxd/engine/prepared.py). */
enum { WALL_NETWORK = 48, WALL_IPC = 49, WALL_UTS = 50 };

static int
is_down(int wall)
{
    return (int)(seal.walls_down >> wall & 1);
}

struct cell_plan {
    const struct sbx_cell_request *request;
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

    if (!is_down(WALL_NETWORK))
        flags |= SBX_CLONE_NEWNET;
    if (!is_down(WALL_IPC))
        flags |= SBX_CLONE_NEWIPC;
    if (!is_down(WALL_UTS))
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
    return sbx_become(plan->request->uid, plan->request->gid);
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
    struct {
        uint64_t dev, ino, nlink, rest[15];
    } st;
    long r = sbx_call(SBX_NR_newfstatat, SBX_AT_FDCWD, "/proc/self/task", &st, 0);

    if (r < 0)
        return (int)r;
    return st.nlink == 3 ? 0 : -SBX_EBUSY;
}

/* Fork one cell. Returns 0 in the cell, sealed; in the zygote the pid, with *pidfd, or a negated errno and *stage. */
static long
fork_cell(const struct sbx_cell_request *request, const int *fds, int *pidfd, enum sbx_stage *stage)
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
        .flags = SBX_CLONE_PIDFD | SBX_CLONE_CHILD_SETTID | SBX_CLONE_CHILD_CLEARTID,
        .pidfd = (uint64_t)(uintptr_t)pidfd,
        .exit_signal = SBX_SIGCHLD,
    };
    uint64_t tid_address = 0;
    long pid, r;

    *stage = SBX_STAGE_THREADS;
    r = check_single_threaded();
    if (r < 0)
        return r;
    /* glibc keeps the thread id in user memory; without this the cell would hold the zygote's (checked: 2.36). */
    *stage = SBX_STAGE_CLONE;
    r = sbx_call(SBX_NR_prctl, SBX_PR_GET_TID_ADDRESS, &tid_address, 0, 0, 0);
    if (r < 0)
        return r;
    args.child_tid = tid_address;
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
        cell_seal(&plan);
        PyOS_AfterFork_Child();
        return 0;
    }
    PyOS_AfterFork_Parent();
    if (pid < 0) /* copy_process() has written the number before its last checks (init dead, pids.max), and closed it */
        *pidfd = -1;
    return pid;
}

static void
reap_cell(int pid, struct sbx_cell_reply *reply)
{
    struct { /* siginfo_t of SIGCHLD */
        int32_t signo, error, code, pad, pid;
        uint32_t uid;
        int32_t status, rest[25];
    } info = {0};
    long r;

    do
        r = sbx_call(SBX_NR_waitid, SBX_P_PID, pid, &info, SBX_WEXITED, 0);
    while (r == -SBX_EINTR);
    reply->report.error = (int32_t)-r;
    reply->code = info.code;
    reply->status = info.status;
}

PyDoc_STRVAR(prepare_doc, "prepare(filter, walls_down=0) -> int\n\n"
"Make this process fit to be a zygote: not dumpable, no core files, an empty capability bounding set, no_new_privs.\n"
"*filter* is the compiled seccomp program that every cell installs. *walls_down* is a set of stages, as bits, that\n"
"cells skip: the tests that prove each wall on its own need it, and the receipt of every run then says so. Returns\n"
"the kernel's Landlock ABI, 0 without: the engine refuses to serve when the policy requires more. Raises OSError.");

static PyObject *
cell_prepare(PyObject *self, PyObject *args)
{
    static const struct sbx_rlimit no_core = {.resource = 4 /* RLIMIT_CORE */};
    const char *program;
    Py_ssize_t size;
    unsigned long long walls_down = 0;
    void *copy;
    long r;

    (void)self;
    if (!PyArg_ParseTuple(args, "y#|K:prepare", &program, &size, &walls_down))
        return NULL;
    if (size == 0 || size % 8 != 0 || size / 8 > 4096) {
        PyErr_SetString(PyExc_ValueError, "a seccomp program has 1 to 4096 instructions of 8 bytes");
        return NULL;
    }
    copy = PyMem_Malloc((size_t)size);
    if (copy == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < size; i++)
        ((char *)copy)[i] = program[i];
    r = sbx_call(SBX_NR_prctl, SBX_PR_SET_DUMPABLE, 0, 0, 0, 0);
    if (r >= 0)
        r = sbx_no_new_privs();
    if (r >= 0)
        r = sbx_drop_bounding();
    if (r >= 0)
        r = sbx_set_rlimits(&no_core, 1);
    if (r < 0) {
        PyMem_Free(copy);
        errno = (int)-r;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyMem_Free((void *)(uintptr_t)seal.filter.program);
    seal.filter.program = copy;
    seal.filter.length = (uint16_t)(size / 8);
    r = sbx_landlock_abi();
    seal.landlock_abi = r < 0 ? 0 : (int)r;
    seal.walls_down = walls_down;
    seal.prepared = 1;
    return PyLong_FromLong(seal.landlock_abi);
}

PyDoc_STRVAR(serve_doc, "serve(channel) -> bool\n\n"
"Fork cells for the engine on the descriptor *channel*. Returns True in each cell, sealed, with its streams at 0 to 2\n"
"and its own channel at 3; False in the zygote when the engine has gone. Raises OSError.");

static PyObject *
cell_serve(PyObject *self, PyObject *args)
{
    int channel;

    (void)self;
    if (!PyArg_ParseTuple(args, "i:serve", &channel))
        return NULL;
    if (!seal.prepared) {
        PyErr_SetString(PyExc_RuntimeError, "prepare() comes first");
        return NULL;
    }
    for (;;) {
        struct sbx_cell_request request;
        struct sbx_cell_reply reply = {0};
        int fds[SBX_CELL_FDS], pidfd = -1;
        unsigned int nfds = SBX_CELL_FDS;
        enum sbx_stage stage = SBX_STAGE_REQUEST;
        long pid = -SBX_EINVAL, n = sbx_recv_fds(channel, &request, sizeof(request), fds, &nfds);

        if (n == 0)
            Py_RETURN_FALSE;
        if (n != (long)sizeof(request)) {
            errno = n < 0 ? (int)-n : SBX_EPROTO;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
        reply.command = request.command;
        reply.id = request.id;
        if (request.command == SBX_CELL_REAP) {
            reap_cell(request.pid, &reply);
        } else {
            if (request.command == SBX_CELL_FORK && request.nlimits <= SBX_RLIMITS && request.has_cgroup <= 1 &&
                request.ntasks <= SBX_CELL_FDS && nfds == 5 + request.has_cgroup + request.ntasks)
                pid = fork_cell(&request, fds, &pidfd, &stage);
            if (pid == 0)
                Py_RETURN_TRUE;
            reply.pid = pid < 0 ? -1 : (int32_t)pid;
            if (pid < 0) {
                reply.report.stage = (uint32_t)stage;
                reply.report.error = (int32_t)-pid;
            }
        }
        for (unsigned int i = 0; i < nfds; i++)
            sbx_close(fds[i]);
        n = sbx_send_fds(channel, &reply, sizeof(reply), &pidfd, pidfd >= 0);
        sbx_close(pidfd);
        if (n < 0) {
            errno = (int)-n;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
    }
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
