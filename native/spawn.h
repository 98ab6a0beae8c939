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
    int cgroup_fd;    /* v2: where the process is born; -1 without */
    int tasks[8];     /* v1: where it writes 0 first thing */
    unsigned int ntasks;
    int allow_user_namespaces; /* only for tests of the other walls */
};

int sbx_launch(const struct sbx_launch *plan, int *pidfd);
int sbx_zygote_clone(const struct sbx_zygote_plan *plan, int *pidfd);
int sbx_hide_self(void);

#endif
