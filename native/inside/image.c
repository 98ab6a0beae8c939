/* sandboxd.inside._image: the memory of a zygote, arranged so that forking it is cheap. Limited API, no cffi.
 *
 * fork(2) copies page tables of anonymous memory, and of private file mappings that were ever written. An interpreter
 * with libraries has 40 to 100 MB of the first kind. share_heap() moves it into a memfd, seals that and maps it
 * privately over the same addresses: nothing of it is copied any more, a cell's reads are served from the page cache,
 * its writes make pages of its own, and no cell can change what another sees. What remains is the price of the
 * faults, which record() measures in a child that does once what every cell does, and populate() pays at once.
 *
 * What is moved, and why only that. A private file mapping differs from anonymous memory in three ways that a program
 * could meet: mremap(2) beyond the end of the file gives pages whose use is SIGBUS, a hole of the file that is read
 * would be filled for good at the reader's expense, and MADV_DONTNEED brings the content of the file back, not zeros.
 * glibc's heap, pymalloc's arenas and the data of libraries rely on none of that; an allocator that a library brings
 * along may (jemalloc counts on zeros). So the mappings are taken by their owner, never because they look alike, malloc
 * is kept from giving a block a mapping of its own, and pages that were never touched stay as they are.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <link.h>
#include <malloc.h>

#include "sandboxd.h"

#define PAGE 4096UL
#define ARENA_ALIGNMENT (2UL << 20)
#define PAGE_DOWN(x) ((x) & ~(PAGE - 1))
#define PAGE_UP(x) PAGE_DOWN((x) + PAGE - 1)

/* Bits of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst). */
#define PM_EXCLUSIVE (1ULL << 56)
#define PM_FILE (1ULL << 61)
#define PM_SWAPPED (1ULL << 62)
#define PM_PRESENT (1ULL << 63)

enum {
    CHUNK = 4 << 20,          /* moved at a time: so much memory is there twice */
    GAP = 16,                 /* untouched pages in a row that are left out rather than stored as zeros */
    RANGES = 8192,            /* of moved or of recorded addresses */
    SMAPS_BYTES = 64 << 20,   /* reserved, not touched: some 800 bytes a mapping */
    ARENA_BYTES = 1 << 30,    /* reserved, not touched: for pymalloc's arenas, to lie side by side */
    TLS_BELOW = 64 << 10,     /* around the thread pointer: the kernel writes there (rseq) at any time */
    TLS_ABOVE = 8 << 10,
    POPULATE_PAGES = 32,      /* between two looks for a packet; some 100 us */
};

struct range {
    uint64_t start, end;
};

/* One mapping, as /proc/self/smaps has it. */
struct area {
    uint64_t start, end, anonymous_kb;
    int prot, is_private, is_heap, is_plain; /* plain: no stack, no vdso, no flag that asks for more care */
    int has_file;
};

/* PyObjectArenaAllocator and its two functions (Include/cpython/pymem.h): the same since 3.4, outside the limited API,
 * and so weak: without them arenas stay where they are. */
struct arena_allocator {
    void *ctx;
    void *(*alloc)(void *ctx, size_t size);
    void (*free)(void *ctx, void *at, size_t size);
};
extern void PyObject_GetArenaAllocator(struct arena_allocator *allocator) __attribute__((weak));
extern void PyObject_SetArenaAllocator(struct arena_allocator *allocator) __attribute__((weak));
extern int mallopt(int parameter, int value) __attribute__((weak)); /* musl has none */

static struct {
    int gathered, shared;
    struct range arenas;  /* reserved; used up to arenas_used */
    uint64_t arenas_used;
    struct arena_allocator before;
    struct range startup[64]; /* anonymous mappings of the interpreter before any library was loaded */
    size_t nstartup;
    const struct range *recorded; /* lowest bit of start: to be written, not only read; all zero: an end of populate() */
    size_t nrecorded, populated; /* ranges; populate() goes on after the latter */
} image;

