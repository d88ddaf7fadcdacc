/* The C ABI of the CPU kernels: a step of a model is a program of fused ops over plain pointers.

   Activations between ops are float32 [T, width], row after row. What an op reads and writes is in its struct;
   what all ops of a step share (tokens, positions, KV pages of each row) is in ClStep. Sums of one row or token
   are added in an order that depends on nothing but its own length: not on T, its place, its neighbours, or the
   threads. kernels/native/library.py mirrors these structs. */
#ifndef CLOISTER_KERNELS_H
#define CLOISTER_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define CL_ABI 2
#define CL_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Number types of KV pages, tables and scales. */
enum ClType { CL_FLOAT32 = 0, CL_BFLOAT16 = 1, CL_INT8 = 2, CL_FLOAT16 = 3 };

/* How a matrix is kept, and computed with. */
enum ClKind {
  CL_F32 = 0,    /* float32 weights and inputs */
  CL_BF16 = 1,   /* bfloat16 weights, inputs rounded to bfloat16 */
  CL_W8A8 = 2,   /* int8 weights with scales, inputs in int8 with a scale per CL_SCALED or per row */
  CL_W4A8 = 3,   /* int4 weights in groups of inputs, inputs in int8 with a scale per CL_SCALED */
  CL_DECODED = 4 /* any codes, decoded panel by panel to the number type `decoded`, then multiplied as plain */
};

#define CL_GROUP 32   /* inputs whose codes are added up as whole numbers; groups of weights are multiples of it */
#define CL_SCALED 128 /* inputs that share a scale in int8 activations that meet weights in groups */
#define CL_TILE 16    /* outputs of a tile of weights; tokens of a tile of a KV page */
#define CL_STRIDE 64  /* rows of int8 and bfloat16 activations are padded with zeros to a multiple of this */

/* A matrix [out, in] as `cl_pack` made it: tiles of CL_TILE outputs; the last is padded with zeros.
   w = (value - zero) * scale * factor, where the value of a code is table[code], or code - offset. */
typedef struct {
  int32_t kind;       /* ClKind */
  int32_t group;      /* inputs that share a weight scale: a multiple of CL_GROUP in CL_W4A8 and CL_W8A8; 0: all */
  int32_t decoded;    /* ClType of the panels of CL_DECODED: CL_FLOAT32 or CL_BFLOAT16 */
  int32_t bits;       /* of a code: 4 or 8 */
  int32_t offset;     /* 8 or 128 where codes are signed (and had it added before cl_pack); else 0 */
  int32_t scale_type; /* ClType of scales and zeros: CL_FLOAT32, or CL_FLOAT16 */
  float factor;       /* of all scales: a power of two that takes them to the best range of CL_FLOAT16, or 1 */
  int32_t pad;
  int64_t out, in;
  const void *weights;  /* tiles of codes or numbers */
  const void *scales;   /* [tiles][groups][CL_TILE], padded with zeros; or NULL */
  const void *zeros;    /* the same; NULL: 0 */
  const float *table;   /* CL_DECODED: [2 ^ bits]; NULL: code - offset */
  const int32_t *order; /* weight column i multiplies input order[i]; NULL: input i */
} ClMatrix;

/* Matrices stacked over one input, and a bias of all their outputs. */
typedef struct {
  const ClMatrix *parts;
  int64_t count;
  const float *bias; /* [sum of out] or NULL */
} ClLinear;

/* A step's activations [T, width] in the forms that somebody reads; NULL where nobody does.
   A writer fills all forms that are not NULL. */
typedef struct {
  float *f32;     /* [T, width] */
  uint16_t *bf16; /* [T, padded width] */
  int8_t *int8;   /* [T, padded width] */
  float *scales;  /* of int8: [T, ceil(width / group)], or [T] */
  int32_t *sums;  /* of int8: of each CL_GROUP of codes, [T, ceil(width / CL_GROUP)]; with group 0 of all, [T] */
  int64_t width;
  int64_t group; /* of int8: numbers that share a scale: CL_SCALED; 0: all of a row */
} ClRows;

typedef struct {
  int32_t type; /* ClType */
  int32_t pad;
  int64_t layers, blocks, block_size, heads, dim;
  void *pages; /* [layers][blocks][cl_kv_page_bytes], keys before values */
} ClKv;

/* What all ops of a step share. Rows follow one another; row r has tokens row_first[r] .. row_first[r + 1] - 1. */
typedef struct {
  int64_t tokens, rows;
  const int32_t *token_ids;   /* [tokens] */
  const int32_t *positions;   /* [tokens] */
  const int32_t *row_first;   /* [rows + 1] */
  const int32_t *row_start;   /* [rows], position of the first token */
  const int32_t *table_first; /* [rows + 1], of each row's pages in `tables` */
  const int32_t *tables;      /* KV pages of all rows */
  const int32_t *picked;      /* [picks], tokens that CL_OP_PICK takes */
  int64_t picks;
  void *scratch; /* 64-byte aligned, at least cl_scratch_bytes */
  int64_t threads;
  int64_t *nanoseconds; /* [ops], added to: what each op took; or NULL */
} ClStep;

