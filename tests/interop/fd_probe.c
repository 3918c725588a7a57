// SPDX-License-Identifier: MIT
// Preloaded into a D-Bus program: uses every dma-buf that the program receives, with the very descriptor that it
// received, right after its own recvmsg(). Tools such as `busctl call` and `gdbus call` print a reply and end: this shows
// that the descriptor in it is good. Appends one line per dma-buf to the file that FD_PROBE_REPORT names.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dma-buf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static int bracket(int fd, uint64_t flags)
{
    struct dma_buf_sync sync = {.flags = flags};
    int result;

    do
        result = ioctl(fd, DMA_BUF_IOCTL_SYNC, &sync);
    while (result < 0 && (errno == EINTR || errno == EAGAIN));
    return result;
}

// Whether all of the buffer is zero, can be written, and reads through another mapping as it was written.
static const char *use(int fd, size_t size)
{
    unsigned char *writer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    unsigned char *reader = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    size_t i;

    if (writer == MAP_FAILED || reader == MAP_FAILED)
        return "cannot be mapped";
    if (bracket(fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW))
        return "cannot be bracketed";
    for (i = 0; i < size; i++) {
        if (writer[i] != 0)
            return "is not zero";
        writer[i] = (unsigned char)(i * 7 + i / 4096 + 1);
    }
    if (bracket(fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW) || bracket(fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ))
        return "cannot be bracketed";
    for (i = 0; i < size; i++)
        if (reader[i] != (unsigned char)(i * 7 + i / 4096 + 1))
            return "does not keep what is written";
    if (bracket(fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ))
        return "cannot be bracketed";
    munmap(writer, size);
    munmap(reader, size);
    return "used";
}

static void probe(int fd)
{
    char link[64], target[256];
    const char *report = getenv("FD_PROBE_REPORT");
    struct stat status;
    ssize_t length;
    off_t size;
    FILE *file;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, target, sizeof target - 1);
    if (length < 0 || !report)
        return;
    target[length] = '\0';
    if (strncmp(target, "/dmabuf:", 8) != 0 || fstat(fd, &status) < 0)
        return;
    file = fopen(report, "ae");
    if (!file)
        return;
    size = lseek(fd, 0, SEEK_END);
    fprintf(file, "program=%s inode=%ju size=%jd cloexec=%d %s\n", program_invocation_short_name,
            (uintmax_t)status.st_ino, (intmax_t)size, (fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0,
            use(fd, size > 0 ? (size_t)size : 0));
    fclose(file);
}

ssize_t recvmsg(int socket, struct msghdr *message, int flags)
{
    ssize_t (*next)(int, struct msghdr *, int) = (ssize_t(*)(int, struct msghdr *, int))dlsym(RTLD_NEXT, "recvmsg");
    ssize_t received = next(socket, message, flags);
    int saved = errno;
    struct cmsghdr *part;

    if (received >= 0 && !(flags & MSG_PEEK)) {
        for (part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
            size_t i, count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);

            if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
                continue;
            for (i = 0; i < count; i++) {
                int fd;

                memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
                probe(fd);
            }
        }
    }
    errno = saved;
    return received;
}
