/* Fits of whole problems; levels.h includes this file for every type and level, and only float64 makes use of it.
 *
 * Samples lie in tiles as in tile.h. Components lie side by side in the same way: row i of a parameter holds it for all
 * of them, `width` apart, and every loop of the M-step runs over whole vectors of components, whatever D is. Lanes
 * without a component have no weight. Symmetric and triangular matrices are packed as φ packs them, entry (i, j) with
 * i ≥ j in row i (i + 1) / 2 + j. The functions are specified in emalgam_kernels/reference/batch.py; here logits and moments
 * take the first of three forms that keeps the digits (emalgam.guard):
 *
 *   relative  ⟨η_k − η_c, φ⟩ for all k but one, c: responsibilities do not change, Σ ω log p lacks ⟨η_c, Σ ω φ⟩, and since
 *             Σ_k r_k = ω, S_c = Σ ω φ − Σ_{k ≠ c} S_k: both products have one row less, and Σ ω φ is the same in all passes
 *   packed    ⟨η_k, φ⟩ for every k
 *   direct    about each component's own mean
 */

#include "vectors_begin.h"
#if IS_FLOAT64

#define ENTRY(i, j) ((i) * ((i) + 1) / 2 + (j))
/* Row i of a parameter: the vector of components that begins with component g. */
#define AT(parameter, i) LOAD((parameter) + (i) * width + g)
#define PUT(parameter, i, v) STORE((parameter) + (i) * width + g, v)
#define BROADCAST(x) ((VEC){0} + (REAL)(x))

/* ---- a problem and its memory ---------------------------------------------------------------------------------- */

typedef struct {
    Py_ssize_t first, rows, columns;
    REAL *z, *phi, *weight; /* (D, T); Φ, or what is made of it at once; (T,) */
    REAL *nearest, *label;  /* (T,) squared distance to the nearest seed, and which seed that is */
    REAL *cumulative;       /* (T,) sums of what seeds are drawn in proportion to */
} N_(Tile);

/* A mixture in the frame, components side by side. */
typedef struct {
    REAL *parameters;                 /* the three that follow, 1 + D + entries rows */
    REAL *weight, *mean, *covariance; /* of a diagonal Σ, its diagonal is all that there is */
    REAL *inverse, *pivot;            /* Σ = L diag(pivot) Lᵀ with unit lower triangular L: L⁻¹, D pivots */
    REAL *precision, *linear;         /* Λ = Σ⁻¹, Λ μ */
    REAL *constant;                   /* log w + ½ log |Λ| − ½ D log 2π */
    REAL *terms;                      /* size of the terms of ⟨η, φ⟩ anywhere among the samples, over w */
    double cancellation;              /* the same near the component itself; of all components the largest */
    Py_ssize_t reference;             /* the component with the smallest terms */
    int lifted, collapsed;
} N_(Components);

/* What a restart has come to. */
typedef struct {
    Py_ssize_t K, n_iter;
    double log_likelihood, entropy, value;
    int converged, status;
} N_(Outcome);

typedef struct {
    const Batch *batch;
    Problem problem;                             /* what the functions of tile.h read */
    Py_ssize_t rows, with_weight, D, K, width;   /* `width`: K rounded up to whole vectors */
    Py_ssize_t most;                             /* components at most */
    Py_ssize_t F, entries, direct_F;             /* of packed statistics, of a covariance, of direct statistics */
    Py_ssize_t tiles, T, stride, features;       /* T columns of a tile; rows of Φ that one product takes */
    int map, matrices, kept;                     /* of packed statistics; Σ has off-diagonals; tiles are kept */
    int loaded, framed, expanded, chosen;        /* how far tiles are: in memory, in their frame, to Φ, seeds chosen */
    enum form form;                              /* of the pass, */
    Py_ssize_t reference;                        /* and what it is relative to */
    double total, log_scale, common;             /* Σ ω; Σ log scale; what LINEAR or RELATIVE leave out of Σ ω log p */
    REAL *shift[2], *scale[2];                   /* z = ((x − shift₀) scale₀ − shift₁) scale₁; (D,), as these are: */
    REAL *zero, *low, *high, *extent, *deviation, *floor, *added, *closeness, *pivots;
    REAL *scatter;                               /* Σ ω z zᵀ, packed, or its diagonal */
    REAL *totals;                                /* Σ ω φ(z) (F,) */
    REAL *seeds, *drawn, *potential, *uniform;   /* (K, D), (candidates, D), (candidates,) twice */
    REAL *logits, *log_prob, *ones, *centred, *weighted; /* (K, T), (T,), (T,), (D + 1, T) twice */
    REAL *statistics, *moments;                  /* S (K, F), and components side by side */
    REAL *natural, *packed;                      /* η side by side; as logit_tile reads it */
    REAL *means, *factors, *constants;           /* of the direct form: (K, D), (K, D, D) or (K, D), (K,) */
    REAL *square, *column, *offset, *estimate;   /* (D, D), (D, LANES), (D, width), (entries, width) */
    REAL *best;                                  /* parameters of the best restart, those of its outcome */
    REAL *tile_memory;
    N_(Components) components[2];
} N_(Fit);

INLINE Py_ssize_t N_(rounded_up)(Py_ssize_t count, Py_ssize_t vectors) {
    return (count + vectors * LANES - 1) / (vectors * LANES) * (vectors * LANES);
}

INLINE int N_(all_lanes)(IVEC mask) {
    for (Py_ssize_t l = 0; l < LANES; ++l)
        if (!mask[l]) return 0;
    return 1;
}

INLINE Py_ssize_t N_(candidate_count)(Py_ssize_t K) { return 2 + (Py_ssize_t)log((double)K); }

/* Φ, or z and a piece of Φ; weight, nearest, label, cumulative. */
INLINE Py_ssize_t N_(tile_height)(const N_(Fit) *f) { return (f->kept ? f->F : f->D + f->features) + 4; }

/* The tiles: kept if they all fit; then as many as it takes, of about the same size. They follow from this problem
 * alone, so that neither its neighbours nor threads change a bit. */
KERNEL void N_(lay_out)(N_(Fit) *f) {
    N_(tile_shape)(f->D, f->most, f->F, 0, &f->features, &f->T, &f->stride);
    const Py_ssize_t widest = f->T < KEPT_COLUMNS ? f->T : KEPT_COLUMNS, n = f->rows > 0 ? f->rows : 1;
    const Py_ssize_t tiles = (n + widest - 1) / widest, columns = N_(rounded_up)((n + tiles - 1) / tiles, 4);
    f->kept = tiles * (f->F + 4) * (columns + LANES) * (Py_ssize_t)sizeof(REAL) <= KEPT_BYTES;
    if (f->kept) f->T = columns, f->stride = columns + LANES;
    f->tiles = (f->rows + f->T - 1) / f->T;
}

/* No more components than samples. */
INLINE Py_ssize_t N_(most_components)(const Batch *batch, Py_ssize_t b) {
    const Py_ssize_t rows = ITEM(int64_t, batch->offsets, b + 1) - ITEM(int64_t, batch->offsets, b);
    const Py_ssize_t most = ITEM(int64_t, batch->most, b);
    return most < rows ? most : rows;
}

/* Problem b with at most `most` components, as yet without memory. */
KERNEL void N_(measure)(N_(Fit) *f, const Batch *batch, Py_ssize_t b, Py_ssize_t most) {
    static const int maps[] = {FULL, LINEAR, DIAG, SPHERICAL}; /* in the order of enum covariance */
    const Py_ssize_t first = ITEM(int64_t, batch->offsets, b);
    memset(f, 0, sizeof(*f));
    f->batch = batch;
    f->problem = batch->samples;
    f->rows = ITEM(int64_t, batch->offsets, b + 1) - first;
    f->D = batch->samples.D;
    f->most = most > 1 ? most : 1;
    f->map = maps[batch->covariance];
    f->matrices = batch->covariance == FULL_COVARIANCE || batch->covariance == TIED_COVARIANCE;
    f->F = N_(quadratic_count)(f->map, f->D) + f->D + 1;
    f->entries = N_(quadratic_count)(f->matrices ? FULL : DIAG, f->D);
    f->direct_F = f->entries + f->D + 1;
    if (f->problem.order) f->problem.order += first * f->problem.order_stride;
    else {
        f->problem.x += first * f->problem.x_row_stride;
        if (f->problem.weight) f->problem.weight += first * f->problem.weight_stride;
    }
    N_(lay_out)(f);
}