/* The sizes that scratch must do for. */
typedef struct {
  int64_t tokens, rows, picks, context, threads;
} ClLimits;

enum ClCode {
  CL_OP_EMBED,
  CL_OP_NORM,
  CL_OP_LINEAR,
  CL_OP_ROPE,
  CL_OP_ATTENTION,
  CL_OP_GATED,
  CL_OP_ADD,
  CL_OP_MIXTURE,
  CL_OP_PICK,
  CL_OP_CAP,
  CL_OPS
};

typedef struct {
  int64_t code;     /* ClCode */
  const void *args; /* the op's struct */
} ClOp;

/* out = table[token] * scale; NaN of a token that the table does not have. */
typedef struct {
  const ClMatrix *table; /* any kind; numbers are decoded exactly */
  ClRows *out;
  float scale;
} ClEmbed;

/* total = x * scale + residual; out = total / sqrt(mean(total^2) + eps) * weight. */
typedef struct {
  const float *x;
  const float *residual; /* or NULL: total = x * scale */
  const float *weight;   /* [width] */
  float *total;          /* or NULL; may be residual */
  ClRows *out;
  float scale, eps;
} ClNorm;

/* out = x * weight^T + bias. */
typedef struct {
  /* With the form that each part needs (float32; bfloat16; int8 by CL_SCALED; int8 by row of CL_W8A8 with group
     0), or else f32; f32 where a part has an order. */
  const ClRows *x;
  const ClLinear *weight;
  float *out;     /* [T, sum of out] */
  int64_t picked; /* rows are step.picks, not step.tokens */
} ClLinearOp;

/* Norms and rotates queries and keys of qkv [T, (heads + 2 kv heads) * dim], in place; stores keys and values. */
typedef struct {
  float *qkv;
  const float *cosines; /* [positions, rotated / 2] */
  const float *sines;
  const float *query_norm; /* [dim], or [heads * dim] where whole; or NULL */
  const float *key_norm;
  const ClKv *kv;
  int64_t layer, heads, rotated, whole;
  float eps;
} ClRope;

/* out = softmax(q k^T scale) v of each token over its row's pages up to itself. */
typedef struct {
  const float *qkv;   /* queries first in each token's row of (heads + 2 kv heads) * dim */
  const float *sinks; /* [heads] or NULL */
  const ClKv *kv;
  ClRows *out; /* width heads * dim */
  int64_t layer, heads, window;
  float scale, softcap;
} ClAttention;

/* out = act(gate) * up of x [T, 2 n], gate first. */
typedef struct {
  const float *x;
  ClRows *out;        /* width n */
  int64_t activation; /* index in kernels.ops.ACTIVATIONS */
} ClGated;

/* out = x * scale + residual. */
typedef struct {
  const float *x, *residual;
  float *out;
  int64_t width;
  float scale;
} ClAdd;

/* The chosen experts' answers to each token, weighted and added in the experts' order. */
typedef struct {
  const ClRows *x;
  const ClLinear *router;
  const ClLinear *gate_up; /* [experts] */
  const ClLinear *down;    /* [experts] */
  float *out;              /* [T, hidden] */
  int64_t experts, top_k, normalise, activation, intermediate;
} ClMixture;

/* out = the rows step.picked of x. */
typedef struct {
  const float *x;
  ClRows *out;
} ClPick;

/* x *= scale, then softcap * tanh(x / softcap) where it is not 0; of step.picks rows. */
typedef struct {
  float *x;
  int64_t width;
  float scale, softcap;
} ClCap;

/* CL_ABI of this library. */
CL_EXPORT int cl_abi(void);

/* Names of the instruction sets that this library was built for and this processor runs, best first, with spaces.
 */
CL_EXPORT const char *cl_isas(void);

/* Chooses one of them; NULL or "" the best. Not while a program runs. 0, or -1: not there. */
CL_EXPORT int cl_select(const char *isa);

/* The one in use. */
CL_EXPORT const char *cl_isa(void);

/* Runs a program; all structs and pointers must be what these comments say. */
CL_EXPORT void cl_run(const ClOp *ops, int64_t count, const ClStep *step);

/* Bytes of scratch that a program needs at most. */
CL_EXPORT int64_t cl_scratch_bytes(const ClOp *ops, int64_t count, const ClLimits *limits);

/* Bytes of one KV page of one layer. */
CL_EXPORT int64_t cl_kv_page_bytes(const ClKv *kv);

/* Bytes of the packed weights of a matrix whose kind, group, bits, out and in are set. */
CL_EXPORT int64_t cl_packed_bytes(const ClMatrix *matrix);

/* Packs rows first .. first + rows - 1 of a matrix (first a multiple of CL_TILE) into `packed`, which is zeroed.
   Source, row-major, rows of `in` numbers: float32 for CL_F32, bfloat16 for CL_BF16; for all others one unsigned
   byte a code, to which `offset` was added where it was signed. */
CL_EXPORT void cl_pack(const ClMatrix *matrix, const void *source, int64_t first, int64_t rows, void *packed);

/* Keeps the calling thread on cores[0], and thread i of the team that it runs programs and torch's ops with on
   cores[i]. 0, or how many of them could not be moved. */
CL_EXPORT int cl_pin(const int32_t *cores, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