static long
map_anonymous(uint64_t at, size_t length, int prot)
{
    return sbx_call(SBX_NR_mmap, at, length, prot, SBX_MAP_PRIVATE | SBX_MAP_ANONYMOUS | SBX_MAP_NORESERVE | (at ? SBX_MAP_FIXED : 0),
                    -1, 0);
}

static int
is_error(long r)
{
    return r < 0 && r > -4096;
}

static PyObject *
raise_errno(long r)
{
    errno = (int)-r;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* pymalloc's arenas */

static void *
arena_alloc(void *ctx, size_t size)
{
    uint64_t at = image.arenas_used;

    if (at + size > image.arenas.end || sbx_call(SBX_NR_mprotect, at, size, SBX_PROT_READ | SBX_PROT_WRITE) < 0)
        return image.before.alloc(ctx, size);
    image.arenas_used += size;
    return (void *)(uintptr_t)at;
}

/* The last one is given back to the reserve; any other leaves a hole, as munmap always does. */
static void
arena_free(void *ctx, void *pointer, size_t size)
{
    uint64_t at = (uint64_t)(uintptr_t)pointer;

    if (at < image.arenas.start || at >= image.arenas.end) {
        image.before.free(ctx, pointer, size);
        return;
    }
    map_anonymous(at, size, 0);
    if (at + size == image.arenas_used)
        image.arenas_used = at;
}

/* Reading /proc */

static int
is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
}

static const char *
hex(const char *at, uint64_t *value)
{
    for (*value = 0; is_hex(*at); at++)
        *value = *value << 4 | (uint64_t)(*at <= '9' ? *at - '0' : *at - 'a' + 10);
    return at;
}

static int
starts_with(const char *text, const char *word)
{
    while (*word != '\0')
        if (*text++ != *word++)
            return 0;
    return 1;
}

static const char *
next_line(const char *at)
{
    while (*at != '\0' && *at != '\n')
        at++;
    return *at == '\0' ? NULL : at + 1;
}

/* VmFlags that mean: wiped on fork, not forked, droppable, device or raw frames, huge or shadow-stack or locked or
 * sealed, grows down, watched by userfaultfd. */
static int
flags_are_plain(const char *at)
{
    static const char odd[] = "wf dc dp io pf ht ss lo sl gd um uw ui ar ";

    while (*at == ' ')
        at++;
    while (is_hex(*at) || (*at >= 'a' && *at <= 'z') || *at == '?') {
        for (const char *o = odd; *o != '\0'; o += 3)
            if (at[0] == o[0] && at[1] == o[1])
                return 0;
        at += 2;
        while (*at == ' ')
            at++;
    }
    return 1;
}

/* "START-END PERM OFFSET DEVICE INODE NAME" of maps and smaps. NULL when the line is none such. */
static const char *
parse_area(const char *at, struct area *area)
{
    uint64_t skipped;
    const char *p;

    if (!is_hex(*at))
        return NULL;
    p = hex(at, &area->start);
    if (*p != '-')
        return NULL;
    p = hex(p + 1, &area->end);
    area->prot = (p[1] == 'r' ? SBX_PROT_READ : 0) | (p[2] == 'w' ? SBX_PROT_WRITE : 0) | (p[3] == 'x' ? SBX_PROT_EXEC : 0);
    area->is_private = p[4] == 'p';
    area->anonymous_kb = 0;
    p = hex(p + 6, &skipped);     /* offset */
    p = hex(p + 1, &skipped);     /* device */
    p = hex(p + 1, &skipped) + 1; /* its minor number */
    area->has_file = *p != '0';
    while (*p != ' ' && *p != '\n')
        p++;
    while (*p == ' ')
        p++;
    area->is_heap = starts_with(p, "[heap]");
    area->is_plain = *p != '[' || area->is_heap || starts_with(p, "[anon:");
    return p;
}

