/* Processes that the engine's side starts: the engine itself, and the first process of a zygote's namespaces.
 *
 * Both are plain clone3(2): the child owns a copy of the caller's memory until it execs, so it may use only what the
 * caller prepared and bare system calls. Nothing here may allocate or take a lock.
 */
#include "spawn.h"

static _Noreturn void
child_exit(int status)
{
    for (;;)
        sbx_call(SBX_NR_exit_group, status);
}

static _Noreturn void
child_fail(int report_fd, enum sbx_stage stage, int error, uint32_t detail)
{
    struct sbx_report report = {.stage = (uint32_t)stage, .error = error, .detail = detail};

    sbx_write_all(report_fd, &report, sizeof(report));
    child_exit(1);
}

/* As after exec from a shell: no handler, nothing ignored, nothing blocked. Handlers must go before the mask, else one
 * of the caller's could run here. */
static void
default_signals(void)
{
    const struct sbx_sigaction action = {0};
    uint64_t none = 0;

    for (long sig = 1; sig <= SBX_SIGNALS; sig++)
        sbx_call(SBX_NR_rt_sigaction, sig, &action, 0, SBX_SIGSET_BYTES);
    sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &none, 0, SBX_SIGSET_BYTES);
}

/* Move each descriptor to its place, lowest free numbers out of the way first, and close all that is not named. */
static int
place_fds(const int *fds, unsigned int count)
{
    int moved[16];

    if (count > ARRAY_SIZE(moved))
        return -SBX_EINVAL;
    for (unsigned int i = 0; i < count; i++) {
        moved[i] = (int)sbx_call(SBX_NR_fcntl, fds[i], SBX_F_DUPFD_CLOEXEC, 64);
        if (moved[i] < 0)
            return moved[i];
    }
    for (unsigned int i = 0; i < count; i++) {
        int r = sbx_move_fd(moved[i], (int)i);

        if (r < 0)
            return r;
    }
    return 0;
}

static long
all_signals_blocked(uint64_t *old)
{
    uint64_t all = ~0ULL;

    return sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &all, old, SBX_SIGSET_BYTES);
}

/* The engine's process up to exec. */
static _Noreturn void
launch_child(const struct sbx_launch *plan)
{
    default_signals();
    sbx_call(SBX_NR_setsid);
    if (place_fds(plan->fds, plan->nfds) < 0 || sbx_close_from(plan->nfds) < 0)
        child_exit(126);
    sbx_call(SBX_NR_chdir, "/");
    sbx_call(SBX_NR_umask, 022);
    sbx_call(SBX_NR_execve, plan->path, plan->argv, plan->envp);
    child_exit(127);
}

/* Makes the process that is wanted, puts its pidfd into *pidfd and returns its pid or a negative errno. */
typedef long (*maker)(const void *plan, int32_t *pidfd);

/* Have *make* called by a process in between, which shares this one's descriptors, has *exit_signal*, and is gone when
 * this returns: the pid, or a negative errno. For a caller whose signals are blocked. */
static int
clone_detached(uint64_t exit_signal, maker make, const void *plan, int *pidfd)
{
    struct sbx_clone_args between = {.flags = SBX_CLONE_FILES, .exit_signal = exit_signal};
    struct {
        int32_t pid, pidfd;
    } made = {-SBX_EIO, -1};
    int report[2];
    long pid, r = sbx_call(SBX_NR_pipe2, report, SBX_O_CLOEXEC);

    if (r < 0)
        return (int)r;
    pid = sbx_call(SBX_NR_clone3, &between, sizeof(between));
    if (pid == 0) {
        made.pid = (int32_t)make(plan, &made.pidfd);
        sbx_write_all(report[1], &made, sizeof(made));
        child_exit(0);
    }
    if (pid > 0) {
        do
            r = sbx_call(SBX_NR_wait4, pid, 0, SBX_WALL, 0);
        while (r == -SBX_EINTR);
        sbx_close(report[1]); /* not before: it is the same table */
        r = sbx_read_all(report[0], &made, sizeof(made));
        if (r < 0)
            made.pid = (int32_t)r;
    } else {
        made.pid = (int32_t)pid;
        sbx_close(report[1]);
    }
    sbx_close(report[0]);
    *pidfd = made.pidfd;
    return made.pid;
}

static long
clone_engine(const void *plan, int32_t *pidfd)
{
    struct sbx_clone_args args = {
        .flags = SBX_CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)pidfd, .exit_signal = SBX_SIGCHLD};
    long pid = sbx_call(SBX_NR_clone3, &args, sizeof(args));

    if (pid == 0)
        launch_child(plan);
    return pid;
}

