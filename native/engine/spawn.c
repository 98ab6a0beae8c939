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
    struct {
        void *handler;
        uint64_t flags;
        void *restorer;
        uint64_t mask;
    } action = {0};
    uint64_t none = 0;

    for (long sig = 1; sig <= 64; sig++)
        sbx_call(SBX_NR_rt_sigaction, sig, &action, 0, sizeof(uint64_t));
    sbx_call(SBX_NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &none, 0, sizeof(uint64_t));
}

/* Move each descriptor to its place, lowest free numbers out of the way first, and close all that is not named. */
static int
place_fds(const int *fds, unsigned int count)
{
    int moved[16];

    if (count > ARRAY_SIZE(moved))
        return -SBX_EINVAL;
    for (unsigned int i = 0; i < count; i++) {
        moved[i] = (int)sbx_call(SBX_NR_fcntl, fds[i], 1030 /* F_DUPFD_CLOEXEC */, 64);
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

    return sbx_call(SBX_NR_rt_sigprocmask, 2, &all, old, sizeof(uint64_t));
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
    sbx_call(SBX_NR_rt_sigprocmask, 2, &old, 0, sizeof(uint64_t));
    return pid;
}

/* Two more things that the zygote's processes shall not have. An anonymous session keyring of their own: keyrings are
 * not namespaced, and the caller's would be inherited (session-keyring(7); ENOSYS: a kernel without keys; EPERM: a filter
 * around the engine refuses keyrings to everything below, cells included). And user
 * namespaces below this one: the limit is this namespace's own (namespaces(7)), it is asked even where a filter is not,
 * and a container's read-only /proc/sys is the one reason why it may stay as it is. */
static int
keyring_drop(int allow_user_namespaces, uint32_t *kept)
{
    long r = sbx_call(SBX_NR_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, 0);
    int fd;

    *kept = 0;

    if (r == -SBX_EPERM)
        *kept |= SBX_KEPT_KEYRING;
    if (r == -SBX_ENOSYS || r == -SBX_EPERM)
        r = 0;
    if (r < 0 || allow_user_namespaces)
        return r < 0 ? (int)r : 0;
    fd = (int)sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/sys/user/max_user_namespaces",
                       SBX_O_WRONLY | SBX_O_CLOEXEC, 0);
    if (fd == -SBX_EROFS || fd == -SBX_EACCES || fd == -SBX_ENOENT) {
        *kept |= SBX_KEPT_USER_NAMESPACES;
        return 0;
    }
    if (fd < 0)
        return fd;
    r = sbx_write_all(fd, "0", 1);
    sbx_close(fd);
    return (int)r;
}

/* What a caller may have of its own and a cell must not inherit: a realtime policy, which no cpu.max bounds; a negative
 * nice value; an I/O class; a personality without address space randomisation (setarch -R). */
static int
sched_reset(void)
{
    int priority = 0;
    long r = sbx_call(SBX_NR_sched_setscheduler, 0, 0 /* SCHED_OTHER */, &priority);

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

/* The life of the zygote's first process up to exec, in its new namespaces. */
static _Noreturn void
zygote_child(const struct sbx_zygote_plan *plan)
{
    const int fds[] = {plan->null_fd, plan->log_fd, plan->log_fd, plan->engine_fd, plan->zygote_fd, plan->owner_fd,
                       plan->nursery_fd, plan->report_fd, plan->broker_fd};
    const unsigned int nfds = ARRAY_SIZE(fds) - (plan->broker_fd < 0);
    int trees[SBX_TREES];
    struct sbx_report done = {0};
    uint32_t detail = 0, kept = 0;
    char go;
    long r;
    int root;

    default_signals();
    sbx_close(plan->go_write_fd);
    r = sched_reset();
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_ORDINARY, (int)-r, 0);
    for (unsigned int i = 0; i < plan->ntasks && i < ARRAY_SIZE(plan->tasks); i++) {
        r = sbx_write_all(plan->tasks[i], "0", 1);
        if (r < 0)
            child_fail(plan->report_fd, SBX_STAGE_CGROUP, (int)-r, 0);
    }
    r = sbx_call(SBX_NR_mount, 0, "/", 0, SBX_MS_REC | SBX_MS_PRIVATE, 0);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_PRIVATE, (int)-r, 0);
    r = sbx_open_trees(plan->rootfs, plan->rootfs_length, trees, &detail);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_MOUNTS, (int)-r, detail);
    r = sbx_read_all(plan->go_fd, &go, 1); /* the id maps are written */
    if (r >= 0)
        r = sbx_become(0, 0, plan->single_id);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_MAPS, (int)-r, 0);
    r = keyring_drop(plan->allow_user_namespaces, &kept);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_FORGO, (int)-r, 0);
    root = sbx_new_root();
    if (root < 0)
        child_fail(plan->report_fd, SBX_STAGE_ROOT, -root, 0);
    r = sbx_build_root(root, plan->rootfs, plan->rootfs_length, trees, &detail);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_MOUNTS, (int)-r, detail);
    r = sbx_enter_root(root);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_PIVOT, (int)-r, 0);
    r = sbx_call(SBX_NR_sethostname, "sandbox", 7);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_HOSTNAME, (int)-r, 0);
    sbx_call(SBX_NR_setsid);
    r = place_fds(fds, nfds);
    if (r < 0)
        child_fail(plan->report_fd, SBX_STAGE_FDS, (int)-r, 0);
    /* The program's image and the report end with exec; the others are the nursery's. */
    for (int fd = 6; fd <= 7; fd++)
        sbx_call(SBX_NR_fcntl, fd, 2 /* F_SETFD */, 1 /* FD_CLOEXEC */);
    r = sbx_close_from(nfds);
    if (r < 0)
        child_fail(7, SBX_STAGE_FDS, (int)-r, 0);
    done.detail = kept;
    if (kept)
        sbx_write_all(7, &done, sizeof(done));
    r = sbx_call(SBX_NR_execveat, 6, "", plan->argv, plan->envp, SBX_AT_EMPTY_PATH);
    child_fail(7, SBX_STAGE_EXEC, (int)-r, 0);
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
    sbx_call(SBX_NR_rt_sigprocmask, 2, &old, 0, sizeof(uint64_t));
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
    const int fds[] = {wait_fd, program_fd, report_fd};
    uint64_t old;
    long pid, r = all_signals_blocked(&old);

    if (r < 0)
        return (int)r;
    pid = sbx_call(SBX_NR_clone3, &args, sizeof(args));
    if (pid == 0) {
        default_signals();
        r = place_fds(fds, ARRAY_SIZE(fds));
        if (r >= 0)
            r = sbx_call(SBX_NR_fcntl, 1, 2 /* F_SETFD */, 1 /* FD_CLOEXEC */);
        if (r >= 0)
            r = sbx_close_from(ARRAY_SIZE(fds));
        if (r < 0)
            child_fail(report_fd, SBX_STAGE_FDS, (int)-r, 0);
        r = sbx_call(SBX_NR_execveat, 1, "", argv, envp, SBX_AT_EMPTY_PATH);
        child_fail(2, SBX_STAGE_EXEC, (int)-r, 0);
    }
    sbx_call(SBX_NR_rt_sigprocmask, 2, &old, 0, sizeof(uint64_t));
    return (int)pid;
}

/* The engine itself: no core file and no ptrace by others of its uid; its /proc/PID belongs to root. */
int
sbx_hide_self(void)
{
    return (int)sbx_call(SBX_NR_prctl, SBX_PR_SET_DUMPABLE, 0, 0, 0, 0);
}
