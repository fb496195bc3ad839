/* Runs in a guest (see tenant_cycles.py): writes a marker over a disk and the guest's memory, or searches both for one.
 *
 *     marker write DISK HEX   fills both, and keeps the memory until the guest ends
 *     marker find DISK HEX    counts the marker at all offsets that are a multiple of its size
 *
 * HEX is the complement of the 16 bytes of the marker, so that a guest that searches does not contain it itself.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

enum { CHUNK = 1 << 20 };

static uint64_t complement[2];
static uint64_t *chunk;

static void fail(const char *what) {
    printf("failed=%s\n", what);
    exit(1);
}

static uint64_t count(size_t bytes) {
    uint64_t found = 0;
    for (size_t at = 0; at + 1 < bytes / 8; at += 2)
        found += ~chunk[at] == complement[0] && ~chunk[at + 1] == complement[1];
    return found;
}

/* Counts from an offset on; *done gets the number of bytes that could be read. A page that cannot be read is skipped. */
static uint64_t search(int file, uint64_t offset, uint64_t size, uint64_t *done) {
    uint64_t found = 0;
    for (uint64_t at = 0; at < size;) {
        size_t wanted = size - at < CHUNK ? size - at : CHUNK;
        ssize_t got = pread(file, chunk, wanted, offset + at);
        if (got > 0) {
            found += count(got);
            *done += got;
        }
        at += got > 0 ? got : 4096;
    }
    return found;
}

/* All RAM of the guest: the segments of /proc/kcore that have a physical address, less the kernel's second mapping of its text. */
static uint64_t search_memory(uint64_t *done) {
    Elf64_Ehdr header;
    Elf64_Phdr segment;
    uint64_t found = 0;
    int file = open("/proc/kcore", O_RDONLY);
    if (file < 0 || pread(file, &header, sizeof header, 0) != sizeof header)
        fail("kcore");
    for (int index = 0; index < header.e_phnum; index++) {
        if (pread(file, &segment, sizeof segment, header.e_phoff + index * sizeof segment) != sizeof segment)
            fail("segment");
        if (segment.p_type == PT_LOAD && segment.p_paddr != UINT64_MAX && segment.p_vaddr < 0xffffffff80000000)
            found += search(file, segment.p_offset, segment.p_filesz, done);
    }
    return found;
}

static void find(const char *disk) {
    uint64_t on_disk = 0, read = 0, in_memory, memory = 0;
    int file = open(disk, O_RDONLY | O_DIRECT);
    if (file < 0)
        fail("open");
    on_disk = search(file, 0, lseek(file, 0, SEEK_END), &read);
    memset(chunk, 0, CHUNK);
    in_memory = search_memory(&memory);
    printf("disk=%lu read=%lu memory=%lu searched=%lu\n", on_disk, read, in_memory, memory);
}

static void write_all(const char *disk) {
    struct sysinfo info;
    uint64_t at, size, filled = 0;
    int file = open(disk, O_WRONLY | O_DIRECT);
    for (at = 0; at < CHUNK / 8; at++)
        chunk[at] = ~complement[at % 2];
    if (file < 0)
        fail("open");
    size = lseek(file, 0, SEEK_END);
    for (at = 0; at < size; at += CHUNK)
        if (pwrite(file, chunk, CHUNK, at) != CHUNK)
            fail("write");
    if (fsync(file) || sysinfo(&info))
        fail("fsync");
    /* Half of what is free: the guest goes on. The child keeps it. */
    size = info.freeram * info.mem_unit / 2 / CHUNK * CHUNK;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    for (at = 0; at < size; at += CHUNK, filled += CHUNK)
        memcpy(memory + at, chunk, CHUNK);
    printf("disk=%lu memory=%lu\n", lseek(file, 0, SEEK_END) / 16, filled / 16);
    fflush(stdout);
    if (!fork()) {
        for (int one = 0; one < 3; one++)
            close(one);
        for (;;)
            pause();
    }
}

int main(int count, char **words) {
    if (count != 4 || sscanf(words[3], "%16lx%16lx", &complement[0], &complement[1]) != 2)
        fail("usage");
    if (posix_memalign((void **)&chunk, 4096, CHUNK))
        fail("memory");
    if (!strcmp(words[1], "write"))
        write_all(words[2]);
    else
        find(words[2]);
    return 0;
}