/* All of a file of /proc into fresh memory, with a zero behind it. */
static const char *
read_proc(const char *path, size_t room)
{
    long fd, n, at = map_anonymous(0, room, SBX_PROT_READ | SBX_PROT_WRITE);
    size_t length = 0;

    if (is_error(at))
        return NULL;
    fd = sbx_call(SBX_NR_openat, SBX_AT_FDCWD, path, SBX_O_RDONLY | SBX_O_CLOEXEC, 0);
    do {
        n = fd < 0 ? fd : sbx_call(SBX_NR_read, fd, at + (long)length, room - 1 - length);
        length += n > 0 ? (size_t)n : 0;
    } while (n > 0 && length < room - 1);
    sbx_close((int)fd);
    if (n == 0)
        return (const char *)(uintptr_t)at;
    sbx_call(SBX_NR_munmap, at, room);
    return NULL;
}

/* The next mapping of *text* with its Anonymous and VmFlags lines; NULL at the end. */
static const char *
next_area(const char *text, struct area *area)
{
    const char *line = text;

    while (line != NULL && parse_area(line, area) == NULL)
        line = next_line(line);
    if (line == NULL)
        return NULL;
    for (line = next_line(line); line != NULL && !is_hex(*line); line = next_line(line)) {
        if (starts_with(line, "Anonymous:")) {
            const char *p = line + 10;

            while (*p == ' ')
                p++;
            for (; *p >= '0' && *p <= '9'; p++)
                area->anonymous_kb = area->anonymous_kb * 10 + (uint64_t)(*p - '0');
        } else if (starts_with(line, "VmFlags:")) {
            area->is_plain &= flags_are_plain(line + 8);
        }
    }
    return line == NULL ? "" : line;
}

/* What belongs to whom */

struct known {
    struct range *ranges;
    size_t count;
};

static void
add(struct known *known, uint64_t start, uint64_t end)
{
    if (start < end && known->count < RANGES)
        known->ranges[known->count++] = (struct range){start, end};
}

/* The writable data of one library: zeros behind it, and what the loader wrote and then made read-only, included. */
static int
add_library(struct dl_phdr_info *info, size_t size, void *data)
{
    struct known *known = data;

    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        uint64_t start = info->dlpi_addr + segment->p_vaddr;

        if (segment->p_type == PT_LOAD && (segment->p_flags & (PF_W | PF_X)) == PF_W)
            add(known, PAGE_DOWN(start), PAGE_UP(start + segment->p_memsz));
    }
    return 0;
}

static void
sort(struct known *known)
{
    for (size_t gap = known->count / 2; gap > 0; gap /= 2) /* Shell's: nearly sorted, a few hundred */
        for (size_t i = gap; i < known->count; i++)
            for (size_t j = i; j >= gap && known->ranges[j].start < known->ranges[j - gap].start; j -= gap) {
                struct range swap = known->ranges[j];

                known->ranges[j] = known->ranges[j - gap];
                known->ranges[j - gap] = swap;
            }
}

/* The move */

struct move {
    int fd, pagemap;
    uint64_t offset, thread_pointer;
    long error;
};

/* Store and map *start* to *end*. Between the two nothing else runs here: one thread, signals blocked, and no memory
 * but this stack is written. */
static void
move_pages(struct move *move, uint64_t start, uint64_t end, int prot)
{
    while (start < end && move->error == 0) {
        uint64_t length = end - start < CHUNK ? end - start : CHUNK;
        long r = sbx_write_all(move->fd, (const void *)(uintptr_t)start, length);

        if (r >= 0)
            r = sbx_call(SBX_NR_mmap, start, length, prot, SBX_MAP_PRIVATE | SBX_MAP_FIXED, move->fd, move->offset);
        if (is_error(r)) {
            move->error = r;
            return;
        }
        move->offset += length;
        start += length;
    }
}