/* Gives all arrays their places and returns how many bytes that takes; without a workspace only the latter. */
KERNEL size_t N_(arrange)(N_(Fit) *f, char *workspace) {
    const Py_ssize_t D = f->D, K = f->most, T = f->stride, entries = f->entries, width = N_(rounded_up)(K, 1);
    const Py_ssize_t F = f->F > f->direct_F ? f->F : f->direct_F, candidates = N_(candidate_count)(K);
    const Py_ssize_t factor = f->matrices ? D * D : D;
    uintptr_t place = ((uintptr_t)workspace + 63) / 64 * 64;
#define TAKE(array, count) array = (REAL *)place, place += ((count) * sizeof(REAL) + 63) / 64 * 64
    REAL **features[] = {f->shift, f->shift + 1, f->scale, f->scale + 1, &f->zero, &f->low, &f->high,
                         &f->extent, &f->deviation, &f->floor, &f->added, &f->closeness, &f->pivots};
    for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); ++i) TAKE(*features[i], D);
    TAKE(f->scatter, entries), TAKE(f->totals, f->F);
    TAKE(f->seeds, K * D), TAKE(f->drawn, candidates * D), TAKE(f->potential, candidates), TAKE(f->uniform, candidates);
    TAKE(f->logits, K * T), TAKE(f->log_prob, T), TAKE(f->ones, T);
    TAKE(f->centred, (D + 1) * T), TAKE(f->weighted, (D + 1) * T);
    TAKE(f->statistics, K * F), TAKE(f->moments, F * width);
    TAKE(f->natural, f->F * width), TAKE(f->packed, K * (f->F > factor ? f->F : factor));
    TAKE(f->means, K * D), TAKE(f->factors, K * factor), TAKE(f->constants, K);
    TAKE(f->square, D * D), TAKE(f->column, D * LANES), TAKE(f->offset, D * width), TAKE(f->estimate, entries * width);
    TAKE(f->best, (1 + D + entries) * width);
    for (N_(Components) *c = f->components; c < f->components + 2; ++c) {
        TAKE(c->parameters, (1 + D + entries) * width);
        TAKE(c->inverse, entries * width), TAKE(c->pivot, D * width), TAKE(c->precision, entries * width);
        TAKE(c->linear, D * width), TAKE(c->constant, width), TAKE(c->terms, width);
    }
    TAKE(f->tile_memory, (f->kept ? f->tiles : 1) * N_(tile_height)(f) * T);
#undef TAKE
    return place - (uintptr_t)workspace + 63; /* the start of another workspace may be aligned worse */
}

/* The problem now has K components. */
INLINE void N_(set_components)(N_(Fit) *f, Py_ssize_t K) {
    f->K = K;
    f->width = N_(rounded_up)(K, 1);
    for (N_(Components) *c = f->components; c < f->components + 2; ++c) {
        c->weight = c->parameters;
        c->mean = c->weight + f->width;
        c->covariance = c->mean + f->D * f->width;
    }
}

/* ---- tiles of samples ------------------------------------------------------------------------------------------ */

/* z ← (z − shift) · scale, zero where there is no weight. */
KERNEL void N_(apply_frame)(const N_(Fit) *f, const N_(Tile) *tile, int frame) {
    for (Py_ssize_t d = 0; d < f->D; ++d) {
        const REAL shift = f->shift[frame][d], scale = f->scale[frame][d];
        REAL *z = tile->z + d * f->stride;
        for (Py_ssize_t n = 0; n < tile->columns; n += LANES)
            STORE(z + n, SELECT((IVEC)(LOAD(tile->weight + n) > (REAL)0), (LOAD(z + n) - shift) * scale, (VEC){0}));
    }
}

/* ‖z − seed‖² of four vectors of samples, each feature in units of its deviation. */
INLINE void N_(distances)(const N_(Fit) *f, const REAL *restrict z, const REAL *restrict seed, VEC *restrict sum) {
    const REAL *closeness = f->closeness;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] = (VEC){0};
    for (Py_ssize_t d = 0; d < f->D; ++d, z += f->stride)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const VEC difference = LOAD(z + v * LANES) - seed[d];
            sum[v] += (difference * difference) * closeness[d];
        }
}

/* Seed k may be nearer than those before it; of equals the first stays. */
KERNEL void N_(approach)(const N_(Fit) *f, const N_(Tile) *tile, Py_ssize_t k) {
    for (Py_ssize_t n = 0; n < tile->columns; n += 4 * LANES) {
        VEC found[4];
        N_(distances)(f, tile->z + n, f->seeds + k * f->D, found);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            REAL *nearest = tile->nearest + n + v * LANES, *label = tile->label + n + v * LANES;
            const IVEC nearer = k ? (IVEC)(found[v] < LOAD(nearest)) : ~(IVEC){0};
            STORE(nearest, SELECT(nearer, found[v], LOAD(nearest)));
            STORE(label, SELECT(nearer, BROADCAST(k), LOAD(label)));
        }
    }
}

/* Tile t, as far as the frame and the seeds are known: found where it is kept, or made again. */
KERNEL N_(Tile) N_(open)(const N_(Fit) *f, Py_ssize_t t) {
    const Py_ssize_t first = t * f->T, rows = f->rows - first < f->T ? f->rows - first : f->T;
    REAL *memory = f->tile_memory + (f->kept ? t : 0) * N_(tile_height)(f) * f->stride;
    N_(Tile) tile = {first, rows, N_(rounded_up)(rows, 4)};
    tile.weight = memory;
    tile.nearest = tile.weight + f->stride;
    tile.label = tile.nearest + f->stride;
    tile.cumulative = tile.label + f->stride;
    tile.phi = tile.cumulative + f->stride;
    tile.z = tile.phi + (f->kept ? f->F - f->D - 1 : f->features) * f->stride;
    if (f->kept && f->loaded) return tile;
    N_(load_tile)(&f->problem, first, rows, tile.columns, f->stride, tile.weight, tile.z);
    if (f->framed) N_(apply_frame)(f, &tile, 1);
    for (int k = 0; k < f->chosen; ++k) N_(approach)(f, &tile, k);
    return tile;
}

/* Tiles that are kept follow a change of the frame. */
KERNEL void N_(reframe)(const N_(Fit) *f, int frame) {
    for (Py_ssize_t t = 0; f->kept && t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        N_(apply_frame)(f, &tile, frame);
    }
}

/* ---- Σ = L diag(pivot) Lᵀ, and what follows from it -------------------------------------------------------------- */

/* L replaces Σ: one column after the other, subtracting its product from what is right of it. Returns which lanes are
 * positive definite. */
KERNEL IVEC N_(factorize)(REAL *restrict L, Py_ssize_t D, int matrices, Py_ssize_t width, Py_ssize_t g,
                          REAL *restrict pivot, REAL *restrict column) {
    IVEC positive = ~(IVEC){0};
    for (Py_ssize_t k = 0; k < D; ++k) {
        const VEC p = AT(L, matrices ? ENTRY(k, k) : k), reciprocal = (REAL)1 / p;
        positive &= (IVEC)(p >= DBL_MIN) & (IVEC)(p <= DBL_MAX);
        PUT(pivot, k, p);
        if (!matrices) continue;
        for (Py_ssize_t i = k + 1; i < D; ++i) {
            const VEC m = AT(L, ENTRY(i, k));
            STORE(column + i * LANES, m * reciprocal);
            for (Py_ssize_t j = k + 1; j <= i; ++j)
                PUT(L, ENTRY(i, j), AT(L, ENTRY(i, j)) - m * LOAD(column + j * LANES));
        }
        PUT(L, ENTRY(k, k), BROADCAST(1));
        for (Py_ssize_t i = k + 1; i < D; ++i) PUT(L, ENTRY(i, k), LOAD(column + i * LANES));
    }
    return positive;
}

/* L⁻¹ replaces L: L⁻¹_ij = −Σ_{j ≤ k < i} L_ik L⁻¹_kj. */
KERNEL void N_(invert)(REAL *restrict L, Py_ssize_t D, Py_ssize_t width, Py_ssize_t g) {
    for (Py_ssize_t i = 1; i < D; ++i)
        for (Py_ssize_t j = 0; j < i; ++j) {
            VEC sum = AT(L, ENTRY(i, j));
            for (Py_ssize_t k = j + 1; k < i; ++k) sum += AT(L, ENTRY(i, k)) * AT(L, ENTRY(k, j));
            PUT(L, ENTRY(i, j), -sum);
        }
}

