/* A GPU as a kernel's threads see one: blocks one after the other, and in a block each thread up to the next barrier.

   Every thread has a stack, so that a barrier is a function that returns when all others have come to it. Every access
   to memory goes through `touch`, which keeps who touched what since when; what a GPU would leave to chance ends the launch:
   an access outside the arrays of the launch or not aligned, shared memory that is read before it is written, and two
   threads at one place without a barrier between them, if one of them writes. */

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

enum { FINE, OUTSIDE, MISALIGNED, UNWRITTEN, READ_AND_WRITTEN, WRITTEN_TWICE, DIFFERENT_BARRIERS };
enum { NEW, RUNNING, WAITING, FINISHED };

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
    int32_t kind, line, writes, shared;
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

static void fail(int kind, uint64_t address, int writes, int shared, int line, uint32_t other, uint32_t other_block)
{
    if (launch->failure.kind == FINE)
        launch->failure =
            (struct failure){kind, line, writes, shared, address, block_number, self->number, other, other_block};
    end_turn(FINISHED);
}

static struct memory *memory_at(uint64_t address, uint64_t bytes, int shared)
{
    static int64_t last;
    int64_t n = shared ? 1 : launch->n_arrays;
    struct memory *all = shared ? &launch->shared : launch->arrays;
    for (int64_t tried = 0; tried < n; tried++) {
        int64_t i = (last + tried) % n;
        if (address >= all[i].start && address + bytes <= all[i].start + all[i].bytes) {
            last = shared ? last : i;
            return &all[i];
        }
    }
    return NULL;
}

/* In shared memory, what another block left counts as never written; in global memory blocks are never in step. */
static void keep_read(struct trace *t, uint64_t address, int shared, int line)
{
    if (t->writing_block == block_number) {
        if (t->writing_phase == phase && t->writer != self->number)
            fail(READ_AND_WRITTEN, address, 0, shared, line, t->writer, t->writing_block);
    } else if (shared)
        fail(UNWRITTEN, address, 0, shared, line, 0, 0);
    else if (t->writing_block)
        fail(READ_AND_WRITTEN, address, 0, shared, line, t->writer, t->writing_block);
    bool same_block = t->reading_block == block_number;
    t->several_blocks |= t->reading_block && !same_block;
    t->several_readers = same_block && t->reading_phase == phase && (t->several_readers || t->reader != self->number);
    t->reading_block = block_number, t->reading_phase = phase, t->reader = self->number;
}

static void keep_write(struct trace *t, uint64_t address, int shared, int line)
{
    bool other_writes = t->writing_block && t->writing_block != block_number && !shared;
    if (t->writing_block == block_number && t->writing_phase == phase && t->writer != self->number)
        other_writes = true;
    if (other_writes)
        fail(WRITTEN_TWICE, address, 1, shared, line, t->writer, t->writing_block);
    bool other_reads = !shared && (t->several_blocks || (t->reading_block && t->reading_block != block_number));
    if (t->reading_block == block_number && t->reading_phase == phase)
        other_reads |= t->several_readers || t->reader != self->number;
    if (other_reads)
        fail(READ_AND_WRITTEN, address, 1, shared, line, t->reader, t->reading_block);
    t->writing_block = block_number, t->writing_phase = phase, t->writer = self->number;
}

static void *touch(uint64_t address, uint64_t bytes, int writes, int shared, int line)
{
    if (address % bytes)
        fail(MISALIGNED, address, writes, shared, line, 0, 0);
    struct memory *found = memory_at(address, bytes, shared);
    if (!found)
        fail(OUTSIDE, address, writes, shared, line, 0, 0);
    uint64_t first = (address - found->start) / found->granule;
    uint64_t last = (address - found->start + bytes - 1) / found->granule;
    for (uint64_t i = first; i <= last; i++)
        if (writes)
            keep_write(&found->traces[i], address, shared, line);
        else
            keep_read(&found->traces[i], address, shared, line);
    return (void *)address;
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

/* All that wait do so at one place: threads that have ended hold nobody up. */
static uint32_t count_waiting(struct thread *threads, uint32_t n)
{
    struct thread *first = NULL;
    uint32_t waiting = 0;
    for (uint32_t i = 0; i < n && launch->failure.kind == FINE; i++) {
        if (threads[i].state != WAITING)
            continue;
        first = first ? first : &threads[i];
        waiting++;
        if (threads[i].line != first->line)
            launch->failure = (struct failure){
                DIFFERENT_BARRIERS, threads[i].line, 0, 0, 0, block_number, threads[i].number, first->number, 0};
    }
    return waiting;
}

static void run_block(struct thread *threads, uint32_t n)
{
    const uint32_t *size = launch->block;
    for (uint32_t i = 0; i < n; i++)
        threads[i] = (struct thread){.number = i + 1, .place = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]}};
    volatile uint32_t waiting = n;
    for (phase = 1; waiting && launch->failure.kind == FINE; phase++) {
        for (volatile uint32_t i = 0; i < n && launch->failure.kind == FINE; i++)
            if (threads[i].state != FINISHED)
                give_turn(&threads[i]);
        waiting = count_waiting(threads, n);
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

/* The nearest integer there is if it lies outside; 0 for NaN. */
static inline int64_t towards_zero(double value)
{
    if (isnan(value))
        return 0;
    return value >= 0x1p63 ? INT64_MAX : value < -0x1p63 ? INT64_MIN : (int64_t)value;
}

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
