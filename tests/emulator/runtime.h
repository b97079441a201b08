/* A GPU as a kernel's threads see one: blocks one after the other, and in a block each thread up to the next barrier.

   Every thread has a stack, so that a barrier is a function that returns when all others have come to it. Every access
   to memory goes through `touch`, which keeps who touched what since when, or `constant`; what a GPU would leave to chance
   ends the launch: an access outside all arrays of the launch (not one that meets a neighbour of its own array) or not
   aligned, shared memory that is read before it is written, two threads at one place without a barrier between them, if
   one of them writes, and a barrier that not all threads reach. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fenv.h>
#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { FINE, OUTSIDE, MISALIGNED, UNWRITTEN, READ_AND_WRITTEN, WRITTEN_TWICE, DIFFERENT_BARRIERS, BARRIER_WITHOUT };
enum { NEW, RUNNING, WAITING, FINISHED };
enum { ARRAY, SHARED, CONSTANT }; /* where memory is */

/* Who touched a place last. Blocks, phases (between two barriers) and threads are counted from 1; 0 is nobody. */
struct trace {
    uint32_t writing_block, writing_phase, reading_block, reading_phase;
    uint16_t writer, reader;
    uint8_t several_readers, several_blocks; /* in that phase; of those that read */
};

struct memory {
    uint64_t start, bytes, granule; /* of each trace */
    struct trace *traces;
};

/* What went wrong: the same in Python. `line` of the PTX, `other` thread, and in what block that was. */
struct failure {
    int32_t kind, line, writes, space;
    uint64_t address;
    uint32_t block, thread, other, other_block;
};

struct launch {
    uint32_t grid[3], block[3], dynamic_bytes;
    const uint64_t *parameters;
    struct memory shared; /* of a block */
    struct memory *arrays;
    int64_t n_arrays;
    char *stacks;
    uint64_t stack_bytes;
    struct failure failure;
};

struct thread {
    int state, line;
    uint32_t number, place[3];
    jmp_buf here;
};

static struct launch *launch;
static struct thread *self;
static jmp_buf scheduler;
static uint32_t block_number, block_place[3], phase;

/* ---- memory */

static void end_turn(int state)
{
    self->state = state;
    _longjmp(scheduler, 1);
}

static void fail(int kind, uint64_t address, int writes, int space, int line, uint32_t other, uint32_t other_block)
{
    if (launch->failure.kind == FINE)
        launch->failure =
            (struct failure){kind, line, writes, space, address, block_number, self->number, other, other_block};
    end_turn(FINISHED);
}

static struct memory *memory_at(uint64_t address, uint64_t bytes, int space)
{
    static int64_t last;
    int64_t n = space == SHARED ? 1 : launch->n_arrays;
    struct memory *all = space == SHARED ? &launch->shared : launch->arrays;
    for (int64_t tried = 0; tried < n; tried++) {
        int64_t i = (last + tried) % n;
        if (address >= all[i].start && address + bytes <= all[i].start + all[i].bytes) {
            last = space == SHARED ? last : i;
            return &all[i];
        }
    }
    return NULL;
}

/* In shared memory, what another block left counts as never written; in global memory blocks are never in step. */
static void keep_read(struct trace *t, uint64_t address, int space, int line)
{
    if (t->writing_block == block_number) {
        if (t->writing_phase == phase && t->writer != self->number)
            fail(READ_AND_WRITTEN, address, 0, space, line, t->writer, t->writing_block);
    } else if (space == SHARED)
        fail(UNWRITTEN, address, 0, space, line, 0, 0);
    else if (t->writing_block)
        fail(READ_AND_WRITTEN, address, 0, space, line, t->writer, t->writing_block);
    bool same_block = t->reading_block == block_number;
    t->several_blocks |= t->reading_block && !same_block;
    t->several_readers = same_block && t->reading_phase == phase && (t->several_readers || t->reader != self->number);
    t->reading_block = block_number, t->reading_phase = phase, t->reader = self->number;
}