/* Start the engine, exec'ed, from the caller's program, in a session of its own: the terminal's Ctrl-C is the caller's.
 *
 * The caller shall hear of no child. exec gives every process SIGCHLD as its exit signal (de_thread in fs/exec.c), so the
 * engine is made by a process in between that never execs and has none; when that has ended, the engine is init's. */
int
sbx_launch(const struct sbx_launch *plan, int *pidfd)
{
    uint64_t old;
    int pid;

    all_signals_blocked(&old);
    pid = clone_detached(0, clone_engine, plan, pidfd);
    sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &old, 0, SBX_SIGSET_BYTES);
    return pid;
}

/* The life of the zygote's first process up to exec, in its new namespaces. */
struct zygote_start {
    const struct sbx_zygote_plan *plan;
    int trees[SBX_TREES], root, report_fd;
    uint32_t detail, kept;
};

/* What a caller may have of its own and a cell must not inherit: a realtime policy, which no cpu.max bounds; a negative
 * nice value; an I/O class; a personality without address space randomisation (setarch -R). */
static int
sched_reset(struct zygote_start *at)
{
    int priority = 0;
    long r = sbx_call(SBX_NR_sched_setscheduler, 0, 0 /* SCHED_OTHER */, &priority);

    (void)at;
    /* The raw call answers 20 - nice. */
    if (r >= 0 && sbx_call(SBX_NR_getpriority, 0 /* PRIO_PROCESS */, 0) > 20)
        r = sbx_call(SBX_NR_setpriority, 0, 0, 0);
    if (r >= 0)
        r = sbx_call(SBX_NR_ioprio_set, 1 /* IOPRIO_WHO_PROCESS */, 0, 0 /* by nice */);
    if (r == -SBX_ENOSYS) /* a kernel without CONFIG_BLOCK */
        r = 0;
    if (r >= 0)
        r = sbx_call(SBX_NR_personality, 0);
    return r < 0 ? (int)r : 0;
}

/* cgroup v1: writing 0 moves the writer. */
static int
enter_cgroups(struct zygote_start *at)
{
    const struct sbx_zygote_plan *plan = at->plan;

    for (unsigned int i = 0; i < plan->ntasks && i < ARRAY_SIZE(plan->tasks); i++) {
        int r = sbx_write_all(plan->tasks[i], "0", 1);

        if (r < 0)
            return r;
    }
    return 0;
}

static int
stop_propagation(struct zygote_start *at)
{
    (void)at;
    return (int)sbx_call(SBX_NR_mount, 0, "/", 0, SBX_MS_REC | SBX_MS_PRIVATE, 0);
}

static int
open_trees(struct zygote_start *at)
{
    return sbx_open_trees(at->plan->rootfs, at->plan->rootfs_length, at->trees, &at->detail);
}

static int
become_mapped_root(struct zygote_start *at)
{
    char go;
    int r = sbx_read_all(at->plan->go_fd, &go, 1); /* the id maps are written */

    return r < 0 ? r : sbx_become(0, 0, at->plan->single_id);
}

/* An anonymous session keyring of its own: keyrings are not namespaced, and the caller's would be inherited
 * (session-keyring(7); ENOSYS: a kernel without keys; EPERM: a filter around the engine refuses keyrings to everything
 * below, cells included). */
static int
keyring_drop(struct zygote_start *at)
{
    long r = sbx_call(SBX_NR_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, 0);

    if (r == -SBX_EPERM)
        at->kept |= SBX_KEPT_KEYRING;
    return r < 0 && r != -SBX_ENOSYS && r != -SBX_EPERM ? (int)r : 0;
}

/* No user namespaces below this one: the limit is this namespace's own (namespaces(7)), it is asked even where a filter is
 * not, and a container's read-only /proc/sys is the one reason why it may stay as it is. */
static int
userns_limit(struct zygote_start *at)
{
    int r, fd;

    if (at->plan->allow_user_namespaces)
        return 0;
    fd = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/sys/user/max_user_namespaces",
                       SBX_O_WRONLY | SBX_O_CLOEXEC, 0);
    if (fd == -SBX_EROFS || fd == -SBX_EACCES || fd == -SBX_ENOENT) {
        at->kept |= SBX_KEPT_USER_NAMESPACES;
        return 0;
    }
    if (fd < 0)
        return fd;
    r = sbx_write_all(fd, "0", 1);
    sbx_close(fd);
    return r;
}

static int
make_root(struct zygote_start *at)
{
    at->root = sbx_new_root();
    return at->root;
}