/* Those pages of *start* to *end* that were ever touched, and short gaps between them. */
static void
move_touched(struct move *move, uint64_t start, uint64_t end, int prot)
{
    uint64_t from = start, bits[512];
    unsigned int empty = 0;

    while (start < end && move->error == 0) {
        uint64_t pages = (end - start) / PAGE;
        long n;

        if (pages > ARRAY_SIZE(bits))
            pages = ARRAY_SIZE(bits);
        n = sbx_call(SBX_NR_pread64, move->pagemap, bits, pages * 8, start / PAGE * 8);
        if (n != (long)pages * 8) {
            move->error = n < 0 ? n : -SBX_EIO;
            return;
        }
        for (uint64_t i = 0; i < pages; i++, start += PAGE) {
            if (bits[i] & (PM_PRESENT | PM_SWAPPED)) {
                if (empty >= GAP || empty * PAGE == start - from)
                    from = start;
                empty = 0;
            } else if (++empty == GAP && from < start - (GAP - 1) * PAGE) {
                move_pages(move, from, start - (GAP - 1) * PAGE, prot);
            }
        }
    }
    if (empty < GAP)
        move_pages(move, from, end - empty * PAGE, prot);
}

static void
move_area(struct move *move, const struct area *area, uint64_t start, uint64_t end)
{
    uint64_t tls = PAGE_DOWN(move->thread_pointer) - TLS_BELOW, tls_end = PAGE_UP(move->thread_pointer) + TLS_ABOVE;

    start = start > area->start ? start : area->start;
    end = end < area->end ? end : area->end;
    if (start >= end)
        return;
    if (start < tls_end && tls < end && !area->has_file) {
        move_area(move, area, start, tls);
        move_area(move, area, tls_end, end);
    } else if (area->has_file) {
        move_pages(move, start, end, area->prot);
    } else {
        move_touched(move, start, end, area->prot);
    }
}

static int
is_movable(const struct area *area)
{
    return area->is_private && area->is_plain && (area->prot & (SBX_PROT_READ | SBX_PROT_EXEC)) == SBX_PROT_READ && area->anonymous_kb > 0;
}

static void
move_known(struct move *move, const char *smaps, const struct known *known)
{
    struct area area;
    size_t i = 0;

    for (const char *at = smaps; (at = next_area(at, &area)) != NULL && move->error == 0;) {
        while (i < known->count && known->ranges[i].end <= area.start)
            i++;
        if (!is_movable(&area))
            continue;
        if (area.is_heap) {
            move_area(move, &area, area.start, area.end);
            continue;
        }
        for (size_t j = i; j < known->count && known->ranges[j].start < area.end; j++)
            move_area(move, &area, known->ranges[j].start, known->ranges[j].end);
    }
}

PyDoc_STRVAR(gather_doc, "gather_heap()\n\n"
"Before any library is imported: from now on small objects lie in one place, and malloc gives no block a mapping of its\n"
"own, so that share_heap() can move them. Raises OSError.");

static PyObject *
image_gather(PyObject *self, PyObject *args)
{
    const char *maps, *at;
    struct area area;
    long r;

    (void)self;
    (void)args;
    if (image.gathered)
        Py_RETURN_NONE;
    maps = read_proc("/proc/self/maps", SMAPS_BYTES);
    if (maps == NULL)
        return raise_errno(-SBX_EIO);
    for (at = maps; (at = next_area(at, &area)) != NULL;)
        if (area.is_private && area.is_plain && !area.has_file && !area.is_heap && area.prot == (SBX_PROT_READ | SBX_PROT_WRITE) &&
            !(area.start <= (uintptr_t)maps && (uintptr_t)maps < area.end) && image.nstartup < ARRAY_SIZE(image.startup))
            image.startup[image.nstartup++] = (struct range){area.start, area.end};
    sbx_call(SBX_NR_munmap, maps, SMAPS_BYTES);
    if (mallopt != NULL)
        mallopt(M_MMAP_MAX, 0);
    if (PyObject_GetArenaAllocator != NULL && PyObject_SetArenaAllocator != NULL) {
        struct arena_allocator ours = {.alloc = arena_alloc, .free = arena_free};

        r = map_anonymous(0, ARENA_BYTES, 0);
        if (is_error(r))
            return raise_errno(r);
        image.arenas.end = (uint64_t)r + ARENA_BYTES;
        /* As pymalloc's address tree likes them best, and huge pages. */
        image.arenas.start = image.arenas_used = ((uint64_t)r + ARENA_ALIGNMENT - 1) & ~(ARENA_ALIGNMENT - 1);
        sbx_call(SBX_NR_munmap, r, image.arenas.start - (uint64_t)r);
        PyObject_GetArenaAllocator(&image.before);
        ours.ctx = image.before.ctx;
        PyObject_SetArenaAllocator(&ours);
    }
    image.gathered = 1;
    Py_RETURN_NONE;
}

