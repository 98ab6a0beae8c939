/* The compiled filter. Built elsewhere (sandboxd/seccomp/__init__.py); here it is only installed. */
#include "sandboxd.h"

/* seccomp(2). No SECCOMP_FILTER_FLAG_SPEC_ALLOW: the kernel's default for speculation stays. One thread exists here, so
 * no TSYNC either. Needs no_new_privs. */
int
sbx_seccomp_install(const struct sbx_filter *filter)
{
    return (int)sbx_call(SBX_NR_seccomp, SBX_SECCOMP_SET_MODE_FILTER, 0, filter);
}