static int
build_root(struct zygote_start *at)
{
    return sbx_build_root(at->root, at->plan->rootfs, at->plan->rootfs_length, at->trees, &at->detail);
}

static int
enter_root(struct zygote_start *at)
{
    return sbx_enter_root(at->root);
}

static int
set_hostname(struct zygote_start *at)
{
    (void)at;
    return (int)sbx_call(SBX_NR_sethostname, "sandbox", 7);
}

/* By enum sbx_nursery_fd. The program's image and the report end with exec; the others are the nursery's. */
static int
place_nursery_fds(struct zygote_start *at)
{
    const struct sbx_zygote_plan *plan = at->plan;
    const int fds[] = {
        [SBX_NURSERY_NULL] = plan->null_fd,
        [SBX_NURSERY_OUT] = plan->log_fd,
        [SBX_NURSERY_ERR] = plan->log_fd,
        [SBX_NURSERY_ENGINE] = plan->engine_fd,
        [SBX_NURSERY_ZYGOTE] = plan->zygote_fd,
        [SBX_NURSERY_OWNER] = plan->owner_fd,
        [SBX_NURSERY_PROGRAM] = plan->nursery_fd,
        [SBX_NURSERY_REPORT] = plan->report_fd,
        [SBX_NURSERY_BROKER] = plan->broker_fd,
    };
    const unsigned int nfds = ARRAY_SIZE(fds) - (plan->broker_fd < 0);
    int r;

    sbx_call(SBX_NR_setsid);
    r = place_fds(fds, nfds);
    if (r < 0)
        return r;
    at->report_fd = SBX_NURSERY_REPORT;
    sbx_call(SBX_NR_fcntl, SBX_NURSERY_PROGRAM, SBX_F_SETFD, SBX_FD_CLOEXEC);
    sbx_call(SBX_NR_fcntl, SBX_NURSERY_REPORT, SBX_F_SETFD, SBX_FD_CLOEXEC);
    return sbx_close_from(nfds);
}

static int
execute_nursery(struct zygote_start *at)
{
    const struct sbx_report done = {.detail = at->kept};

    if (at->kept)
        sbx_write_all(SBX_NURSERY_REPORT, &done, sizeof(done));
    return (int)sbx_call(SBX_NR_execveat, SBX_NURSERY_PROGRAM, "", at->plan->argv, at->plan->envp, SBX_AT_EMPTY_PATH);
}

static const struct {
    enum sbx_stage stage;
    int (*run)(struct zygote_start *);
} zygote_steps[] = {
    {SBX_STAGE_ORDINARY, sched_reset},    /* first: what follows takes time */
    {SBX_STAGE_CGROUP, enter_cgroups},    /* before anything takes memory; the host's tree is still there */
    {SBX_STAGE_PRIVATE, stop_propagation},
    {SBX_STAGE_MOUNTS, open_trees},       /* before the ids: with the caller's rights over the host's tree */
    {SBX_STAGE_MAPS, become_mapped_root}, /* waits for the engine */
    {SBX_STAGE_FORGO, keyring_drop},
    {SBX_STAGE_FORGO, userns_limit},      /* while the host's /proc is there */
    {SBX_STAGE_ROOT, make_root},
    {SBX_STAGE_MOUNTS, build_root},
    {SBX_STAGE_PIVOT, enter_root},        /* nothing of the host's tree from here on */
    {SBX_STAGE_HOSTNAME, set_hostname},
    {SBX_STAGE_FDS, place_nursery_fds},   /* closes all that the steps before needed */
    {SBX_STAGE_EXEC, execute_nursery},    /* returns only when it is refused */
};

static _Noreturn void
zygote_child(const struct sbx_zygote_plan *plan)
{
    struct zygote_start at = {.plan = plan, .root = -1, .report_fd = plan->report_fd};

    default_signals();
    sbx_close(plan->go_write_fd);
    for (size_t i = 0; i < ARRAY_SIZE(zygote_steps); i++) {
        int r = zygote_steps[i].run(&at);

        if (r < 0)
            child_fail(at.report_fd, zygote_steps[i].stage, -r,
                       zygote_steps[i].stage == SBX_STAGE_MOUNTS ? at.detail : 0);
    }
    child_exit(1);
}