/* Λ_ij = Σ_{k ≥ i} L⁻¹_ki L⁻¹_kj / pivot_k. */
KERNEL void N_(find_precision)(const N_(Fit) *f, N_(Components) *c, Py_ssize_t g) {
    const Py_ssize_t D = f->D, width = f->width;
    const REAL *inverse = c->inverse;
    for (Py_ssize_t e = 0; e < f->entries; ++e)
        PUT(c->precision, e, f->matrices ? (VEC){0} : (REAL)1 / AT(c->pivot, e));
    for (Py_ssize_t k = 0; f->matrices && k < D; ++k) {
        const VEC reciprocal = (REAL)1 / AT(c->pivot, k);
        for (Py_ssize_t i = 0; i <= k; ++i) {
            const VEC left = AT(inverse, ENTRY(k, i)) * reciprocal;
            for (Py_ssize_t j = 0; j <= i; ++j)
                PUT(c->precision, ENTRY(i, j), AT(c->precision, ENTRY(i, j)) + left * AT(inverse, ENTRY(k, j)));
        }
    }
}

/* Λ μ, and Σ_ij |Λ_ij| s_i s_j, the size of the terms of ⟨η, φ⟩: near the component, where s_i² = Σ_ii + μ_i², and
 * anywhere, where s_i is the largest |z_i|. */
KERNEL VEC N_(find_linear)(const N_(Fit) *f, N_(Components) *c, Py_ssize_t g) {
    const Py_ssize_t D = f->D, width = f->width;
    VEC terms = {0}, anywhere = {0};
    for (Py_ssize_t i = 0, e = 0; i < D; ++i) {
        const VEC mean = AT(c->mean, i), variance = AT(c->covariance, f->matrices ? ENTRY(i, i) : i);
        const VEC size = N_(square_root)(variance + mean * mean);
        STORE(f->column + i * LANES, size);
        VEC linear = {0};
        for (Py_ssize_t j = f->matrices ? 0 : i; j < i; ++j, ++e) {
            const VEC p = AT(c->precision, e);
            linear += p * AT(c->mean, j);
            PUT(c->linear, j, AT(c->linear, j) + p * mean);
            const VEC twice = SELECT((IVEC)(p < (REAL)0), -p, p) * (REAL)2;
            terms += twice * size * LOAD(f->column + j * LANES);
            anywhere += twice * (f->extent[i] * f->extent[j]);
        }
        const VEC p = AT(c->precision, e++);
        PUT(c->linear, i, linear + p * mean);
        terms += p * size * size;
        anywhere += p * (f->extent[i] * f->extent[i]);
    }
    PUT(c->terms, 0, anywhere);
    return terms;
}

/* Everything that follows from weights, means and the factors of the covariances. */
KERNEL void N_(complete)(const N_(Fit) *f, N_(Components) *c) {
    const Py_ssize_t D = f->D, width = f->width;
    c->cancellation = 0;
    c->reference = 0;
    for (Py_ssize_t g = 0; g < width; g += LANES) {
        if (f->matrices) N_(invert)(c->inverse, D, width, g);
        N_(find_precision)(f, c, g);
        const VEC weight = AT(c->weight, 0), terms = N_(find_linear)(f, c, g);
        const IVEC any = (IVEC)(weight > (REAL)0);
        VEC log_det = {0};
        for (Py_ssize_t d = 0; d < D; ++d) log_det += N_(log)(AT(c->pivot, d));
        const VEC constant = N_(log)(weight) - (REAL)0.5 * (log_det + (REAL)(D * LOG_2_PI));
        PUT(c->constant, 0, SELECT(any, constant, BROADCAST(-INFINITY)));
        PUT(c->terms, 0, SELECT(any, AT(c->terms, 0) / weight, BROADCAST(INFINITY)));
        for (Py_ssize_t l = 0; l < LANES; ++l) {
            if (any[l] && !(terms[l] <= c->cancellation)) c->cancellation = terms[l];
            if (c->terms[g + l] < c->terms[c->reference]) c->reference = g + l;
        }
    }
    c->cancellation += D + 2;
}

/* ---- the start: greedy k-means++ --------------------------------------------------------------------------------- */

/* The first two words of a block of Philox. */
KERNEL uint64_t N_(words_of)(uint64_t seed, uint32_t stream, uint32_t block, uint64_t row) {
    N_(words) word[4];
    N_(philox)(seed, stream, block, (N_(words)){0} + row, word);
    return (word[0][0] & 0xffffffffu) | word[1][0] << 32;
}

/* The next `count` uniforms of a restart, from number t. */
KERNEL void N_(draw_uniforms)(N_(Fit) *f, uint64_t key, Py_ssize_t restart, Py_ssize_t t, Py_ssize_t count) {
    const uint64_t row = ((uint64_t)f->K << 32) + (uint64_t)restart;
    for (Py_ssize_t i = 0; i < count; ++i)
        f->uniform[i] = (N_(words_of)(key, f->batch->stream_of_seeds, t + i, row) >> 12) * 0x1p-52 + 0x1p-53;
}

/* Sums of ω · nearest, or of ω, over the samples of a tile; returns the last. */
KERNEL double N_(accumulate)(const N_(Tile) *tile, int weight_alone) {
    double sum = 0;
    for (Py_ssize_t n = 0; n < tile->rows; ++n) {
        sum += weight_alone ? tile->weight[n] : tile->weight[n] * tile->nearest[n];
        tile->cumulative[n] = sum;
    }
    return sum;
}

KERNEL double N_(accumulate_all)(const N_(Fit) *f, int weight_alone) {
    double sum = 0;
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        sum += N_(accumulate)(&tile, weight_alone);
    }
    return sum;
}

/* The first sample of a tile whose cumulative sum exceeds `target`, or that nothing adds to after. */
KERNEL Py_ssize_t N_(position)(const N_(Tile) *tile, double below, double target) {
    Py_ssize_t first = 0, last = tile->rows - 1;
    const double most = tile->cumulative[last];
    while (first < last) {
        const Py_ssize_t middle = (first + last) / 2;
        if (below + tile->cumulative[middle] > target || tile->cumulative[middle] >= most) last = middle;
        else first = middle + 1;
    }
    return first;
}

/* `count` samples drawn with probability in proportion to ω · nearest, or to ω if there is nothing else. */
KERNEL void N_(draw)(N_(Fit) *f, Py_ssize_t count) {
    int weight_alone = f->chosen == 0;
    double total = N_(accumulate_all)(f, weight_alone), below = 0;
    if (!(total > 0)) total = N_(accumulate_all)(f, weight_alone = 1);
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        const double sum = f->kept ? tile.cumulative[tile.rows - 1] : N_(accumulate)(&tile, weight_alone);
        for (Py_ssize_t i = 0; sum > 0 && i < count; ++i) {
            const double target = f->uniform[i] * total;
            if (below > target) continue; /* found in a tile before this one */
            const Py_ssize_t n = N_(position)(&tile, below, target);
            for (Py_ssize_t d = 0; d < f->D; ++d) f->drawn[i * f->D + d] = tile.z[d * f->stride + n];
        }
        below += sum;
    }
}

/* Σ ω min(nearest, distance to the candidate) of one tile. */
KERNEL double N_(potential_of)(const N_(Fit) *f, const N_(Tile) *tile, const REAL *candidate) {
    VEC sum = {0};
    for (Py_ssize_t n = 0; n < tile->columns; n += 4 * LANES) {
        VEC found[4];
        N_(distances)(f, tile->z + n, candidate, found);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const VEC nearest = LOAD(tile->nearest + n + v * LANES);
            sum += LOAD(tile->weight + n + v * LANES) * SELECT((IVEC)(found[v] < nearest), found[v], nearest);
        }
    }
    double total = 0;
    for (Py_ssize_t l = 0; l < LANES; ++l) total += sum[l];
    return total;
}

/* Which of the drawn samples leaves the smallest potential, the first of those that are equal to rounding. */
KERNEL Py_ssize_t N_(best_candidate)(N_(Fit) *f, Py_ssize_t count) {
    Py_ssize_t best = 0;
    for (Py_ssize_t i = 0; i < count; ++i) f->potential[i] = 0;
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        for (Py_ssize_t i = 0; i < count; ++i) f->potential[i] += N_(potential_of)(f, &tile, f->drawn + i * f->D);
    }
    for (Py_ssize_t i = 1; i < count; ++i)
        if (f->potential[i] < (1 - f->batch->rounding) * f->potential[best]) best = i;
    return best;
}

/* The seeds, and each sample's nearest: Arthur, Vassilvitskii (2007), section 2.2. */
KERNEL void N_(choose_seeds)(N_(Fit) *f, uint64_t key, Py_ssize_t restart) {
    const Py_ssize_t candidates = N_(candidate_count)(f->K);
    for (Py_ssize_t k = 0, t = 0; k < f->K; ++k) {
        const Py_ssize_t count = k ? candidates : 1;
        N_(draw_uniforms)(f, key, restart, t, count);
        N_(draw)(f, count);
        const Py_ssize_t best = k ? N_(best_candidate)(f, count) : 0;
        memcpy(f->seeds + k * f->D, f->drawn + best * f->D, f->D * sizeof(REAL));
        f->chosen = (int)k + 1;
        for (Py_ssize_t i = 0; f->kept && i < f->tiles; ++i) {
            const N_(Tile) tile = N_(open)(f, i);
            N_(approach)(f, &tile, k);
        }
        t += count;
    }
}