static void keep_write(struct trace *t, uint64_t address, int space, int line)
{
    bool other_writes = t->writing_block && t->writing_block != block_number && space == ARRAY;
    if (t->writing_block == block_number && t->writing_phase == phase && t->writer != self->number)
        other_writes = true;
    if (other_writes)
        fail(WRITTEN_TWICE, address, 1, space, line, t->writer, t->writing_block);
    bool other_reads = space == ARRAY && (t->several_blocks || (t->reading_block && t->reading_block != block_number));
    if (t->reading_block == block_number && t->reading_phase == phase)
        other_reads |= t->several_readers || t->reader != self->number;
    if (other_reads)
        fail(READ_AND_WRITTEN, address, 1, space, line, t->reader, t->reading_block);
    t->writing_block = block_number, t->writing_phase = phase, t->writer = self->number;
}

static void *touch(uint64_t address, uint64_t bytes, int writes, int space, int line)
{
    if (address % bytes)
        fail(MISALIGNED, address, writes, space, line, 0, 0);
    struct memory *found = memory_at(address, bytes, space);
    if (!found)
        fail(OUTSIDE, address, writes, space, line, 0, 0);
    uint64_t first = (address - found->start) / found->granule;
    uint64_t last = (address - found->start + bytes - 1) / found->granule;
    for (uint64_t i = first; i <= last; i++)
        if (writes)
            keep_write(&found->traces[i], address, space, line);
        else
            keep_read(&found->traces[i], address, space, line);
    return (void *)address;
}

/* Of a module's constants, which are all in one array and which no thread writes. */
static const void *constant(uint64_t address, const void *start, uint64_t size, uint64_t bytes, int line)
{
    if (address % bytes)
        fail(MISALIGNED, address, 0, CONSTANT, line, 0, 0);
    if (address < (uint64_t)start || address + bytes > (uint64_t)start + size)
        fail(OUTSIDE, address, 0, CONSTANT, line, 0, 0);
    return (const void *)address;
}

/* ---- threads */

static void barrier(int line)
{
    self->line = line;
    if (!_setjmp(self->here))
        end_turn(WAITING);
}

static void kernel(const uint64_t *parameters); /* one thread of it: what the PTX says */

static void begin(void)
{
    kernel(launch->parameters);
    end_turn(FINISHED);
}

static void give_turn(struct thread *thread)
{
    self = thread;
    if (_setjmp(scheduler))
        return;
    if (thread->state == WAITING)
        _longjmp(thread->here, 1);
    thread->state = RUNNING;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = launch->stacks + (thread->number - 1) * launch->stack_bytes;
    start.uc_stack.ss_size = launch->stack_bytes;
    makecontext(&start, begin, 0);
    setcontext(&start);
}

/* All threads of a block wait at one place, or none does. */
static void check_barrier(struct thread *threads, uint32_t n)
{
    struct thread *ended = NULL, *first = NULL;
    for (uint32_t i = 0; i < n && launch->failure.kind == FINE; i++) {
        struct thread *each = &threads[i], *other = NULL;
        ended = ended || each->state != FINISHED ? ended : each;
        first = first || each->state != WAITING ? first : each;
        if (first && ended)
            other = ended, each = first;
        else if (first && each->line != first->line)
            other = first;
        if (other)
            launch->failure = (struct failure){
                other == ended ? BARRIER_WITHOUT : DIFFERENT_BARRIERS, each->line, 0, 0, 0,
                block_number, each->number, other->number, block_number};
    }
}

static void run_block(struct thread *threads, uint32_t n)
{
    const uint32_t *size = launch->block;
    for (uint32_t i = 0; i < n; i++)
        threads[i] = (struct thread){.number = i + 1, .place = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]}};
    for (phase = 1; threads[0].state != FINISHED && launch->failure.kind == FINE; phase++) {
        for (volatile uint32_t i = 0; i < n && launch->failure.kind == FINE; i++)
            give_turn(&threads[i]);
        check_barrier(threads, n);
    }
}