/* What programs are to find: arenas and large blocks in mappings of their own. Any call of mallopt() ends glibc's habit
 * of raising these two thresholds as blocks are freed, so they get the values that it would arrive at: without that
 * every temporary array of 128 KiB would cost a mapping and its faults. */
static void
restore_allocators(void)
{
    if (!image.gathered)
        return;
    if (mallopt != NULL) {
        mallopt(M_MMAP_MAX, 65536);
        mallopt(M_MMAP_THRESHOLD, 32 << 20);
        mallopt(M_TRIM_THRESHOLD, 64 << 20);
    }
    if (image.arenas.end > image.arenas.start) {
        PyObject_SetArenaAllocator(&image.before);
        sbx_call(SBX_NR_munmap, image.arenas_used, image.arenas.end - image.arenas_used);
    }
    image.gathered = 0;
}

static long
make_memfd(void)
{
    long r = sbx_call(SBX_NR_memfd_create, "sandboxd-image", SBX_MFD_CLOEXEC | SBX_MFD_ALLOW_SEALING | SBX_MFD_NOEXEC_SEAL);

    if (r == -SBX_EINVAL)
        r = sbx_call(SBX_NR_memfd_create, "sandboxd-image", SBX_MFD_CLOEXEC | SBX_MFD_ALLOW_SEALING);
    return r;
}

PyDoc_STRVAR(share_doc, "share_heap(move=True) -> int\n\n"
"When all is imported and nothing more is written: move the heap and the data of libraries into a sealed memfd. Returns\n"
"the bytes moved; 0 when the kernel gives no memfd that can be sealed, or when *move* is false, and all stays as it was.\n"
"Raises OSError when it failed half way: this process is then of no more use.");

static PyObject *
image_share(PyObject *self, PyObject *args)
{
    struct move move = {.pagemap = -1};
    struct known known = {0};
    const char *smaps = NULL;
    uint64_t all = ~0ULL, mask;
    int wanted = 1;
    long r;

    (void)self;
    if (!PyArg_ParseTuple(args, "|p:share_heap", &wanted))
        return NULL;
    if (image.shared)
        wanted = 0;
    known.count = image.gathered ? image.nstartup : 0;
    restore_allocators();
    if (!wanted || known.count == 0)
        return PyLong_FromLong(0);
    r = make_memfd();
    if (r < 0)
        return PyLong_FromLong(0);
    move.fd = (int)r;
    r = sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/self/pagemap", SBX_O_RDONLY | SBX_O_CLOEXEC, 0);
    if (r >= 0) {
        move.pagemap = (int)r;
        r = map_anonymous(0, RANGES * sizeof(struct range), SBX_PROT_READ | SBX_PROT_WRITE);
    }
    if (is_error(r)) {
        sbx_close(move.pagemap);
        sbx_close(move.fd);
        return PyLong_FromLong(0);
    }
    known.ranges = (struct range *)(uintptr_t)r;
    for (size_t i = 0; i < image.nstartup; i++)
        known.ranges[i] = image.startup[i];
    add(&known, image.arenas.start, image.arenas_used);
    dl_iterate_phdr(add_library, &known);
    sort(&known);
    /* Two of them may share a page or more (data that ends where a mapping of the start begins): no page twice. */
    for (size_t i = 1; i < known.count; i++)
        if (known.ranges[i].start < known.ranges[i - 1].end) {
            known.ranges[i].start = known.ranges[i - 1].end;
            if (known.ranges[i].end < known.ranges[i].start)
                known.ranges[i].end = known.ranges[i].start;
        }
    image.shared = 1;
    sbx_call(SBX_NR_arch_prctl, SBX_ARCH_GET_FS, &move.thread_pointer);
    sbx_call(SBX_NR_rt_sigprocmask, 0 /* SIG_BLOCK */, &all, &mask, 8);
    smaps = read_proc("/proc/self/smaps", SMAPS_BYTES);
    if (smaps == NULL)
        move.error = -SBX_EIO;
    else
        move_known(&move, smaps, &known);
    if (move.error == 0)
        move.error = sbx_call(SBX_NR_fcntl, move.fd, SBX_F_ADD_SEALS, SBX_SEALS_ALL);
    sbx_call(SBX_NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &mask, 0, 8);
    sbx_call(SBX_NR_munmap, smaps, SMAPS_BYTES);
    sbx_call(SBX_NR_munmap, known.ranges, RANGES * sizeof(struct range));
    sbx_close(move.pagemap);
    sbx_close(move.fd);
    if (move.error < 0)
        return raise_errno(move.error);
    return PyLong_FromUnsignedLongLong(move.offset);
}