/* ---- expect ---------------------------------------------------------------------------------------------------- */

/* η = (−½ Λ, off-diagonals doubled; Λ μ; c − ½ μᵀ Λ μ), and for LINEAR −½ ⟨Λ, Σ ω z zᵀ⟩ = Σ ω of what it leaves out. */
KERNEL void N_(encode_packed)(N_(Fit) *f, const N_(Components) *c) {
    const Py_ssize_t D = f->D, width = f->width, quadratic = f->F - D - 1;
    for (Py_ssize_t g = 0; g < width; g += LANES) {
        for (Py_ssize_t i = 0, e = 0; i < D; ++i)
            for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e) {
                const VEC coefficient = AT(c->precision, e) * (i == j ? (REAL)-0.5 : (REAL)-1);
                if (e < quadratic) PUT(f->natural, e, coefficient);
                if (f->map == LINEAR && !g) f->common += coefficient[0] * f->scatter[e];
            }
        VEC constant = AT(c->constant, 0);
        for (Py_ssize_t d = 0; d < D; ++d) {
            PUT(f->natural, quadratic + d, AT(c->linear, d));
            constant -= (REAL)0.5 * AT(c->linear, d) * AT(c->mean, d);
        }
        PUT(f->natural, quadratic + D, constant);
    }
}

/* η_k − η_c in the place of η_k, the last component's in the place of c. */
KERNEL void N_(subtract_reference)(N_(Fit) *f) {
    const Py_ssize_t width = f->width;
    for (Py_ssize_t e = 0; e < f->F; ++e) {
        const REAL common = f->natural[e * width + f->reference];
        f->common += common * f->totals[e];
        for (Py_ssize_t g = 0; g < width; g += LANES) PUT(f->natural, e, AT(f->natural, e) - common);
    }
    for (Py_ssize_t e = 0; e < f->F; ++e) f->natural[e * width + f->reference] = f->natural[e * width + f->K - 1];
}

/* μ_k, P_k = L⁻ᵀ diag(1 / √pivot) or its diagonal, and c_k, one component after the other. */
KERNEL void N_(encode_direct)(N_(Fit) *f, const N_(Components) *c) {
    const Py_ssize_t D = f->D, width = f->width;
    memset(f->factors, 0, f->K * (f->matrices ? D * D : D) * sizeof(REAL));
    for (Py_ssize_t k = 0; k < f->K; ++k) {
        f->constants[k] = c->constant[k];
        for (Py_ssize_t i = 0; i < D; ++i) {
            const REAL root = (REAL)1 / sqrt(c->pivot[i * width + k]);
            f->means[k * D + i] = c->mean[i * width + k];
            if (!f->matrices) f->factors[k * D + i] = root;
            for (Py_ssize_t j = 0; f->matrices && j <= i; ++j)
                f->factors[(k * D + j) * D + i] = c->inverse[ENTRY(i, j) * width + k] * root;
        }
    }
    f->problem.mean = f->means, f->problem.log_constant = f->constants;
    f->problem.coefficients = f->factors, f->problem.coefficient_stride = D * D;
    N_(pack_coefficients)(&f->problem, f->packed, NULL);
}

/* What the functions of tile.h read, and no statistics yet. */
KERNEL void N_(encode)(N_(Fit) *f, const N_(Components) *c, enum form form) {
    const int direct = form == DIRECT;
    f->form = form, f->reference = c->reference, f->common = 0;
    f->problem.K = form == RELATIVE ? f->K - 1 : f->K;
    f->problem.direct = direct;
    f->problem.map = !direct ? f->map : f->matrices ? FULL : DIAG;
    f->problem.F = direct ? f->direct_F : f->F;
    if (direct) N_(encode_direct)(f, c);
    else N_(encode_packed)(f, c);
    if (form == RELATIVE) N_(subtract_reference)(f);
    if (!direct) N_(pack_natural)(f->natural, 1, f->width, f->problem.K, f->F, f->packed);
    f->problem.statistics = f->statistics;
    memset(f->statistics, 0, f->K * f->problem.F * sizeof(REAL));
}

/* L_k = ⟨η_k, φ⟩, or ⟨η_k − η_c, φ⟩ without c, or c_k − ½ ‖P_kᵀ (z − μ_k)‖². */
KERNEL void N_(find_logits)(N_(Fit) *f, const N_(Tile) *tile) {
    const Problem *p = &f->problem;
    if (p->direct)
        N_(direct_logit_tile)(p, f->packed, tile->z, tile->columns, f->stride, f->centred, f->weighted, f->logits);
    else
        N_(packed_logit_tile)(p, f->packed, tile->z, tile->columns, f->stride, f->features, f->kept, tile->phi,
                              f->logits);
}

/* S_k += Σ r_k φ(z), or about the component's own mean. */
KERNEL void N_(add_statistics)(N_(Fit) *f, const N_(Tile) *tile, const REAL *r) {
    const Problem *p = &f->problem;
    if (p->direct)
        N_(direct_statistic_tile)(p, tile->z, r, tile->columns, f->stride, f->centred, f->weighted, f->square);
    else
        N_(packed_statistic_tile)(p, tile->z, r, NULL, N_(rounded_up)(tile->rows, 1), f->stride, f->features, f->kept,
                                  tile->phi);
}

/* Whether relative_softmax suits the logits of a tile: all samples weigh the same, and exp can be added up as it is. */
KERNEL int N_(moderate)(const N_(Fit) *f, const N_(Tile) *tile) {
    IVEC fine = ~(IVEC){0};
    if (f->form != RELATIVE || f->problem.weight) return 0;
    for (Py_ssize_t k = 0; k < f->problem.K; ++k)
        for (Py_ssize_t n = 0; n < tile->columns; n += LANES)
            fine &= (IVEC)(LOAD(f->logits + k * f->stride + n) <= (REAL)MOST_EXPONENT);
    return N_(all_lanes)(fine);
}

/* With s = 1 + Σ_k exp(L_k), for samples of weight one (or zero): L ← r_k = exp(L_k) / s, or, with a place for it,
 * −Σ_k r_k log r_k = log s − Σ_k r_k L_k is added to `entropy`. Returns the sum of log s, by one logarithm: of the
 * product of what is left of each s without its exponent, 1 ≤ m < 2, of which a lane has at most 1024 / LANES. */
INLINE double N_(relative_softmax)(REAL *restrict logits, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride,
                                   const REAL *restrict weight, double *restrict entropy) {
    const IVEC one = (IVEC)BROADCAST(1), mantissa = (IVEC){0} + (((INTEGER)1 << MANTISSA_BITS) - 1);
    VEC product = BROADCAST(1), expected = {0};
    IVEC exponent = {0};
    for (Py_ssize_t n = 0; n < columns; n += 4 * LANES) {
        VEC sum[4], moment[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[v] = BROADCAST(1), moment[v] = (VEC){0};
        for (Py_ssize_t k = 0; k < rows; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                REAL *at = logits + k * stride + n + v * LANES;
                const VEC l = LOAD(at), e = N_(exp)(l);
                sum[v] += e;
                if (entropy) moment[v] += SELECT((IVEC)(e > (REAL)0), e * l, (VEC){0});
                else STORE(at, e);
            }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const VEC w = LOAD(weight + n + v * LANES);
            const IVEC s = (IVEC)SELECT((IVEC)(w > (REAL)0), sum[v], (VEC)one);
            exponent += (s - one) >> MANTISSA_BITS;
            product *= (VEC)((s & mantissa) | one);
            sum[v] = w / sum[v];
            if (entropy) expected += moment[v] * sum[v];
        }
        for (Py_ssize_t k = 0; !entropy && k < rows; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                REAL *l = logits + k * stride + n + v * LANES;
                STORE(l, LOAD(l) * sum[v]);
            }
    }
    const VEC logarithm = N_(log)(product);
    double total = 0;
    for (Py_ssize_t l = 0; l < LANES; ++l) total += logarithm[l] + exponent[l] * M_LN2;
    if (entropy) *entropy += total;
    for (Py_ssize_t l = 0; entropy && l < LANES; ++l) *entropy -= expected[l];
    return total;
}

