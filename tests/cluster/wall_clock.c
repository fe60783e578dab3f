/* LD_PRELOAD library that shifts the wall clock by WALL_CLOCK_OFFSET seconds. The monotonic clock and the durations of
   all waits are unaffected.

   libfaketime 0.9.10 (Debian 12) makes sleeps fail or waits never end in programs with threads. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define LONG_AGO 1000000000 /* seconds; an earlier time is not one of the wall clock */

static long long offset(void) {
    const char *seconds = getenv("WALL_CLOCK_OFFSET");
    return seconds ? (long long)(atof(seconds) * SECOND) : 0;
}

static struct timespec shifted(struct timespec moment, long long nanoseconds) {
    long long sum = moment.tv_nsec + nanoseconds;
    long long whole = sum / SECOND - (sum % SECOND < 0);
    return (struct timespec){moment.tv_sec + whole, sum - whole * SECOND};
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        *now = shifted(*now, offset());
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *also) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (also)
        *also = exact.tv_sec;
    return exact.tv_sec;
}

/* Converts a deadline of the shifted clock to the kernel's clock. */

static struct timespec deadline(const struct timespec *until) {
    return until->tv_sec < LONG_AGO ? *until : shifted(*until, -offset());
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static __typeof__(pthread_cond_timedwait) *wait;
    struct timespec real = deadline(until);
    if (!wait) /* glibc has two versions on x86-64; take the current one */
        wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2") ?: dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    return wait(condition, mutex, &real);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static __typeof__(sem_timedwait) *wait;
    struct timespec real = deadline(until);
    if (!wait)
        wait = dlsym(RTLD_NEXT, "sem_timedwait");
    return wait(semaphore, &real);
}
