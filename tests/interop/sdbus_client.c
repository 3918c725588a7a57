// SPDX-License-Identifier: MIT
// A client by sd-bus with blocking calls only: `sdbus_client COUNT` allocates COUNT buffers one after the other, uses
// each descriptor, looks at all of them again, and releases them; then the same with one AllocateMany of 16. Prints
// what it used; ends with 1 and the reason at the first thing that is not as the interface says.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/dma-buf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

static const char *const service = "org.udmabufd.Allocator1";
static const char *const allocator_path = "/org/udmabufd/Allocator1";
static const char *const allocator = "org.udmabufd.Allocator1";
static const char *const buffer_interface = "org.udmabufd.Buffer1";

enum { MANY = 16 };

struct buffer {
    char *path;
    int fd;
    uint64_t size;
    uint64_t mark;
};

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list arguments;

    fputs("sdbus_client: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static void check(int result, const char *what)
{
    if (result < 0)
        fail("%s: %s", what, strerror(-result));
}

static void sync_buffer(int fd, uint64_t flags)
{
    struct dma_buf_sync sync = {.flags = flags};

    while (ioctl(fd, DMA_BUF_IOCTL_SYNC, &sync) < 0)
        if (errno != EINTR && errno != EAGAIN)
            fail("DMA_BUF_IOCTL_SYNC: %s", strerror(errno));
}

static uint64_t *map(const struct buffer *buffer, int protection)
{
    void *mapped = mmap(NULL, buffer->size, protection, MAP_SHARED, buffer->fd, 0);

    if (mapped == MAP_FAILED)
        fail("mmap of %s: %s", buffer->path, strerror(errno));
    return mapped;
}

// A new buffer is all zero; from here on it holds its mark, and its place in each word.
static void use(struct buffer *buffer, uint64_t mark)
{
    uint64_t *words = map(buffer, PROT_READ | PROT_WRITE);
    uint64_t i;

    sync_buffer(buffer->fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW);
    for (i = 0; i < buffer->size / sizeof *words; i++) {
        if (words[i] != 0)
            fail("%s is not zero at byte %" PRIu64, buffer->path, i * sizeof *words);
        words[i] = mark ^ i;
    }
    sync_buffer(buffer->fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW);
    munmap(words, buffer->size);
    buffer->mark = mark;
}

static void look_again(const struct buffer *buffer)
{
    uint64_t *words = map(buffer, PROT_READ);
    uint64_t i;

    sync_buffer(buffer->fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ);
    for (i = 0; i < buffer->size / sizeof *words; i++)
        if (words[i] != (buffer->mark ^ i))
            fail("%s has lost what was written at byte %" PRIu64, buffer->path, i * sizeof *words);
    sync_buffer(buffer->fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ);
    munmap(words, buffer->size);
}

// The message owns its descriptor: take a second one, and the size that lseek tells.
static void adopt(struct buffer *buffer, const char *path, int fd, uint64_t wanted)
{
    int flags = fcntl(fd, F_GETFD);
    off_t size;

    if (flags < 0 || !(flags & FD_CLOEXEC))
        fail("the descriptor of %s has no CLOEXEC", path);
    buffer->path = strdup(path);
    buffer->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (!buffer->path || buffer->fd < 0)
        fail("%s: %s", path, strerror(errno));
    size = lseek(buffer->fd, 0, SEEK_END);
    if (size < 0 || (uint64_t)size != wanted)
        fail("%s has %jd bytes, not %" PRIu64, path, (intmax_t)size, wanted);
    buffer->size = wanted;
}

// One pair of the dictionary `info` is looked at: size, which has to be what was asked for.
static void check_info(sd_bus_message *reply, uint64_t wanted)
{
    const char *key, *contents;
    uint64_t size = 0;
    int more;

    check(sd_bus_message_enter_container(reply, 'a', "{sv}"), "info");
    while ((more = sd_bus_message_enter_container(reply, 'e', "sv")) > 0) {
        check(sd_bus_message_read(reply, "s", &key), "key of info");
        if (strcmp(key, "size") == 0) {
            check(sd_bus_message_peek_type(reply, NULL, &contents), "type of info.size");
            if (strcmp(contents, "t") != 0)
                fail("info.size has type %s, not t", contents);
            check(sd_bus_message_read(reply, "v", "t", &size), "info.size");
        } else {
            check(sd_bus_message_skip(reply, "v"), key);
        }
        check(sd_bus_message_exit_container(reply), "info");
    }
    check(more, "info");
    check(sd_bus_message_exit_container(reply), "info");
    if (size != wanted)
        fail("info.size is %" PRIu64 ", not %" PRIu64, size, wanted);
}

static void call_failed(const char *member, sd_bus_error *error, int result)
{
    fail("%s: %s: %s", member, error->name ? error->name : strerror(-result), error->message ? error->message : "");
}

static void allocate(sd_bus *bus, struct buffer *buffer, uint64_t size, unsigned int number)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *reply = NULL;
    const char *path;
    char name[32];
    int fd, result;

    snprintf(name, sizeof name, "sd-bus-%u", number);
    result = sd_bus_call_method(bus, service, allocator_path, allocator, "Allocate", &error, &reply, "a{sv}", 2, "size",
                                "t", size, "name", "s", name);
    if (result < 0)
        call_failed("Allocate", &error, result);
    check(sd_bus_message_read(reply, "oh", &path, &fd), "reply of Allocate");
    adopt(buffer, path, fd, size);
    check_info(reply, size);
    sd_bus_message_unref(reply);
}