/* In the namespaces that the caller asks for; *args* says where the pidfd goes. */
static long
clone_zygote(const struct sbx_zygote_plan *plan, struct sbx_clone_args *args)
{
    long pid;

    args->flags |= SBX_CLONE_PIDFD | SBX_CLONE_NEWPID | SBX_CLONE_NEWNS | SBX_CLONE_NEWNET | SBX_CLONE_NEWIPC |
                   SBX_CLONE_NEWUTS;
    if (plan->cgroup_fd >= 0) {
        args->flags |= SBX_CLONE_INTO_CGROUP;
        args->cgroup = (uint64_t)plan->cgroup_fd;
    }
    pid = sbx_call(SBX_NR_clone3, args, sizeof(*args));
    if (pid == 0)
        zygote_child(plan);
    return pid;
}

/* The same in a user namespace that is there already. Entering one changes the process that enters, so one in between
 * does it, and has the zygote's first process made as a child of the engine's: it inherits the exit signal. */
static long
clone_in_userns(const void *any, int32_t *pidfd)
{
    const struct sbx_zygote_plan *plan = any;
    struct sbx_clone_args args = {.flags = SBX_CLONE_PARENT, .pidfd = (uint64_t)(uintptr_t)pidfd};
    long r = sbx_call(SBX_NR_setns, plan->userns_fd, SBX_CLONE_NEWUSER);

    return r < 0 ? r : clone_zygote(plan, &args);
}

/* New pid, mount, net, ipc and uts namespaces with one process in them, in the user namespace of the plan, or in a new
 * one whose id maps the process waits for on go_fd. No cgroup namespace: CLONE_INTO_CGROUP by its children answers ENOENT
 * for a target outside it. Returns the pid. */
int
sbx_zygote_clone(const struct sbx_zygote_plan *plan, int *pidfd)
{
    struct sbx_clone_args args = {
        .flags = SBX_CLONE_NEWUSER, .pidfd = (uint64_t)(uintptr_t)pidfd, .exit_signal = SBX_SIGCHLD};
    uint64_t old;
    long pid, r = all_signals_blocked(&old);

    if (r < 0)
        return (int)r;
    pid = plan->userns_fd < 0 ? clone_zygote(plan, &args) : clone_detached(SBX_SIGCHLD, clone_in_userns, plan, pidfd);
    sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &old, 0, SBX_SIGSET_BYTES);
    return (int)pid;
}

/* A new user namespace with one process in it that executes *program_fd* and stays until *wait_fd* is at its end. On
 * report_fd comes a struct sbx_report: from the program, without a stage, or of what was refused. The /proc files of what
 * the engine clones belong to root, since it is not dumpable, and a copy of it shall not be either: who is not root
 * cannot write id maps there. Those of an executed program that holds no secret belong to the engine's user. Returns the
 * pid. */
int
sbx_userns_hold(int program_fd, int wait_fd, int report_fd, int *pidfd)
{
    struct sbx_clone_args args = {.flags = SBX_CLONE_NEWUSER | SBX_CLONE_PIDFD,
                                  .pidfd = (uint64_t)(uintptr_t)pidfd,
                                  .exit_signal = SBX_SIGCHLD};
    char name[] = "hold", *const argv[] = {name, 0}, *const envp[] = {0};
    enum { HOLDER_PROGRAM = 1 };
    const int fds[] = {[SBX_HOLDER_WAIT] = wait_fd, [HOLDER_PROGRAM] = program_fd, [SBX_HOLDER_REPORT] = report_fd};
    uint64_t old;
    long pid, r = all_signals_blocked(&old);

    if (r < 0)
        return (int)r;
    pid = sbx_call(SBX_NR_clone3, &args, sizeof(args));
    if (pid == 0) {
        default_signals();
        r = place_fds(fds, ARRAY_SIZE(fds));
        if (r >= 0)
            r = sbx_call(SBX_NR_fcntl, HOLDER_PROGRAM, SBX_F_SETFD, SBX_FD_CLOEXEC);
        if (r >= 0)
            r = sbx_close_from(ARRAY_SIZE(fds));
        if (r < 0)
            child_fail(report_fd, SBX_STAGE_FDS, (int)-r, 0);
        r = sbx_call(SBX_NR_execveat, HOLDER_PROGRAM, "", argv, envp, SBX_AT_EMPTY_PATH);
        child_fail(SBX_HOLDER_REPORT, SBX_STAGE_EXEC, (int)-r, 0);
    }
    sbx_call(SBX_NR_rt_sigprocmask, SBX_SIG_SETMASK, &old, 0, SBX_SIGSET_BYTES);
    return (int)pid;
}

/* The engine itself: no core file and no ptrace by others of its uid; its /proc/PID belongs to root. */
int
sbx_hide_self(void)
{
    return (int)sbx_call(SBX_NR_prctl, SBX_PR_SET_DUMPABLE, 0, 0, 0, 0);
}
