// SPDX-License-Identifier: MIT
// Draws what the screen must show, from the definition in README.md alone: `reference FORMAT SEED WIDTH HEIGHT` writes
// a binary PPM to stdout. FORMAT is xr24 or nv12, SEED has 16 hexadecimal digits. Knows nothing of buffers or strides.
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct seed {
    uint32_t s0, s1;
};

static uint32_t mix(uint32_t h)
{
    h ^= h >> 16;
    h *= UINT32_C(0x7feb352d);
    h ^= h >> 15;
    h *= UINT32_C(0x846ca68b);
    h ^= h >> 16;
    return h;
}

static uint32_t pick(struct seed seed, uint32_t k, uint32_t a, uint32_t b)
{
    return mix(mix(mix(mix(seed.s0 ^ k) ^ seed.s1) ^ a) ^ b);
}

static uint32_t byte(int i, uint32_t v)
{
    return (v >> (8 * i)) & 255;
}

static uint32_t texture(struct seed seed, uint32_t k, uint32_t x, uint32_t y)
{
    enum { TILE = 20 };
    uint32_t colour = pick(seed, k, x / TILE, y / TILE);
    uint32_t in_x = x % TILE, in_y = y % TILE;

    switch (pick(seed, k + 1, x / TILE, y / TILE) & 3) {
    case 0:
        return colour;
    case 1:
        return ((byte(0, colour) + 12 * in_x) & 255) | ((byte(1, colour) + 12 * in_y) & 255) << 8 |
               ((byte(2, colour) + 6 * (in_x + in_y)) & 255) << 16 | byte(3, colour) << 24;
    case 2:
        return pick(seed, k + 2, x, y);
    default:
        return (x / 2 + y / 2) % 2 == 0 ? colour : ~colour;
    }
}

static unsigned char to_byte(double value)
{
    if (value <= 0)
        return 0;
    if (value >= 255)
        return 255;
    return (unsigned char)floor(value + 0.5);
}

static void xr24_pixel(struct seed seed, uint32_t x, uint32_t y, unsigned char rgb[3])
{
    uint32_t v = texture(seed, 10, x, y);

    rgb[0] = (unsigned char)byte(2, v);
    rgb[1] = (unsigned char)byte(1, v);
    rgb[2] = (unsigned char)byte(0, v);
}

static void nv12_pixel(struct seed seed, uint32_t x, uint32_t y, unsigned char rgb[3])
{
    uint32_t chroma = texture(seed, 30, x / 2, y / 2);
    double luma = 16 + byte(0, texture(seed, 20, x, y)) * 219 / 255;
    double cb = 16 + byte(0, chroma) * 224 / 255;
    double cr = 16 + byte(1, chroma) * 224 / 255;
    double grey = 255.0 / 219 * (luma - 16);
    double blue = 255.0 / 224 * 1.772 * (cb - 128);
    double red = 255.0 / 224 * 1.402 * (cr - 128);

    rgb[0] = to_byte(grey + red);
    rgb[1] = to_byte(grey - blue * 0.114 / 0.587 - red * 0.299 / 0.587);
    rgb[2] = to_byte(grey + blue);
}

static int parse_seed(const char *text, struct seed *seed)
{
    char *end;
    uint64_t value;

    if (strlen(text) != 16 || strspn(text, "0123456789abcdef") != 16)
        return -1;
    value = strtoull(text, &end, 16);
    seed->s0 = (uint32_t)(value >> 32);
    seed->s1 = (uint32_t)value;
    return 0;
}

static int parse_length(const char *text, uint32_t *length)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);

    if (*end != '\0' || value < 1 || value > 65536)
        return -1;
    *length = (uint32_t)value;
    return 0;
}

int main(int argc, char **argv)
{
    struct seed seed;
    uint32_t width, height, x, y;
    unsigned char rgb[3];
    int nv12;

    if (argc != 5 || parse_seed(argv[2], &seed) || parse_length(argv[3], &width) || parse_length(argv[4], &height)) {
        fprintf(stderr, "usage: %s xr24|nv12 SEED WIDTH HEIGHT (a seed of 16 hexadecimal digits)\n", argv[0]);
        return 2;
    }
    nv12 = strcmp(argv[1], "nv12") == 0;
    if (!nv12 && strcmp(argv[1], "xr24") != 0) {
        fprintf(stderr, "%s: no such format: xr24 or nv12\n", argv[1]);
        return 2;
    }
    printf("P6\n%" PRIu32 " %" PRIu32 "\n255\n", width, height);
    for (y = 0; y < height; y++) {
        for (x = 0; x < width; x++) {
            if (nv12)
                nv12_pixel(seed, x, y, rgb);
            else
                xr24_pixel(seed, x, y, rgb);
            fwrite(rgb, sizeof rgb, 1, stdout);
        }
    }
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "%s: cannot write the picture: %s\n", argv[0], strerror(errno));
        return 1;
    }
    return 0;
}