/* L ← ω softmax_k(L), log p ← log Σ_k exp(L_k); relative to c its logit is 0, in the last row. */
KERNEL void N_(softmax_of_all)(N_(Fit) *f, const N_(Tile) *tile, const REAL *weight) {
    if (f->form == RELATIVE) memset(f->logits + (f->K - 1) * f->stride, 0, tile->columns * sizeof(REAL));
    N_(softmax_tile)(f->logits, f->K, tile->columns, f->stride, weight, 0, 1, NULL, f->log_prob);
}

/* L ← ω softmax_k(L) where statistics need it; returns Σ ω log Σ_k exp(L_k). */
KERNEL double N_(find_responsibilities)(N_(Fit) *f, const N_(Tile) *tile) {
    if (N_(moderate)(f, tile))
        return N_(relative_softmax)(f->logits, f->problem.K, tile->columns, f->stride, tile->weight, NULL);
    N_(softmax_of_all)(f, tile, tile->weight);
    return N_(inner_product)(tile->weight, f->log_prob, tile->rows);
}

/* S_c = Σ ω φ − Σ_{k ≠ c} S_k, and the last component's from the place of c into its own. */
KERNEL void N_(add_reference)(N_(Fit) *f) {
    const Py_ssize_t F = f->F;
    REAL *S = f->statistics, *own = S + f->reference * F, *last = S + (f->K - 1) * F;
    for (Py_ssize_t i = 0; i < F; ++i) last[i] = own[i], own[i] = f->totals[i];
    for (Py_ssize_t k = 0; k < f->K; ++k)
        for (Py_ssize_t i = 0; k != f->reference && i < F; ++i) own[i] -= S[k * F + i];
}

/* r_k ← ω where k is the nearest seed; relative to c, the last component is in the place of c. */
KERNEL void N_(assign)(N_(Fit) *f, const N_(Tile) *tile) {
    for (Py_ssize_t row = 0; row < f->problem.K; ++row) {
        const Py_ssize_t k = f->form == RELATIVE && row == f->reference ? f->K - 1 : row;
        for (Py_ssize_t n = 0; n < tile->columns; n += LANES) {
            const IVEC own = (IVEC)(LOAD(tile->label + n) == (REAL)k);
            STORE(f->logits + row * f->stride + n, SELECT(own, LOAD(tile->weight + n), (VEC){0}));
        }
    }
}

/* S and Σ ω log p in one pass; or S of each sample's nearest seed. */
KERNEL double N_(expect)(N_(Fit) *f, const N_(Components) *c, enum form form, int nearest) {
    double total = 0;
    N_(encode)(f, c, form);
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        if (!nearest || !f->kept) N_(find_logits)(f, &tile); /* makes Φ if it is not kept */
        if (nearest) N_(assign)(f, &tile);
        else total += N_(find_responsibilities)(f, &tile);
        N_(add_statistics)(f, &tile, f->logits);
    }
    if (form == RELATIVE) N_(add_reference)(f);
    return total + f->common;
}

/* −Σ_k r_k log r_k of each sample. */
KERNEL void N_(entropies)(N_(Fit) *f, const N_(Tile) *tile, REAL *restrict entropy) {
    for (Py_ssize_t n = 0; n < tile->columns; n += LANES) {
        VEC sum = {0};
        for (Py_ssize_t k = 0; k < f->K; ++k) {
            const VEC r = LOAD(f->logits + k * f->stride + n);
            sum -= SELECT((IVEC)(r >= DBL_MIN), r * N_(log)(r), (VEC){0});
        }
        STORE(entropy + n, sum);
    }
}

/* entropy += −Σ ω Σ_k r_k log r_k of one tile; returns Σ ω log Σ_k exp(L_k). */
KERNEL double N_(add_entropy)(N_(Fit) *f, const N_(Tile) *tile, double *entropy) {
    if (N_(moderate)(f, tile))
        return N_(relative_softmax)(f->logits, f->problem.K, tile->columns, f->stride, tile->weight, entropy);
    N_(softmax_of_all)(f, tile, f->ones);
    const double total = N_(inner_product)(tile->weight, f->log_prob, tile->rows);
    N_(entropies)(f, tile, f->log_prob);
    *entropy += N_(inner_product)(tile->weight, f->log_prob, tile->rows);
    return total;
}

/* ---- maximize ---------------------------------------------------------------------------------------------------- */

/* S (K, F) with components side by side; lanes without a component have no statistics. */
KERNEL void N_(side_by_side)(N_(Fit) *f) {
    const Py_ssize_t F = f->problem.F, width = f->width;
    memset(f->moments, 0, F * width * sizeof(REAL));
    for (Py_ssize_t k = 0; k < f->K; ++k)
        for (Py_ssize_t i = 0; i < F; ++i) f->moments[i * width + k] = f->statistics[k * F + i];
}

/* w = N_k / N, μ = a + δ and Σ = Σ_n r (z − a)(z − a)ᵀ / N_k − δ δᵀ, where δ = Σ_n r (z − a) / N_k and a is the old
 * mean (direct) or zero (packed). A component without data keeps its mean, and loses its weight. */
KERNEL void N_(estimate)(N_(Fit) *f, const N_(Components) *old, N_(Components) *new, double total, double least,
                         Py_ssize_t g) {
    const Py_ssize_t D = f->D, width = f->width, F = f->problem.F;
    const REAL *S = f->moments;
    const VEC mass = AT(S, F - 1);
    const IVEC empty = (IVEC)(mass <= least);
    const VEC reciprocal = (REAL)1 / SELECT(empty, BROADCAST(1), mass);
    PUT(new->weight, 0, SELECT(empty, (VEC){0}, mass) / (REAL)total);
    for (Py_ssize_t d = 0; d < D; ++d) {
        const VEC offset = AT(S, F - 1 - D + d) * reciprocal, mean = AT(old->mean, d);
        PUT(f->offset, d, offset);
        PUT(new->mean, d, SELECT(empty, mean, f->problem.direct ? mean + offset : offset));
    }
    for (Py_ssize_t i = 0, e = 0; i < D; ++i)
        for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e) {
            const VEC second = f->problem.map == LINEAR    ? BROADCAST(f->scatter[e] / f->total)
                             : f->problem.map == SPHERICAL ? AT(S, 0) * reciprocal / (REAL)D
                                                           : AT(S, e) * reciprocal;
            PUT(f->estimate, e, second - AT(f->offset, i) * AT(f->offset, j));
        }
}

/* One variance for all features, or one covariance for all components: the means of the estimates. */
KERNEL void N_(constrain)(N_(Fit) *f, const N_(Components) *new) {
    const Py_ssize_t width = f->width;
    if (f->batch->covariance == SPHERICAL_COVARIANCE)
        for (Py_ssize_t g = 0; g < width; g += LANES) {
            VEC sum = {0};
            for (Py_ssize_t d = 0; d < f->D; ++d) sum += AT(f->estimate, d);
            for (Py_ssize_t d = 0; d < f->D; ++d) PUT(f->estimate, d, sum / (REAL)f->D);
        }
    if (f->batch->covariance == TIED_COVARIANCE) {
        double all = 0;
        for (Py_ssize_t k = 0; k < f->K; ++k) all += new->weight[k];
        for (Py_ssize_t e = 0; e < f->entries; ++e) {
            REAL *estimate = f->estimate + e * width;
            double sum = 0;
            for (Py_ssize_t k = 0; k < f->K; ++k) sum += new->weight[k] * estimate[k];
            for (Py_ssize_t k = 0; k < width; ++k) estimate[k] = sum / all;
        }
    }
}

/* Σ ← the estimate with what is to be added and `lift` floors, or the old Σ of those in `kept`; and its factors.
 * Returns whose pivots are positive, and not only by rounding. */
KERNEL IVEC N_(lift_covariance)(N_(Fit) *f, const N_(Components) *old, N_(Components) *new, VEC lift, IVEC kept,
                                Py_ssize_t g) {
    const Py_ssize_t D = f->D, width = f->width;
    const REAL rounding = f->batch->rounding;
    for (Py_ssize_t i = 0, e = 0; i < D; ++i)
        for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e) {
            VEC entry = AT(f->estimate, e);
            if (i == j) entry += f->added[i] + lift * f->floor[i];
            PUT(new->covariance, e, SELECT(kept, AT(old->covariance, e), entry));
            PUT(new->inverse, e, AT(new->covariance, e));
        }
    IVEC positive = N_(factorize)(new->inverse, D, f->matrices, width, g, new->pivot, f->column);
    for (Py_ssize_t d = 0; d < D; ++d) {
        const VEC pivot = AT(new->pivot, d), variance = AT(new->covariance, f->matrices ? ENTRY(d, d) : d);
        const REAL spread = f->floor[d] / f->batch->relative_floor; /* of all samples */
        positive &= (IVEC)(pivot > rounding * variance) & (IVEC)(pivot > rounding * rounding * spread);
    }
    return positive;
}