PyDoc_STRVAR(become_doc, "can_become_writable(start, end, protection) -> bool\n\n"
"Whether mprotect(2) gives write access to the pages from *start* to *end*, whose protection stays what it is; true, too,\n"
"where that cannot be told.");

static PyObject *
image_can_become_writable(PyObject *self, PyObject *args)
{
    unsigned long long start, end;
    int prot;
    long r;

    (void)self;
    if (!PyArg_ParseTuple(args, "KKi:can_become_writable", &start, &end, &prot))
        return NULL;
    r = sbx_call(SBX_NR_mprotect, start, end - start, prot | SBX_PROT_WRITE);
    if (r == 0) {
        r = sbx_call(SBX_NR_mprotect, start, end - start, prot);
        return r < 0 ? raise_errno(r) : PyBool_FromLong(1);
    }
    return PyBool_FromLong(r != -SBX_EACCES); /* EPERM of mseal(2), for example, says nothing of the mapping */
}

PyDoc_STRVAR(private_doc, "make_private(start, end, protection)\n\n"
"Put a private copy of their content, in a sealed memfd like the heap's, in the place of the shared pages from *start* to\n"
"*end*. Neither differs from the other in what mremap(2) and MADV_DONTNEED do. Raises OSError; EFAULT for a page that\n"
"cannot be read.");

static PyObject *
image_make_private(PyObject *self, PyObject *args)
{
    struct move move = {.pagemap = -1};
    unsigned long long start, end;
    uint64_t all = ~0ULL, mask;
    int prot;
    long r;

    (void)self;
    if (!PyArg_ParseTuple(args, "KKi:make_private", &start, &end, &prot))
        return NULL;
    r = make_memfd();
    if (r < 0)
        return raise_errno(r);
    move.fd = (int)r;
    sbx_call(SBX_NR_rt_sigprocmask, 0 /* SIG_BLOCK */, &all, &mask, 8);
    if (!(prot & SBX_PROT_READ))
        move.error = sbx_call(SBX_NR_mprotect, start, end - start, prot | SBX_PROT_READ);
    move_pages(&move, start, end, prot);
    if (move.error == 0)
        move.error = sbx_call(SBX_NR_fcntl, move.fd, SBX_F_ADD_SEALS, SBX_SEALS_ALL);
    sbx_call(SBX_NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &mask, 0, 8);
    sbx_close(move.fd);
    if (move.error < 0)
        return raise_errno(move.error);
    Py_RETURN_NONE;
}

/* What a run touches */

struct record {
    struct range *ranges;
    size_t count;
};

static void
record_page(struct record *record, uint64_t at, uint64_t write)
{
    struct range *last = record->count > 0 ? &record->ranges[record->count - 1] : NULL;

    if (last != NULL && last->end == at && (last->start & 1) == write)
        last->end += PAGE;
    else if (record->count < RANGES)
        record->ranges[record->count++] = (struct range){at | write, at + PAGE};
}

