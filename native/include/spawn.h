/* What only the engine's extension offers. */
#ifndef SANDBOXD_SPAWN_H
#define SANDBOXD_SPAWN_H

#include "sandboxd.h"

struct sbx_launch {
    const char *path;
    char *const *argv, *const *envp;
    const int *fds; /* become 0, 1, 2, ... */
    unsigned int nfds;
};

struct sbx_zygote_plan {
    const unsigned char *rootfs;
    size_t rootfs_length;
    char *const *argv, *const *envp; /* of the nursery: argv[1...] is the zygote's command */
    int go_fd;      /* one byte: go on */
    int go_write_fd; /* its other end, the engine's: with the child's copy open, the engine's death would go unseen */
    int report_fd;  /* struct sbx_report on failure, end of file on success */
    int null_fd, log_fd;
    int engine_fd;  /* nursery's end of its channel */
    int zygote_fd;  /* zygote's end of its channel */
    int owner_fd;   /* pidfd of the engine */
    int nursery_fd; /* the nursery's program */
    int broker_fd;  /* broker's end of its channel; -1: there is none */
    int userns_fd;  /* a mapped user namespace to be born in; -1: a new one, which the engine maps meanwhile */
    int single_id;     /* the namespace maps a single id */
    int cgroup_fd;    /* v2: where the process is born; -1 without */
    int tasks[8];     /* v1: where it writes 0 first thing */
    unsigned int ntasks;
    int allow_user_namespaces; /* only for tests of the other walls */
};

struct sbx_number { /* in a control file of a cgroup */
    int fd;
    char key[28]; /* empty: the file's only one */
    int64_t value;
};

struct sbx_handover { /* below a second */
    int alarm, source, channel;
    int64_t alarm_nsec;
    const char *text, *message;
    size_t text_length, message_length;
};

struct sbx_lookback {
    struct sbx_number *numbers;
    unsigned int count;
    int workspace, tmp, shm, out, err;
    int touched, full;
    char *buffer; /* both streams, one behind the other */
    size_t room, out_length, err_length;
};

/* direct.c */
int sbx_is_empty(int workspace);
int sbx_look_back(struct sbx_lookback *seen);
int sbx_alarm_new(void);
int sbx_alarm_is_set(int alarm);
int sbx_hand_over(const struct sbx_handover *given);

/* numbers.c */
void sbx_read_numbers(struct sbx_number *numbers, unsigned int count);

int sbx_launch(const struct sbx_launch *plan, int *pidfd);
int sbx_zygote_clone(const struct sbx_zygote_plan *plan, int *pidfd);
int sbx_userns_hold(int program_fd, int wait_fd, int report_fd, int *pidfd);
int sbx_hide_self(void);

#endif
