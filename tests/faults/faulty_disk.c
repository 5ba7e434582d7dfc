/* Preloaded, it makes the calls that concern paths with a part in common fail, as those of a broken or full disk do.

   Either the variables of the environment say which (every read, where FAULTY_PATH alone is set), or the process itself,
   with `faults_begin`. Calls are counted from 1, those of Python and of C++ alike. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char part[4096], kinds[256], told[1 << 22];
static long first, last, counted, told_size;
static int code;

/* From now on, calls number `from` to `to` of those kinds (words between spaces) fail with the error `number`. */
void faults_begin(const char *path, const char *of_kinds, long from, long to, int number) {
    pthread_mutex_lock(&lock);
    snprintf(part, sizeof part, "%s", path);
    snprintf(kinds, sizeof kinds, " %s ", of_kinds);
    first = from, last = to, code = number, counted = told_size = 0, told[0] = 0;
    pthread_mutex_unlock(&lock);
}

/* The calls so far, a line each: whether it failed (! or .), its kind and its path. */
const char *faults_told(void) { return told; }

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTY_PATH");
    if (path && *path) faults_begin(path, "read", 1, 1L << 62, EIO);
}

/* Whether this call is to fail; errno says how. */
static int fails(const char *kind, const char *path) {
    if (!part[0] || !path || !strstr(path, part)) return 0;
    char word[64];
    snprintf(word, sizeof word, " %s ", kind);
    if (!strstr(kinds, word)) return 0;
    pthread_mutex_lock(&lock);
    long number = ++counted;
    int is_broken = number >= first && number <= last, room = sizeof told - told_size;
    int size = snprintf(told + told_size, room, "%c %s %s\n", is_broken ? '!' : '.', kind, path);
    if (size < room) told_size += size;
    pthread_mutex_unlock(&lock);
    if (is_broken) errno = code;
    return is_broken;
}

static int fails_at(const char *kind, int folder, const char *name) {
    char link[64], path[8192];
    if (!part[0]) return 0;
    if (!name || name[0] == '/') return fails(kind, name);
    if (folder == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, 4095);
    if (length < 0) return 0;
    snprintf(path + length, sizeof path - length, "%s%s", *name ? "/" : "", name);
    return fails(kind, path);
}

static int fails_on(const char *kind, int file) { return fails_at(kind, file, ""); }

static const char *kind_of(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? "create" : "open"; }

/* The C library's function of this name, unless the disk is broken. */
#define CALL(type, name, parameters, arguments, broken, failure) \
    type name parameters {                                       \
        static type (*real) parameters;                          \
        if (!real) real = dlsym(RTLD_NEXT, #name);               \
        if (broken) return failure;                              \
        return real arguments;                                   \
    }
#define ON_FILE(kind, type, name, parameters, arguments) \
    CALL(type, name, parameters, arguments, fails_on(kind, file), -1)
#define ON_PATH(kind, name, parameters, arguments) CALL(int, name, parameters, arguments, fails(kind, path), -1)
#define ON_FOLDER(kind, name, parameters, arguments) \
    CALL(int, name, parameters, arguments, fails_at(kind, folder, path), -1)

ON_FILE("read", ssize_t, read, (int file, void *to, size_t size), (file, to, size))
ON_FILE("read", ssize_t, pread, (int file, void *to, size_t size, off_t at), (file, to, size, at))
ON_FILE("read", ssize_t, pread64, (int file, void *to, size_t size, off64_t at), (file, to, size, at))
ON_FILE("read", ssize_t, readv, (int file, const struct iovec *to, int parts), (file, to, parts))
ON_FILE("read", ssize_t, preadv, (int file, const struct iovec *to, int parts, off_t at), (file, to, parts, at))
ON_FILE("read", ssize_t, preadv64, (int file, const struct iovec *to, int parts, off64_t at), (file, to, parts, at))
ON_FILE("write", ssize_t, write, (int file, const void *from, size_t size), (file, from, size))
ON_FILE("write", ssize_t, pwrite, (int file, const void *from, size_t size, off_t at), (file, from, size, at))
ON_FILE("write", ssize_t, pwrite64, (int file, const void *from, size_t size, off64_t at), (file, from, size, at))
ON_FILE("write", ssize_t, writev, (int file, const struct iovec *from, int parts), (file, from, parts))
CALL(size_t, fwrite, (const void *from, size_t size, size_t count, FILE *to), (from, size, count, to),
     fails_on("write", fileno(to)), 0)
ON_FILE("sync", int, fsync, (int file), (file))
ON_FILE("sync", int, fdatasync, (int file), (file))
ON_FILE("write", int, ftruncate, (int file, off_t size), (file, size))
ON_FILE("write", int, ftruncate64, (int file, off64_t size), (file, size))
ON_PATH("rename", rename, (const char *path, const char *to), (path, to))
ON_FOLDER("rename", renameat, (int folder, const char *path, int to_folder, const char *to),
          (folder, path, to_folder, to))
ON_PATH("create", mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH("remove", unlink, (const char *path), (path))
ON_PATH("remove", rmdir, (const char *path), (path))
ON_FOLDER("remove", unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
CALL(DIR *, opendir, (const char *path), (path), fails("list", path), NULL)
CALL(DIR *, fdopendir, (int file), (file), fails_on("list", file), NULL)
CALL(struct dirent *, readdir, (DIR * listed), (listed), fails_on("list", dirfd(listed)), NULL)
CALL(struct dirent64 *, readdir64, (DIR * listed), (listed), fails_on("list", dirfd(listed)), NULL)
ON_PATH("stat", stat, (const char *path, struct stat *to), (path, to))
ON_PATH("stat", stat64, (const char *path, struct stat64 *to), (path, to))
ON_PATH("stat", lstat, (const char *path, struct stat *to), (path, to))
ON_PATH("stat", lstat64, (const char *path, struct stat64 *to), (path, to))
ON_FOLDER("stat", fstatat, (int folder, const char *path, struct stat *to, int flags), (folder, path, to, flags))
ON_FOLDER("stat", fstatat64, (int folder, const char *path, struct stat64 *to, int flags), (folder, path, to, flags))
ON_FILE("stat", int, fstat, (int file, struct stat *to), (file, to))
ON_FILE("stat", int, fstat64, (int file, struct stat64 *to), (file, to))

#define OPEN(name, parameters, arguments, broken)                              \
    int name parameters {                                                      \
        static int (*real)();                                                  \
        va_list rest;                                                          \
        va_start(rest, flags);                                                 \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;      \
        va_end(rest);                                                          \
        if (!real) real = (int (*)())dlsym(RTLD_NEXT, #name);                  \
        if (broken) return -1;                                                 \
        return real arguments;                                                 \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), fails(kind_of(flags), path))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), fails(kind_of(flags), path))
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode),
     fails_at(kind_of(flags), folder, path))
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode),
     fails_at(kind_of(flags), folder, path))
