/* Ids, capabilities, resource limits: what a process gives up. */
#include "sandboxd.h"

/* As a mapped root with CAP_SETUID and CAP_SETGID: no supplementary groups, then the group, then the user. Leaving
 * uid 0 clears the permitted and effective sets (capabilities(7)); sbx_drop_caps() makes sure of the rest. With *single_id*
 * mapped by its own user, the kernel lets nobody give up groups (user_namespaces(7)). */
int
sbx_become(uint32_t uid, uint32_t gid, int single_id)
{
    long r = sbx_call(SBX_NR_setgroups, 0, 0);

    if (r == -SBX_EPERM && single_id)
        r = 0;
    if (r >= 0)
        r = sbx_call(SBX_NR_setresgid, gid, gid, gid);
    if (r >= 0)
        r = sbx_call(SBX_NR_setresuid, uid, uid, uid);
    return (int)r;
}

/* Needs CAP_SETPCAP. The kernel says EINVAL at the first capability that it does not know. */
int
sbx_drop_bounding(void)
{
    for (long cap = 0; cap < 64; cap++) {
        long r = sbx_call(SBX_NR_prctl, SBX_PR_CAPBSET_DROP, cap, 0, 0, 0);

        if (r == -SBX_EINVAL && cap > 0)
            return 0;
        if (r < 0)
            return (int)r;
    }
    return 0;
}

/* All four sets empty: inheritable too (CVE-2022-24769), ambient before it. */
int
sbx_drop_caps(void)
{
    struct {
        uint32_t version;
        int32_t pid;
    } header = {.version = 0x20080522 /* _LINUX_CAPABILITY_VERSION_3 */};
    uint32_t data[6] = {0};
    long r = sbx_call(SBX_NR_prctl, SBX_PR_CAP_AMBIENT, SBX_PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);

    if (r >= 0)
        r = sbx_call(SBX_NR_capset, &header, data);
    return (int)r;
}

/* Set it and look: everything after this relies on it. */
int
sbx_no_new_privs(void)
{
    long r = sbx_call(SBX_NR_prctl, SBX_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);

    if (r >= 0)
        r = sbx_call(SBX_NR_prctl, SBX_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 ? 0 : -SBX_EPERM;
    return (int)r;
}

int
sbx_set_rlimits(const struct sbx_rlimit *limits, unsigned int count)
{
    for (unsigned int i = 0; i < count; i++) {
        uint64_t pair[2] = {limits[i].soft, limits[i].hard};
        long r = sbx_call(SBX_NR_prlimit64, 0, limits[i].resource, pair, 0);

        if (r < 0)
            return (int)r;
    }
    return 0;
}

/* setfsuid(2), setfsgid(2): file system access of this thread as another id, so that files put into a cell's tmpfs
 * belong to it. Both return the previous id and no error: asking again tells whether it worked. */
int
sbx_file_ids(uint32_t uid, uint32_t gid)
{
    sbx_call(SBX_NR_setfsgid, gid);
    sbx_call(SBX_NR_setfsuid, uid);
    if ((uint32_t)sbx_call(SBX_NR_setfsuid, -1) != uid || (uint32_t)sbx_call(SBX_NR_setfsgid, -1) != gid)
        return -SBX_EPERM;
    return 0;
}