/* As many floors as it takes to be positive definite; whoever has no data keeps the old Σ. A component has collapsed if
 * it took any, or if, given the features before it, some feature varies less than the floor, and less than it does in
 * all samples together. Returns whether all are positive definite. */
KERNEL int N_(regularize)(N_(Fit) *f, const N_(Components) *old, N_(Components) *new, Py_ssize_t g) {
    const Py_ssize_t width = f->width;
    const int tied = f->batch->covariance == TIED_COVARIANCE;
    const IVEC kept = tied ? (IVEC){0} : (IVEC)(AT(new->weight, 0) == (REAL)0);
    VEC lift = {0};
    IVEC positive = {0};
    for (Py_ssize_t i = 0; i < f->batch->n_lifts && !N_(all_lanes)(positive); ++i) {
        lift = SELECT(positive, lift, BROADCAST(f->batch->lifts[i]));
        positive = N_(lift_covariance)(f, old, new, lift, kept, g);
    }
    if (!N_(all_lanes)(positive)) return 0;
    IVEC narrow = (IVEC)(lift > (REAL)0);
    for (Py_ssize_t d = 0; d < f->D; ++d) {
        const REAL least = f->added[d] + f->floor[d];
        if (f->pivots[d] > 2 * least) narrow |= (IVEC)(AT(new->pivot, d) < least);
    }
    for (Py_ssize_t l = 0; l < LANES; ++l) {
        new->lifted |= lift[l] > 0;
        new->collapsed |= narrow[l] && !kept[l] && !tied;
    }
    return 1;
}

/* The M-step from S: Bishop (2006), eq. 9.24-9.26. Returns whether it came to something. */
KERNEL int N_(maximize)(N_(Fit) *f, const N_(Components) *old, N_(Components) *new) {
    double total = 0;
    N_(side_by_side)(f);
    const REAL *mass = f->moments + (f->problem.F - 1) * f->width;
    for (Py_ssize_t k = 0; k < f->K; ++k) total += mass[k];
    const double least = f->batch->no_mass * total;
    new->lifted = new->collapsed = 0;
    for (Py_ssize_t k = 0; k < f->K; ++k) new->collapsed |= mass[k] <= least;
    for (Py_ssize_t g = 0; g < f->width; g += LANES) N_(estimate)(f, old, new, total, least, g);
    N_(constrain)(f, new);
    for (Py_ssize_t g = 0; g < f->width; g += LANES)
        if (!N_(regularize)(f, old, new, g)) return 0;
    N_(complete)(f, new);
    return 1;
}

/* ---- prepare ----------------------------------------------------------------------------------------------------- */

/* The range of one feature over the samples of a tile that have weight; returns whether all are finite. */
KERNEL int N_(extend_range)(const N_(Tile) *tile, const REAL *restrict z, REAL *low, REAL *high) {
    VEC least = BROADCAST(INFINITY), most = -least;
    IVEC finite = ~(IVEC){0};
    for (Py_ssize_t n = 0; n < tile->columns; n += LANES) {
        const VEC x = LOAD(z + n);
        const IVEC any = (IVEC)(LOAD(tile->weight + n) > (REAL)0);
        finite &= (IVEC)(x - x == (REAL)0);
        least = SELECT(any & (IVEC)(x < least), x, least);
        most = SELECT(any & (IVEC)(x > most), x, most);
    }
    for (Py_ssize_t l = 0; l < LANES; ++l) {
        if (least[l] < *low) *low = least[l];
        if (most[l] > *high) *high = most[l];
    }
    return N_(all_lanes)(finite);
}

/* The range of each feature and the sum of the weights; returns why the problem cannot be fitted, or FINE. */
KERNEL int N_(examine)(N_(Fit) *f, Py_ssize_t fewest) {
    int finite = 1, sane = 1;
    for (Py_ssize_t d = 0; d < f->D; ++d) f->low[d] = INFINITY, f->high[d] = -INFINITY;
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        for (Py_ssize_t n = 0; n < tile.rows; ++n) {
            const REAL weight = tile.weight[n];
            sane &= weight >= 0 && weight < INFINITY;
            f->with_weight += weight > 0;
            f->total += weight;
        }
        for (Py_ssize_t d = 0; d < f->D; ++d)
            finite &= N_(extend_range)(&tile, tile.z + d * f->stride, f->low + d, f->high + d);
    }
    f->loaded = 1;
    return !sane ? BAD_WEIGHT : f->with_weight < fewest ? TOO_FEW_ROWS : !finite ? NOT_FINITE : FINE;
}

/* The power of two that brings a positive number into [½, 1); 1 for zero. Neither it nor its inverse overflows. */
INLINE double N_(power_of_two)(double deviation) {
    int exponent;
    if (!(deviation > 0)) return 1;
    frexp(deviation, &exponent);
    return ldexp(1, exponent > 1021 ? -1021 : exponent < -1021 ? 1021 : -exponent);
}

/* S of one component with r = 1: Σ ω φ(z − mean), every entry of the covariance, or its diagonal. Where Φ is kept the
 * mean is zero. */
KERNEL void N_(moments_about)(N_(Fit) *f, int map, const REAL *mean) {
    Problem *p = &f->problem;
    p->direct = !(f->expanded && map == f->map);
    p->K = 1, p->map = map, p->F = N_(quadratic_count)(map, f->D) + f->D + 1;
    p->mean = mean, p->statistics = f->statistics;
    memset(f->statistics, 0, p->F * sizeof(REAL));
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        N_(add_statistics)(f, &tile, tile.weight);
    }
}

/* Into the frame in two steps: by the range, within which nothing overflows, then by mean and deviation. */
KERNEL void N_(find_frame)(N_(Fit) *f) {
    const Py_ssize_t D = f->D;
    for (Py_ssize_t d = 0; d < D; ++d) {
        const double low = f->low[d], high = f->high[d];
        f->shift[0][d] = high > low ? low / 2 + high / 2 : low;
        f->scale[0][d] = N_(power_of_two)(high / 2 - low / 2);
    }
    N_(reframe)(f, 0);
    N_(moments_about)(f, DIAG, f->zero);
    for (Py_ssize_t d = 0; d < D; ++d) f->shift[1][d] = f->statistics[D + d] / f->total;
    N_(moments_about)(f, DIAG, f->shift[1]);
    double coarsest = INFINITY; /* spherical: one scale for all features */
    for (Py_ssize_t d = 0; d < D; ++d) {
        f->deviation[d] = sqrt(f->statistics[d] / f->total);
        f->scale[1][d] = N_(power_of_two)(f->deviation[d]);
        const double fine = f->scale[1][d] * f->batch->round_shift; /* equal differences of samples stay equal */
        f->shift[1][d] = rint(f->shift[1][d] * fine) / fine;
        if (f->deviation[d] > 0) coarsest = fmin(coarsest, f->scale[0][d] * f->scale[1][d]);
    }
    if (f->batch->covariance == SPHERICAL_COVARIANCE)
        for (Py_ssize_t d = 0; d < D; ++d) f->scale[1][d] = (coarsest < INFINITY ? coarsest : 1) / f->scale[0][d];
    for (Py_ssize_t d = 0; d < D; ++d) { /* the largest |z_d| */
        const double low = (f->low[d] - f->shift[0][d]) * f->scale[0][d] - f->shift[1][d];
        const double high = (f->high[d] - f->shift[0][d]) * f->scale[0][d] - f->shift[1][d];
        f->extent[d] = fmax(-low, high) * f->scale[1][d];
    }
    N_(reframe)(f, 1);
    f->framed = 1;
}

/* For spherical covariances, the mean over features. */
INLINE void N_(level)(const N_(Fit) *f, REAL *values) {
    double sum = 0;
    if (f->batch->covariance != SPHERICAL_COVARIANCE) return;
    for (Py_ssize_t d = 0; d < f->D; ++d) sum += values[d];
    for (Py_ssize_t d = 0; d < f->D; ++d) values[d] = sum / f->D;
}

/* What is added to covariances, and in what units k-means++ measures. */
KERNEL void N_(find_floors)(N_(Fit) *f) {
    const double added = f->batch->added;
    for (Py_ssize_t d = 0; d < f->D; ++d) {
        const double deviation = f->deviation[d] * f->scale[1][d], scale = f->scale[0][d] * f->scale[1][d];
        const double variance = deviation * deviation > 0 ? deviation * deviation : 1;
        f->floor[d] = f->batch->relative_floor * variance;
        f->added[d] = added < 0 ? f->floor[d] : added * (scale * scale);
        f->closeness[d] = f->batch->covariance == SPHERICAL_COVARIANCE ? 1 : 1 / variance;
        f->log_scale += log(scale);
    }
    N_(level)(f, f->floor);
    N_(level)(f, f->added);
}

