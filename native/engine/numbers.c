/* Numbers out of the kernel's control files: a run's counters in one call instead of twenty small ones. */
#include "spawn.h"

enum { TEXT = 4096 };

static int
is_key(const char *line, size_t length, const char *key, size_t *value)
{
    size_t n = 0;

    while (n < length && key[n] && line[n] == key[n])
        n++;
    if (key[n] || n >= length || line[n] != ' ')
        return 0;
    *value = n + 1;
    return 1;
}

static int64_t
parse(const char *text, size_t length)
{
    int64_t value = 0;
    size_t i = 0;

    while (i < length && text[i] >= '0' && text[i] <= '9') {
        if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, text[i] - '0', &value))
            return INT64_MAX; /* "unlimited" of v1 */
        i++;
    }
    return i ? value : -SBX_EINVAL;
}

/* Read each number anew: that behind its key (0 where the file has no such line), or the only one of its file. A file
 * that several ask in a row is read once. A refusal is its value, negated. */
void
sbx_read_numbers(struct sbx_number *numbers, unsigned int count)
{
    char text[TEXT];
    long length = 0;

    for (unsigned int i = 0; i < count; i++) {
        struct sbx_number *number = &numbers[i];
        size_t at = 0, end, value;

        if (i == 0 || number->fd != numbers[i - 1].fd)
            length = sbx_call(SBX_NR_pread64, number->fd, text, sizeof(text), 0);
        if (length < 0) {
            number->value = length;
            continue;
        }
        if (!number->key[0]) {
            number->value = parse(text, (size_t)length);
            continue;
        }
        number->value = 0;
        for (; at < (size_t)length; at = end + 1) {
            for (end = at; end < (size_t)length && text[end] != '\n'; end++)
                continue;
            if (is_key(text + at, end - at, number->key, &value)) {
                number->value = parse(text + at + value, end - at - value);
                break;
            }
        }
    }
}
