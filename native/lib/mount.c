/* Mounts through descriptors: a file system is made, dressed and only then put in place, so that nobody ever sees it
 * writable or with set-user-id programs on it. Runs as the mapped root of a fresh user and mount namespace. */
#include "sandboxd.h"

/* fsopen(2), fsconfig(2), fsmount(2), Linux 5.2. *options* is "key=value,key=value". Returns the detached mount. */
int
sbx_make_fs(const char *type, const char *options, uint64_t attrs)
{
    char word[64];
    int context = (int)sbx_call(SBX_NR_fsopen, type, SBX_FSOPEN_CLOEXEC);
    long r = 0;

    if (context < 0)
        return context;
    while (*options && r >= 0) {
        size_t n = 0, value = 0;

        while (options[n] && options[n] != ',') {
            if (n + 1 >= sizeof(word)) {
                sbx_close(context);
                return -SBX_ENAMETOOLONG;
            }
            word[n] = options[n];
            if (word[n] == '=' && value == 0) {
                word[n] = '\0';
                value = n + 1;
            }
            n++;
        }
        word[n] = '\0';
        r = sbx_call(SBX_NR_fsconfig, context, SBX_FSCONFIG_SET_STRING, word, word + value, 0);
        options += n + (options[n] == ',');
    }
    if (r >= 0)
        r = sbx_call(SBX_NR_fsconfig, context, SBX_FSCONFIG_CMD_CREATE, 0, 0, 0);
    if (r >= 0)
        r = sbx_call(SBX_NR_fsmount, context, SBX_FSMOUNT_CLOEXEC, attrs);
    sbx_close(context);
    return (int)r;
}

/* move_mount(2), Linux 5.2: the detached mount onto *path* (below *dirfd* unless absolute). */
int
sbx_attach(int mount_fd, int dirfd, const char *path)
{
    return (int)sbx_call(SBX_NR_move_mount, mount_fd, "", dirfd, path, SBX_MOVE_MOUNT_F_EMPTY_PATH);
}

enum { OPS_HEADER = 8 }; /* count, reserved */

struct op_view {
    const struct sbx_op *op;
    const char *target, *source;
    const unsigned char *data;
};

static int
set_attrs(int fd, uint64_t attrs, unsigned int flags)
{
    struct sbx_mount_attr attr = {.attr_set = attrs, .propagation = SBX_MS_PRIVATE};

    /* mount_setattr(2), Linux 5.12: recursive read-only, which a bind remount never was. */
    return (int)sbx_call(SBX_NR_mount_setattr, fd, "", SBX_AT_EMPTY_PATH | flags, &attr, sizeof(attr));
}

/* An attached, still writable tmpfs for the future root. It needs a mount point of the old tree, which nothing that
 * is bound later may lie below: the planner refuses sources under /tmp. */
int
sbx_new_root(void)
{
    static const char *const places[] = {"/tmp", "/mnt", "/srv"};
    int root = sbx_make_fs("tmpfs", "mode=0755,size=16m,nr_inodes=8192", SBX_MOUNT_ATTR_NOSUID | SBX_MOUNT_ATTR_NODEV);
    int r = -SBX_EINVAL;

    if (root < 0)
        return root;
    for (size_t i = 0; i < ARRAY_SIZE(places) && r < 0; i++)
        r = sbx_attach(root, SBX_AT_FDCWD, places[i]);
    if (r < 0) {
        sbx_close(root);
        return r;
    }
    return root;
}

static int
put_file(int root, const char *target, uint32_t mode, const unsigned char *data, uint32_t length)
{
    int r, fd = (int)sbx_call(SBX_NR_openat, root, target,
                              SBX_O_WRONLY | SBX_O_CREAT | SBX_O_EXCL | SBX_O_NOFOLLOW | SBX_O_CLOEXEC, mode);

    if (fd < 0)
        return fd;
    r = sbx_write_all(fd, data, length);
    sbx_close(fd);
    return r;
}

static int
put_bind(int root, const char *target, int tree, uint32_t attrs)
{
    int r = set_attrs(tree, attrs, SBX_AT_RECURSIVE);

    if (r >= 0)
        r = sbx_attach(tree, root, target);
    sbx_close(tree);
    return r;
}

static int
put_fs(int root, const char *type, const char *target, const char *options, uint32_t attrs)
{
    int r, fd = sbx_make_fs(type, options, attrs);

    if (fd < 0)
        return fd;
    r = sbx_attach(fd, root, target);
    sbx_close(fd);
    return r;
}