/* Σ ω φ(z), from Σ ω of (z zᵀ or its diagonal, z, 1). */
KERNEL void N_(find_totals)(N_(Fit) *f) {
    const Py_ssize_t quadratic = f->F - f->D - 1;
    memcpy(f->totals, f->statistics, quadratic * sizeof(REAL));
    if (f->map == SPHERICAL)
        for (Py_ssize_t d = 1; d < f->D; ++d) f->totals[0] += f->statistics[d];
    memcpy(f->totals + quadratic, f->statistics + f->entries, (f->D + 1) * sizeof(REAL));
}

/* The scatter of all samples, and its pivots with everything added: how each feature varies given those before it. */
KERNEL int N_(find_scatter)(N_(Fit) *f) {
    const Py_ssize_t D = f->D, width = LANES, g = 0;
    REAL *L = f->components[0].inverse, *pivot = f->components[0].pivot;
    N_(moments_about)(f, f->matrices ? FULL : DIAG, f->zero);
    memcpy(f->scatter, f->statistics, f->entries * sizeof(REAL));
    N_(find_totals)(f);
    if (!f->matrices) N_(level)(f, f->scatter);
    for (Py_ssize_t i = 0, e = 0; i < D; ++i)
        for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e)
            PUT(L, e, BROADCAST(f->scatter[e] / f->total + (i == j ? f->added[i] + f->floor[i] : 0)));
    const IVEC positive = N_(factorize)(L, D, f->matrices, width, g, pivot, f->column);
    for (Py_ssize_t d = 0; d < D; ++d) f->pivots[d] = pivot[d * width];
    return positive[0] != 0;
}

/* Φ of every tile that is kept. */
KERNEL void N_(keep_features)(N_(Fit) *f) {
    const Py_ssize_t quadratic = f->F - f->D - 1;
    for (Py_ssize_t t = 0; f->kept && t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        N_(feature_tile)(f->map, tile.z, f->D, tile.columns, f->stride, 0, quadratic, tile.phi);
        N_(feature_tile)(f->map, tile.z, f->D, tile.columns, f->stride, f->F - 1, f->F,
                         tile.phi + (f->F - 1) * f->stride);
    }
    f->expanded = f->kept;
}

/* Samples before any frame. */
KERNEL void N_(begin)(N_(Fit) *f) {
    for (Py_ssize_t d = 0; d < f->D; ++d) f->zero[d] = f->shift[0][d] = f->extent[d] = 0, f->scale[0][d] = 1;
    for (Py_ssize_t n = 0; n < f->stride; ++n) f->ones[n] = 1;
    f->problem.shift = f->shift[0], f->problem.scale = f->scale[0];
}

/* The samples in their frame, and what all restarts share; returns why the problem cannot be fitted, or FINE. */
KERNEL int N_(prepare)(N_(Fit) *f, Py_ssize_t fewest) {
    N_(begin)(f);
    const int status = N_(examine)(f, fewest);
    if (status != FINE) return status;
    N_(find_frame)(f);
    N_(find_floors)(f);
    N_(keep_features)(f);
    return N_(find_scatter)(f) ? FINE : NO_LIKELIHOOD;
}

/* ---- EM ---------------------------------------------------------------------------------------------------------- */

/* Whether a form keeps the digits of components, and of what decided whether they needed a lift. */
INLINE int N_(suits)(const N_(Fit) *f, const N_(Components) *c, enum form form, Py_ssize_t reference) {
    const double terms = c->cancellation + (form == RELATIVE ? c->terms[reference] : 0);
    return form == DIRECT || (!c->lifted && terms <= f->batch->most_cancellation);
}

/* One iteration, or one from the nearest seeds; returns whether it came to something. What packed statistics make of
 * components that their form does not suit may have lost its digits: then once more, in a later form. */
KERNEL int N_(iterate)(N_(Fit) *f, const N_(Components) *old, N_(Components) *new, int nearest,
                       double *log_likelihood) {
    for (enum form form = RELATIVE; form <= DIRECT; ++form) {
        if (!N_(suits)(f, old, form, old->reference)) continue;
        *log_likelihood = N_(expect)(f, old, form, nearest);
        if (!isfinite(*log_likelihood) || !N_(maximize)(f, old, new)) continue;
        if (N_(suits)(f, new, form, old->reference)) return 1;
        if (!N_(suits)(f, new, PACKED, old->reference)) form = PACKED; /* would not suit them either */
    }
    return 0;
}

/* Components at the seeds, as broad as the data; then an M-step of each sample's nearest. */
KERNEL int N_(start)(N_(Fit) *f, N_(Components) *seeds, N_(Components) *first) {
    const Py_ssize_t D = f->D, width = f->width;
    double none;
    seeds->lifted = 0;
    for (Py_ssize_t k = 0; k < width; ++k) {
        seeds->weight[k] = k < f->K ? 1.0 / f->K : 0;
        for (Py_ssize_t i = 0, e = 0; i < D; ++i) {
            seeds->mean[i * width + k] = k < f->K ? f->seeds[k * D + i] : 0;
            for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e)
                seeds->covariance[e * width + k] = i == j ? f->floor[i] / f->batch->relative_floor : 0;
        }
    }
    memcpy(seeds->inverse, seeds->covariance, f->entries * width * sizeof(REAL));
    for (Py_ssize_t g = 0; g < width; g += LANES)
        N_(factorize)(seeds->inverse, D, f->matrices, width, g, seeds->pivot, f->column);
    N_(complete)(f, seeds);
    return N_(iterate)(f, seeds, first, 1, &none);
}

/* Σ ω log p and −Σ ω Σ_k r_k log r_k, in one pass. */
KERNEL void N_(evaluate)(N_(Fit) *f, const N_(Components) *c, N_(Outcome) *outcome) {
    enum form form = RELATIVE;
    double total = 0, entropy = 0;
    while (!N_(suits)(f, c, form, c->reference)) ++form;
    N_(encode)(f, c, form);
    for (Py_ssize_t t = 0; t < f->tiles; ++t) {
        const N_(Tile) tile = N_(open)(f, t);
        N_(find_logits)(f, &tile);
        total += N_(add_entropy)(f, &tile, &entropy);
    }
    outcome->log_likelihood = total + f->common + f->total * f->log_scale;
    outcome->entropy = fmax(entropy, 0); /* not −0 or less, by rounding */
}

/* The smaller the better: BIC (Schwarz 1978), AIC (Akaike 1974), ICL (Biernacki, Celeux, Govaert 2000). */
KERNEL double N_(criterion)(const N_(Fit) *f, const N_(Outcome) *outcome) {
    const Py_ssize_t D = f->D, K = f->K;
    const double free[] = {K * (D * (D + 1) / 2.0), D * (D + 1) / 2.0, (double)(K * D), (double)K};
    const double count = K - 1 + K * D + free[f->batch->covariance];
    return -2 * outcome->log_likelihood + count * (f->batch->criterion == AIC ? 2 : log(f->total)) +
           (f->batch->criterion == ICL ? 2 * outcome->entropy : 0);
}

/* EM from one start; returns where the mixture is, or NULL if it comes to nothing. */
KERNEL N_(Components) *N_(restart)(N_(Fit) *f, uint64_t key, Py_ssize_t number, N_(Outcome) *outcome) {
    N_(Components) *now = &f->components[0], *next = &f->components[1], *swap;
    double previous, bound = -INFINITY, sum;
    *outcome = (N_(Outcome)){.K = f->K};
    f->chosen = 0;
    N_(choose_seeds)(f, key, number);
    if (!N_(start)(f, next, now)) return NULL;
    f->chosen = 0;
    while (outcome->n_iter < f->batch->max_iter && !outcome->converged) {
        if (!N_(iterate)(f, now, next, 0, &sum)) return NULL;
        swap = now, now = next, next = swap;
        previous = bound, bound = sum / f->total;
        outcome->converged = fabs(bound - previous) < f->batch->tol;
        ++outcome->n_iter;
    }
    N_(evaluate)(f, now, outcome);
    if (!isfinite(outcome->log_likelihood)) return NULL;
    outcome->value = N_(criterion)(f, outcome);
    outcome->status = now->collapsed ? COLLAPSED : outcome->converged ? FINE : NOT_CONVERGED;
    return now;
}

