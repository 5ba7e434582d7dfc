/* Preloaded, it makes every read of a file whose path contains $EIO_PATH fail with EIO, as a broken disk does. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_broken(int file) {
    const char *part = getenv("EIO_PATH");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = part && *part ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, part) != NULL;
}

/* The C library's function of this name, unless the file is broken. */
#define FAILING(name, parameters, arguments)                     \
    ssize_t name parameters {                                    \
        static ssize_t (*real) parameters;                       \
        if (!real) real = dlsym(RTLD_NEXT, #name);               \
        if (is_broken(file)) { errno = EIO; return -1; }         \
        return real arguments;                                   \
    }

FAILING(read, (int file, void *to, size_t size), (file, to, size))
FAILING(pread, (int file, void *to, size_t size, off_t at), (file, to, size, at))
FAILING(pread64, (int file, void *to, size_t size, off64_t at), (file, to, size, at))
FAILING(readv, (int file, const struct iovec *to, int parts), (file, to, parts))
FAILING(preadv, (int file, const struct iovec *to, int parts, off_t at), (file, to, parts, at))
FAILING(preadv64, (int file, const struct iovec *to, int parts, off64_t at), (file, to, parts, at))
