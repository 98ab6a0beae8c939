/* A program handed to a parked cell by the caller's own thread (sandboxd/client/leased.py), and the alarm by which the engine
 * hears of it without being woken for nothing: most programs are over before it rings. */
#include "spawn.h"

struct timer_ {
    int64_t interval_sec, interval_nsec, value_sec, value_nsec;
};

/* timerfd_create(2), CLOCK_MONOTONIC: the engine's, and lent to the caller. Returns a close-on-exec descriptor. */
int
sbx_alarm_new(void)
{
    return (int)sbx_call(SBX_NR_timerfd_create, 1, SBX_O_CLOEXEC | SBX_O_NONBLOCK);
}

/* 1 once it was set, rung or not; 0 before; or a negated errno. */
int
sbx_alarm_is_set(int alarm)
{
    struct timer_ left = {0};
    uint64_t rung;
    long r = sbx_call(SBX_NR_timerfd_gettime, alarm, &left);

    if (r < 0)
        return (int)r;
    if (left.value_sec || left.value_nsec)
        return 1;
    return sbx_call(SBX_NR_read, alarm, &rung, sizeof(rung)) == sizeof(rung);
}

/* In the caller: set the alarm, then write the source, then send the message: in one call, so that nothing of the
 * caller's, the interpreter's lock least of all, comes between. A cell that is dead answers an errno. */
int
sbx_hand_over(const struct sbx_handover *given)
{
    const struct timer_ once = {.value_nsec = given->alarm_nsec};
    long r = sbx_call(SBX_NR_timerfd_settime, given->alarm, 0, &once, 0);

    if (r >= 0)
        r = sbx_write_all(given->source, given->text, given->text_length);
    if (r >= 0)
        r = sbx_send_fds(given->channel, given->message, given->message_length, 0, 0);
    return r < 0 ? (int)r : 0;
}

/* Read what is there; *got counts it also when there is more than room for it (-EMSGSIZE), so that nothing is lost. */
static int
drain(int fd, char *at, size_t room, size_t *got)
{
    while (*got < room) {
        long n = sbx_call(SBX_NR_read, fd, at + *got, room - *got);

        if (n == -SBX_EAGAIN || n == 0)
            return 0;
        if (n < 0 && n != -SBX_EINTR)
            return (int)n;
        *got += n > 0 ? (size_t)n : 0;
    }
    return -SBX_EMSGSIZE;
}

/* Whether no page or no inode is free: what sandboxd/outcome/judge.py calls a full file system. statfs(2) */
static int
is_full(int fd)
{
    struct sbx_statfs st;
    long r = sbx_call(SBX_NR_fstatfs, fd, &st);

    return r < 0 ? (int)r : !st.blocks_available || !st.files_free;
}

/* Whether a tmpfs holds no file at all: 2 links, and 20 bytes for each name, "." and ".." included (mm/shmem.c). */
int
sbx_is_empty(int workspace)
{
    struct sbx_stat st;
    long r = sbx_call(SBX_NR_newfstatat, workspace, "", &st, SBX_AT_EMPTY_PATH);

    return r < 0 ? (int)r : st.nlink == 2 && st.size == 40;
}

/* In the caller, when the program says that it ended: its counters, what is in its streams, whether one of its file
 * systems is full, and whether it left the workspace as it was. */
int
sbx_look_back(struct sbx_lookback *seen)
{
    long r;

    seen->out_length = seen->err_length = 0;
    sbx_read_numbers(seen->numbers, seen->count);
    r = sbx_is_empty(seen->workspace);
    if (r < 0)
        return (int)r;
    seen->touched = !r;
    /* What cannot be asked is the engine's to find out. */
    seen->full = is_full(seen->workspace) || is_full(seen->tmp) || is_full(seen->shm);
    r = drain(seen->out, seen->buffer, seen->room, &seen->out_length);
    if (r >= 0)
        r = drain(seen->err, seen->buffer + seen->out_length, seen->room - seen->out_length, &seen->err_length);
    return r < 0 ? (int)r : 0;
}