static long
record_area(struct record *record, const struct area *area, int pagemap)
{
    uint64_t bits[512];

    for (uint64_t at = area->start; at < area->end;) {
        uint64_t pages = (area->end - at) / PAGE;
        long n;

        if (pages > ARRAY_SIZE(bits))
            pages = ARRAY_SIZE(bits);
        n = sbx_call(SBX_NR_pread64, pagemap, bits, pages * 8, at / PAGE * 8);
        if (n != (long)pages * 8)
            return n < 0 ? n : -SBX_EIO;
        for (uint64_t i = 0; i < pages; i++, at += PAGE) {
            if (!(bits[i] & PM_PRESENT))
                continue;
            if (bits[i] & PM_FILE)
                record_page(record, at, 0);
            else if (bits[i] & PM_EXCLUSIVE && area->prot & SBX_PROT_WRITE)
                record_page(record, at, 1);
        }
    }
    return 0;
}

PyDoc_STRVAR(record_doc, "record(fd)\n\n"
"In a child of the zygote that has done what a cell does: write to *fd* which pages it has made its own and which it\n"
"maps. Raises OSError.");

static PyObject *
image_record(PyObject *self, PyObject *args)
{
    struct record record = {0};
    const char *maps;
    struct area area;
    long r, pagemap;
    int fd;

    (void)self;
    if (!PyArg_ParseTuple(args, "i:record", &fd))
        return NULL;
    r = map_anonymous(0, RANGES * sizeof(struct range), SBX_PROT_READ | SBX_PROT_WRITE);
    if (is_error(r))
        return raise_errno(r);
    record.ranges = (struct range *)(uintptr_t)r;
    pagemap = sbx_call(SBX_NR_openat, SBX_AT_FDCWD, "/proc/self/pagemap", SBX_O_RDONLY | SBX_O_CLOEXEC, 0);
    if (pagemap < 0)
        return raise_errno(pagemap);
    maps = read_proc("/proc/self/maps", SMAPS_BYTES);
    r = maps == NULL ? -SBX_EIO : 0;
    for (const char *at = maps; r == 0 && (at = next_area(at, &area)) != NULL;)
        if (area.is_private && area.prot & SBX_PROT_READ &&
            !(area.start <= (uintptr_t)maps && (uintptr_t)maps < area.end) &&
            !(area.start <= (uintptr_t)record.ranges && (uintptr_t)record.ranges < area.end))
            r = record_area(&record, &area, (int)pagemap);
    if (r == 0)
        r = sbx_write_all(fd, record.ranges, record.count * sizeof(struct range));
    sbx_close((int)pagemap);
    if (r < 0)
        return raise_errno(r);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(load_survey_doc, "load_survey(fd) -> int\n\n"
"Keep what record() writes to the other end of *fd*, until its end, for populate(); behind what is kept already. A range\n"
"of zeros ends a part of what populate() does. Returns the pages that came. Raises OSError.");

static PyObject *
image_load_survey(PyObject *self, PyObject *args)
{
    const size_t room = RANGES * sizeof(struct range), known = image.nrecorded;
    size_t length = known * sizeof(struct range);
    uint64_t pages = 0;
    long r, n;
    int fd;

    (void)self;
    if (!PyArg_ParseTuple(args, "i:load_survey", &fd))
        return NULL;
    if (image.recorded == NULL) {
        r = map_anonymous(0, room, SBX_PROT_READ | SBX_PROT_WRITE);
        if (!is_error(r))
            image.recorded = (const struct range *)(uintptr_t)r;
    } else {
        r = sbx_call(SBX_NR_mprotect, image.recorded, room, SBX_PROT_READ | SBX_PROT_WRITE);
    }
    if (is_error(r))
        return raise_errno(r);
    do {
        n = sbx_call(SBX_NR_read, fd, (uintptr_t)image.recorded + length, room - length);
        length += n > 0 ? (size_t)n : 0;
    } while (n == -SBX_EINTR || (n > 0 && length < room));
    sbx_call(SBX_NR_mprotect, image.recorded, room, SBX_PROT_READ);
    image.nrecorded = n < 0 ? known : length / sizeof(struct range);
    for (size_t i = known; i < image.nrecorded; i++)
        pages += (image.recorded[i].end - image.recorded[i].start) / PAGE;
    return PyLong_FromUnsignedLongLong(pages);
}

static int
has_packet(int fd)
{
    struct sbx_pollfd asked = {.fd = fd, .events = SBX_POLLIN};

    return sbx_call(SBX_NR_poll, &asked, 1, 0) > 0;
}

PyDoc_STRVAR(waiting_doc, "waiting(fd) -> bool\n\nWhether a packet, or the end, can be read from *fd* now.");

static PyObject *
image_waiting(PyObject *self, PyObject *args)
{
    int fd;

    (void)self;
    if (!PyArg_ParseTuple(args, "i:waiting", &fd))
        return NULL;
    return PyBool_FromLong(has_packet(fd));
}

PyDoc_STRVAR(populate_doc, "populate(fd) -> bool\n\n"
"In a cell: make the remembered pages its own, or map them, now rather than fault by fault; the next part of them with\n"
"each call. Stops when a packet comes on *fd*. Returns whether the part was done; false too on a kernel before 5.14,\n"
"which cannot.");

static PyObject *
image_populate(PyObject *self, PyObject *args)
{
    uint64_t since = 0;
    size_t i = image.populated;
    int fd, done = i < image.nrecorded;

    (void)self;
    if (!PyArg_ParseTuple(args, "i:populate", &fd))
        return NULL;
    for (; i < image.nrecorded && image.recorded[i].end != 0; i++) {
        uint64_t start = PAGE_DOWN(image.recorded[i].start), length = image.recorded[i].end - start;
        /* What is gone since, or was mapped by the recording child alone, is refused: nothing is lost. */
        long r = sbx_call(SBX_NR_madvise, start, length,
                          image.recorded[i].start & 1 ? SBX_MADV_POPULATE_WRITE : SBX_MADV_POPULATE_READ);

        since += length / PAGE;
        if (since >= POPULATE_PAGES) {
            since = 0;
            done = !has_packet(fd);
        }
        if (r == -SBX_EINVAL && i == 0)
            done = 0;
        if (!done)
            break;
    }
    image.populated = done ? i + 1 : image.nrecorded;
    return PyBool_FromLong(done);
}

PyDoc_STRVAR(fill_doc, "fill_random(address, length)\n\n"
"Random bytes of the kernel straight into memory: the state of a generator that has no cheaper way in. Raises OSError.");

static PyObject *
image_fill(PyObject *self, PyObject *args)
{
    unsigned long long at;
    Py_ssize_t length;

    (void)self;
    if (!PyArg_ParseTuple(args, "Kn:fill_random", &at, &length))
        return NULL;
    while (length > 0) {
        long n = sbx_call(SBX_NR_getrandom, at, length, 0);

        if (n == -SBX_EINTR)
            continue;
        if (n < 0)
            return raise_errno(n);
        at += (unsigned long long)n;
        length -= n;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"gather_heap", image_gather, METH_NOARGS, gather_doc},
    {"share_heap", image_share, METH_VARARGS, share_doc},
    {"can_become_writable", image_can_become_writable, METH_VARARGS, become_doc},
    {"make_private", image_make_private, METH_VARARGS, private_doc},
    {"record", image_record, METH_VARARGS, record_doc},
    {"load_survey", image_load_survey, METH_VARARGS, load_survey_doc},
    {"populate", image_populate, METH_VARARGS, populate_doc},
    {"waiting", image_waiting, METH_VARARGS, waiting_doc},
    {"fill_random", image_fill, METH_VARARGS, fill_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_image",
    .m_doc = "The memory of a zygote: shared with its cells, and made theirs ahead of time.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__image(void);

PyMODINIT_FUNC
PyInit__image(void)
{
    return PyModule_Create(&module);
}