/* 0 if every thread of every block came to its end. */
int run(struct launch *given)
{
    launch = given;
    uint32_t n = given->block[0] * given->block[1] * given->block[2];
    struct thread *threads = malloc(n * sizeof *threads);
    block_number = 0;
    for (uint32_t z = 0; z < given->grid[2]; z++)
        for (uint32_t y = 0; y < given->grid[1]; y++)
            for (uint32_t x = 0; x < given->grid[0] && given->failure.kind == FINE; x++) {
                block_number++;
                block_place[0] = x, block_place[1] = y, block_place[2] = z;
                run_block(threads, n);
            }
    free(threads);
    return given->failure.kind;
}

/* ---- instructions that C has no operator for: PTX ISA, chapter 9.7 */

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline double double_of(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

static inline uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline uint64_t bits_of_double(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

/* Shifts by the width or more leave nothing, or the sign. */
static inline uint64_t shift_left(uint64_t value, uint32_t by, uint32_t width) { return by < width ? value << by : 0; }
static inline uint64_t shift_right(uint64_t value, uint32_t by, uint32_t width) { return by < width ? value >> by : 0; }
static inline int64_t shift_sign(int64_t value, uint32_t by, uint32_t width) { return value >> (by < width ? by : width - 1); }

/* A division by zero gives any number, and is no error. */
#define DIVIDE(type, a, b) ((type)(b) ? (type)((type)(a) / (type)(b)) : (type)-1)
#define REMAINDER(type, a, b) ((type)(b) ? (type)((type)(a) % (type)(b)) : (type)-1)

/* Inserts the lower `length` bits of `a` into `b` from bit `start` on. */
static inline uint64_t insert_bits(uint64_t a, uint64_t b, uint32_t start, uint32_t length)
{
    uint64_t mask = (length < 64 ? (UINT64_C(1) << length) - 1 : ~UINT64_C(0)) << start;
    return (b & ~mask) | ((a << start) & mask);
}

/* Operations with a rounding mode of their own are never joined with others. */
static __attribute__((noinline)) double add_by_itself(double a, double b) { return a + b; }
static __attribute__((noinline)) double multiply_by_itself(double a, double b) { return a * b; }

static __attribute__((noinline)) float fma_downwards(float a, float b, float c)
{
    volatile float x = a, y = b, z = c;
    fesetround(FE_DOWNWARD);
    volatile float value = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return value;
}

/* The nearest integer there is if it lies outside; for NaN the least. */
static inline int64_t towards_zero(double value)
{
    if (isnan(value) || value < -0x1p63)
        return INT64_MIN;
    return value >= 0x1p63 ? INT64_MAX : (int64_t)value;
}

/* Of a number and NaN the number; −0 is less than 0. */
static inline float least_float(float a, float b) { return a == b && signbit(a) ? a : a == b ? b : fminf(a, b); }
static inline float largest_float(float a, float b) { return a == b && signbit(a) ? b : a == b ? a : fmaxf(a, b); }
static inline double least_double(double a, double b) { return a == b && signbit(a) ? a : a == b ? b : fmin(a, b); }
static inline double largest_double(double a, double b) { return a == b && signbit(a) ? b : a == b ? a : fmax(a, b); }

static inline float without_subnormals(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }
static inline float power_of_two(float value) { return without_subnormals(exp2f(without_subnormals(value))); }
static inline float saturated(float value) { return value > 0 ? fminf(value, 1) : 0; }

/* Of the upper half of the number only, and so is the result: a first guess for Newton's method. */
static inline double rough_reciprocal(double value)
{
    const uint64_t upper = ~UINT64_C(0) << 32;
    double cut = double_of(bits_of_double(value) & upper);
    cut = fabs(cut) < 0x1p-1022 ? copysign(0, cut) : cut;
    double result = double_of(bits_of_double(1 / cut) & upper);
    return fabs(result) < 0x1p-1022 ? copysign(0, result) : result;
}