/* Whether a fit is better than the best so far; a fit that has not collapsed is better than any that has. */
INLINE int N_(replaces)(const N_(Outcome) *outcome, const N_(Outcome) *best, double margin) {
    const int collapsed = outcome->status == COLLAPSED, best_collapsed = best->status == COLLAPSED;
    return collapsed == best_collapsed ? outcome->value < best->value - margin : best_collapsed;
}

/* The best of all restarts and numbers of components, the first of equals; its status, or why none is. */
KERNEL int N_(best_restart)(N_(Fit) *f, Py_ssize_t b, Py_ssize_t fewest, N_(Outcome) *best) {
    const Batch *batch = f->batch;
    const uint64_t number = ITEM(uint64_t, batch->numbers, b);
    const uint64_t key = N_(words_of)(batch->seed, batch->stream_of_problems, 0, number);
    int found = 0;
    for (Py_ssize_t K = fewest; K <= f->most && K <= f->with_weight; ++K) {
        N_(set_components)(f, K);
        for (Py_ssize_t restart = 0; restart < batch->n_init; ++restart) {
            N_(Outcome) outcome;
            const N_(Components) *c = N_(restart)(f, key, restart, &outcome);
            if (!c || (found && !N_(replaces)(&outcome, best, batch->equal * f->total))) continue;
            found = 1, *best = outcome;
            memcpy(f->best, c->parameters, (1 + f->D + f->entries) * f->width * sizeof(REAL));
        }
    }
    return found ? best->status : NO_LIKELIHOOD;
}

/* ---- to and from the caller's arrays ----------------------------------------------------------------------------- */

/* Where entry (i, j) of Σ_k is among the covariances of a problem. */
INLINE Py_ssize_t N_(place)(enum covariance type, Py_ssize_t D, Py_ssize_t k, Py_ssize_t i, Py_ssize_t j) {
    return type == FULL_COVARIANCE ? (k * D + i) * D + j : type == TIED_COVARIANCE ? i * D + j
         : type == DIAG_COVARIANCE ? k * D + i : k;
}

/* The best fit, out of its frame: x = z / scale + shift. */
KERNEL void N_(store)(N_(Fit) *f, Py_ssize_t b, const N_(Outcome) *best) {
    const Batch *batch = f->batch;
    const Py_ssize_t D = f->D, width = N_(rounded_up)(best->K, 1);
    const REAL *mean = f->best + width, *covariance = mean + D * width;
    double *weights = &ITEM(double, batch->weights, b), *means = &ITEM(double, batch->means, b);
    double *covariances = &ITEM(double, batch->covariances, b);
    for (Py_ssize_t k = 0; k < best->K; ++k) {
        weights[k] = f->best[k];
        for (Py_ssize_t i = 0, e = 0; i < D; ++i) {
            const double scale = f->scale[0][i] * f->scale[1][i];
            const double shift = f->shift[0][i] + f->shift[1][i] / f->scale[0][i];
            means[k * D + i] = mean[i * width + k] / scale + shift;
            for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e) {
                const double entry = covariance[e * width + k] / (scale * (f->scale[0][j] * f->scale[1][j]));
                covariances[N_(place)(batch->covariance, D, k, i, j)] = entry;
                covariances[N_(place)(batch->covariance, D, k, j, i)] = entry;
            }
        }
    }
    ITEM(int64_t, batch->n_components, b) = best->K;
    ITEM(double, batch->log_likelihood, b) = best->log_likelihood;
    ITEM(double, batch->entropy, b) = best->entropy;
    ITEM(int64_t, batch->n_iter, b) = best->n_iter;
    ITEM(char, batch->converged, b) = best->converged != 0;
}

/* The mixture of problem b in the units of the data; returns whether its covariances are positive definite. */
KERNEL int N_(fetch)(N_(Fit) *f, Py_ssize_t b, N_(Components) *c) {
    const Batch *batch = f->batch;
    const Py_ssize_t D = f->D, width = f->width;
    const double *weights = &ITEM(double, batch->weights, b), *means = &ITEM(double, batch->means, b);
    const double *covariances = &ITEM(double, batch->covariances, b);
    int positive = 1;
    for (Py_ssize_t k = 0; k < width; ++k) {
        c->weight[k] = k < f->K ? weights[k] : 0;
        for (Py_ssize_t i = 0, e = 0; i < D; ++i) {
            c->mean[i * width + k] = k < f->K ? means[k * D + i] : 0;
            for (Py_ssize_t j = f->matrices ? 0 : i; j <= i; ++j, ++e)
                c->covariance[e * width + k] =
                    k < f->K ? covariances[N_(place)(batch->covariance, D, k, i, j)] : i == j;
        }
    }
    memcpy(c->inverse, c->covariance, f->entries * width * sizeof(REAL));
    for (Py_ssize_t g = 0; g < width; g += LANES) {
        positive &= N_(all_lanes)(N_(factorize)(c->inverse, D, f->matrices, width, g, c->pivot, f->column));
    }
    N_(complete)(f, c);
    return positive;
}

/* The largest logit, the first of equals, and log p of each sample of a tile; −1 and NaN where that is not finite. */
KERNEL void N_(write_predictions)(N_(Fit) *f, const N_(Tile) *tile, Py_ssize_t offset, int known) {
    const Batch *batch = f->batch;
    if (known) N_(find_logits)(f, tile);
    if (known) N_(softmax_tile)(f->logits, f->K, tile->columns, f->stride, tile->weight, 0, 0, NULL, f->log_prob);
    for (Py_ssize_t n = 0; n < tile->rows; ++n) {
        const Py_ssize_t row = N_(row_of)(&f->problem, tile->first + n) + (f->problem.order ? 0 : offset);
        const int finite = known && isfinite(f->log_prob[n]);
        Py_ssize_t label = 0;
        for (Py_ssize_t k = 1; finite && k < f->K; ++k)
            if (f->logits[k * f->stride + n] > f->logits[label * f->stride + n]) label = k;
        ITEM(double, batch->log_prob, row) = finite ? f->log_prob[n] : NAN;
        ITEM(int64_t, batch->labels, row) = finite ? label : -1;
    }
}

/* ---- the kernels ------------------------------------------------------------------------------------------------- */

KERNEL void N_(fit_batch)(const Batch *batch, Py_ssize_t start, Py_ssize_t stop, char *workspace) {
    for (Py_ssize_t b = start; b < stop; ++b) {
        const Py_ssize_t fewest = ITEM(int64_t, batch->fewest, b);
        N_(Fit) fit;
        N_(Outcome) best;
        N_(measure)(&fit, batch, b, N_(most_components)(batch, b));
        N_(arrange)(&fit, workspace);
        int status = N_(prepare)(&fit, fewest);
        if (status == FINE) {
            status = N_(best_restart)(&fit, b, fewest, &best);
            if (status != NO_LIKELIHOOD) N_(store)(&fit, b, &best);
        }
        ITEM(int64_t, batch->status, b) = status;
    }
}

KERNEL void N_(predict_batch)(const Batch *batch, Py_ssize_t start, Py_ssize_t stop, char *workspace) {
    for (Py_ssize_t b = start; b < stop; ++b) {
        const Py_ssize_t K = ITEM(int64_t, batch->n_components, b);
        N_(Fit) fit;
        N_(measure)(&fit, batch, b, K);
        N_(arrange)(&fit, workspace);
        N_(set_components)(&fit, K);
        N_(begin)(&fit);
        const int known = K > 0 && N_(fetch)(&fit, b, fit.components);
        if (known) N_(encode)(&fit, fit.components, DIRECT);
        for (Py_ssize_t t = 0; t < fit.tiles; ++t) {
            const N_(Tile) tile = N_(open)(&fit, t);
            N_(write_predictions)(&fit, &tile, ITEM(int64_t, batch->offsets, b), known);
        }
    }
}

/* Bytes of scratch memory for the problems of a block. */
KERNEL Py_ssize_t N_(batch_workspace_size)(const Batch *batch, Py_ssize_t start, Py_ssize_t stop, int predicting) {
    size_t most = 0;
    for (Py_ssize_t b = start; b < stop; ++b) {
        N_(Fit) fit;
        N_(measure)(&fit, batch, b, predicting ? ITEM(int64_t, batch->n_components, b) : N_(most_components)(batch, b));
        const size_t size = N_(arrange)(&fit, NULL);
        if (size > most) most = size;
    }
    return (Py_ssize_t)most;
}

static const Batch_functions N_(batch_functions) = {LEVEL_NAME, N_(batch_workspace_size), N_(fit_batch),
                                                    N_(predict_batch)};

#undef ENTRY
#undef AT
#undef PUT
#undef BROADCAST
#endif
#include "vectors_end.h"
