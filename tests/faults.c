/* Preloaded into a process (LD_PRELOAD), counts its file operations below FAULT_ROOT, logs them, and at a chosen one
   ends the process or lets the operation fail: what a kill, a full disk or a read-only one does, at every single place.

   FAULT_ROOT  only operations on paths below this folder count
   FAULT_LOG   a file that gets one line for each of them: the operation and its path(s)
   FAULT_AT    the number (from 1) of the operation before which it happens; 0: never
   FAULT_DO    "kill", "tear" (a kill in the middle of a write), or an errno, which this and all later operations
               that change something then fail with
   FAULT_CLOCK if set, the wall clock goes back by ten seconds and forward again, by turns, every second. No further:
               the kernel's own clock stays right, and a thread that waits for an instant which by that clock is
               past does not sleep. Waits of more than ten seconds do, and all do every other second.

   fault_arm(at) sets the counter to 0 and FAULT_AT to `at`, from within the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static atomic_int count, at = -1;

void fault_arm(int operation) { count = 0; at = operation; }

int fault_count(void) { return count; }

static void kill_self(void) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) pause(); }

/* The absolute path of `path`, seen from the folder behind `dir`. */
static void absolute(int dir, const char *path, char *out) {
    char link[64], base[PATH_MAX] = "";
    if (path && path[0] == '/') { snprintf(out, PATH_MAX, "%s", path); return; }
    if (dir == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    base[n > 0 ? n : 0] = 0;
    if (path && path[0]) snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    else snprintf(out, PATH_MAX, "%s", base);
}

/* Count an operation; 0: do it, 1: tear it, otherwise the errno that it fails with. */
static int operation(const char *name, const char *path, const char *other) {
    const char *root = getenv("FAULT_ROOT"), *action = getenv("FAULT_DO"), *log = getenv("FAULT_LOG");
    if (!root || (strncmp(path, root, strlen(root)) && (!other || strncmp(other, root, strlen(root))))) return 0;
    if (at < 0) at = getenv("FAULT_AT") ? atoi(getenv("FAULT_AT")) : 0;
    int n = ++count;
    if (log) {
        char line[3 * PATH_MAX];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path, other ? other : "");
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (fd >= 0) { (void)!syscall(SYS_write, fd, line, length); syscall(SYS_close, fd); }
    }
    if (!action || at <= 0 || n < at) return 0;
    if (!strcmp(action, "kill")) kill_self();
    if (!strcmp(action, "tear")) { if (n > at || strcmp(name, "write")) kill_self(); return 1; }
    return atoi(action);
}

#define FAIL(...) do { int e = operation(__VA_ARGS__); if (e > 1) { errno = e; return -1; } } while (0)

static int open_checked(int dir, const char *path, int flags, mode_t mode) {
    if ((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) {
        char p[PATH_MAX];
        absolute(dir, path, p);
        FAIL("open", p, NULL);
    }
    return syscall(SYS_openat, dir, path, flags, mode);
}

#define OPEN(name, ...) \
    int name { va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
               return open_checked(__VA_ARGS__, flags, mode); }
OPEN(open(const char *path, int flags, ...), AT_FDCWD, path)
OPEN(open64(const char *path, int flags, ...), AT_FDCWD, path)
OPEN(openat(int dir, const char *path, int flags, ...), dir, path)
OPEN(openat64(int dir, const char *path, int flags, ...), dir, path)

static int file_checked(const char *name, int fd) {
    char p[PATH_MAX];
    int saved = errno;
    absolute(fd, NULL, p);
    errno = saved;
    return operation(name, p, NULL);
}

#define WRITE(call, half) do { \
    int e = file_checked("write", fd); \
    if (e > 1) { errno = e; return -1; } \
    if (e == 1) { (void)!(half); kill_self(); } \
    return call; } while (0)
ssize_t write(int fd, const void *data, size_t n) {
    WRITE(syscall(SYS_write, fd, data, n), syscall(SYS_write, fd, data, n / 2));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t where) {
    WRITE(syscall(SYS_pwrite64, fd, data, n, where), syscall(SYS_pwrite64, fd, data, n / 2, where));
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t where) {
    WRITE(syscall(SYS_pwrite64, fd, data, n, where), syscall(SYS_pwrite64, fd, data, n / 2, where));
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    WRITE(syscall(SYS_writev, fd, parts, n), syscall(SYS_writev, fd, parts, n / 2));
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t where) {
    REAL(pwritev);
    WRITE(real(fd, parts, n, where), real(fd, parts, n / 2, where));
}

#define ON_FILE(name, ...) do { int e = file_checked(name, fd); if (e > 1) { errno = e; return -1; } \
                                return syscall(__VA_ARGS__); } while (0)
int fsync(int fd) { ON_FILE("fsync", SYS_fsync, fd); }
int fdatasync(int fd) { ON_FILE("fsync", SYS_fdatasync, fd); }
int ftruncate(int fd, off_t n) { ON_FILE("write", SYS_ftruncate, fd, n); }
int ftruncate64(int fd, off64_t n) { ON_FILE("write", SYS_ftruncate, fd, n); }

int renameat2(int dir, const char *from, int other, const char *to, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    absolute(dir, from, a);
    absolute(other, to, b);
    FAIL("rename", a, b);
    return syscall(SYS_renameat2, dir, from, other, to, flags);
}
int renameat(int dir, const char *from, int other, const char *to) { return renameat2(dir, from, other, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int dir, const char *path, int flags) {
    char p[PATH_MAX];
    absolute(dir, path, p);
    FAIL("delete", p, NULL);
    return syscall(SYS_unlinkat, dir, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dir, const char *path, mode_t mode) {
    char p[PATH_MAX];
    absolute(dir, path, p);
    FAIL("mkdir", p, NULL);
    return syscall(SYS_mkdirat, dir, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME && getenv("FAULT_CLOCK")) {
        struct timespec steady;
        syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &steady);
        if (steady.tv_sec % 2) now->tv_sec -= 10;
    }
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