/* The operation at *at, which moves behind it. -EINVAL when it does not lie whole within the buffer. */
static int
next_op(const unsigned char *ops, size_t length, size_t *at, struct op_view *view)
{
    size_t size;

    if (length < *at || length - *at < sizeof(*view->op))
        return -SBX_EINVAL;
    view->op = (const struct sbx_op *)(const void *)(ops + *at);
    size = sizeof(*view->op) + (size_t)view->op->target_len + view->op->source_len + view->op->data_len;
    if (length - *at < size || view->op->target_len == 0 || view->op->source_len == 0)
        return -SBX_EINVAL;
    view->target = (const char *)(view->op + 1);
    view->source = view->target + view->op->target_len;
    view->data = (const unsigned char *)view->source + view->op->source_len;
    if (view->target[view->op->target_len - 1] || view->source[view->op->source_len - 1])
        return -SBX_EINVAL;
    *at += (size + 7) & ~(size_t)7;
    return 0;
}

/* Clone the tree of every bind, with the engine's own ids: a source may lie below a directory that only host root may
 * search, and to the mapped root it would be closed. open_tree(2), Linux 5.2. *trees* has SBX_TREES places. */
int
sbx_open_trees(const unsigned char *ops, size_t length, int *trees, uint32_t *failed)
{
    uint32_t count, ntrees = 0;
    size_t at = OPS_HEADER;

    *failed = 0;
    if (length < OPS_HEADER)
        return -SBX_EINVAL;
    count = *(const uint32_t *)(const void *)ops;
    for (uint32_t i = 0; i < count; i++) {
        struct op_view view;
        int r = next_op(ops, length, &at, &view);

        *failed = i;
        if (r < 0)
            return r;
        if (view.op->kind != SBX_OP_BIND)
            continue;
        if (ntrees == SBX_TREES)
            return -SBX_EINVAL;
        r = (int)sbx_call(SBX_NR_open_tree, SBX_AT_FDCWD, view.source,
                          SBX_OPEN_TREE_CLONE | SBX_AT_RECURSIVE | SBX_AT_SYMLINK_NOFOLLOW | SBX_O_CLOEXEC);
        if (r < 0)
            return r;
        trees[ntrees++] = r;
    }
    return 0;
}

/* Perform the encoded operations (sandboxd/rootfs/plan.py, encode()). On failure *failed* is the index of the operation. */
int
sbx_build_root(int root, const unsigned char *ops, size_t length, const int *trees, uint32_t *failed)
{
    uint32_t count = *(const uint32_t *)(const void *)ops;
    size_t at = OPS_HEADER;

    sbx_call(SBX_NR_umask, 0);
    for (uint32_t i = 0; i < count; i++) {
        struct op_view view;
        int r = next_op(ops, length, &at, &view);

        *failed = i;
        if (r < 0)
            return r;
        switch (view.op->kind) {
        case SBX_OP_DIR:
            r = (int)sbx_call(SBX_NR_mkdirat, root, view.target, view.op->mode);
            break;
        case SBX_OP_FILE:
            r = put_file(root, view.target, view.op->mode, view.data, view.op->data_len);
            break;
        case SBX_OP_SYMLINK:
            r = (int)sbx_call(SBX_NR_symlinkat, view.source, root, view.target);
            break;
        case SBX_OP_BIND:
            r = put_bind(root, view.target, *trees++, view.op->flags);
            break;
        case SBX_OP_TMPFS:
            r = put_fs(root, "tmpfs", view.target, view.source, view.op->flags);
            break;
        case SBX_OP_PROC:
            r = put_fs(root, "proc", view.target, view.source, view.op->flags);
            break;
        default:
            r = -SBX_EINVAL;
        }
        if (r < 0)
            return r;
    }
    sbx_call(SBX_NR_umask, 022);
    return set_attrs(root, SBX_MOUNT_ATTR_RDONLY | SBX_MOUNT_ATTR_NOSUID | SBX_MOUNT_ATTR_NODEV, 0);
}

/* pivot_root(2), NOTES: with "." twice the old root lands on top of the new one and is let go at once; no directory
 * for it is needed and none can be forgotten. */
int
sbx_enter_root(int root)
{
    long r = sbx_call(SBX_NR_fchdir, root);

    if (r >= 0)
        r = sbx_call(SBX_NR_pivot_root, ".", ".");
    if (r >= 0)
        r = sbx_call(SBX_NR_umount2, ".", SBX_MNT_DETACH);
    if (r >= 0)
        r = sbx_call(SBX_NR_chdir, "/");
    return (int)r;
}