static void allocate_many(sd_bus *bus, struct buffer *buffers, uint64_t size)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *reply = NULL;
    const char *paths[MANY];
    int fd, i, result;

    result = sd_bus_call_method(bus, service, allocator_path, allocator, "AllocateMany", &error, &reply, "a{sv}u", 1,
                                "size", "t", size, MANY);
    if (result < 0)
        call_failed("AllocateMany", &error, result);
    check(sd_bus_message_enter_container(reply, 'a', "o"), "buffers");
    for (i = 0; i < MANY; i++)
        if (sd_bus_message_read(reply, "o", &paths[i]) <= 0)
            fail("AllocateMany: %d buffers, not %d", i, MANY);
    check(sd_bus_message_exit_container(reply), "buffers");
    check(sd_bus_message_enter_container(reply, 'a', "h"), "fds");
    for (i = 0; i < MANY; i++) {
        if (sd_bus_message_read(reply, "h", &fd) <= 0)
            fail("AllocateMany: %d descriptors, not %d", i, MANY);
        adopt(&buffers[i], paths[i], fd, size);
    }
    check(sd_bus_message_exit_container(reply), "fds");
    check(sd_bus_message_enter_container(reply, 'a', "a{sv}"), "infos");
    for (i = 0; i < MANY; i++)
        check_info(reply, size);
    check(sd_bus_message_exit_container(reply), "infos");
    sd_bus_message_unref(reply);
}

static void release(sd_bus *bus, struct buffer *buffer)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    int result = sd_bus_call_method(bus, service, buffer->path, buffer_interface, "Release", &error, NULL, NULL);

    if (result < 0)
        call_failed("Release", &error, result);
    // The service is done with it, this descriptor is not.
    look_again(buffer);
    close(buffer->fd);
    free(buffer->path);
}

int main(int argc, char **argv)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), bytes = 0;
    struct buffer many[MANY], *buffers;
    unsigned long count, i;
    sd_bus *bus = NULL;

    count = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
    if (count < 1 || count > 400) {
        fprintf(stderr, "usage: %s COUNT (1 to 400 buffers at the same time)\n", argv[0]);
        return 2;
    }
    buffers = calloc(count, sizeof *buffers);
    if (!buffers)
        fail("%s", strerror(errno));
    check(sd_bus_open_system(&bus), "no system bus");
    for (i = 0; i < count; i++) {
        allocate(bus, &buffers[i], (1 + i % 5) * page, (unsigned int)i);
        use(&buffers[i], i * UINT64_C(0x9e3779b97f4a7c15) + 1);
        bytes += buffers[i].size;
    }
    for (i = 0; i < count; i++)
        look_again(&buffers[i]);
    for (i = 0; i < count; i++)
        release(bus, &buffers[i]);
    free(buffers);

    allocate_many(bus, many, 2 * page);
    for (i = 0; i < MANY; i++)
        use(&many[i], ~i);
    for (i = 0; i < MANY; i++)
        release(bus, &many[i]);
    sd_bus_flush_close_unref(bus);
    printf("%lu by Allocate with %" PRIu64 " bytes, %d by AllocateMany: written, read again, released\n", count, bytes,
           MANY);
    return 0;
}
