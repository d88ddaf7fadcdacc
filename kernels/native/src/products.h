// What the files of the products share: inputs as the kernels read them, and the block of outputs that one
// computes.
#pragma once

#include "ops.h"
#include "rows.h"

namespace CL_ISA {

// A block of outputs is TILES tiles of up to ROWS rows: so many that sums and weights stay in registers. Where
// each group of inputs has a scale, fewer rows leave room to add whole numbers up.
#if defined(__AVX512F__)
constexpr int TILES = 2, ROWS = 12, GROUP_ROWS = 8, MANY_GROUP_ROWS = 6;
#elif defined(__AVX2__)
constexpr int TILES = 1, ROWS = 6, GROUP_ROWS = 6, MANY_GROUP_ROWS = 6;
#else
constexpr int TILES = 1, ROWS = 2, GROUP_ROWS = 2, MANY_GROUP_ROWS = 2;
#endif
constexpr int64_t FEW = 12;            // rows that pass weights but once
constexpr int64_t MOST = 256;          // rows that pass a panel before the next: their sums stay in L2, too
constexpr int64_t PANEL = 4;           // tiles that stay in L2 while all rows pass
constexpr int64_t UNITS = 512;         // of inputs that are multiplied at once where there are many rows
constexpr int64_t PLAIN_UNITS = 1024;  // the same, of plain numbers
constexpr int64_t GROUP_UNITS = CL_GROUP / 4, SCALED_UNITS = CL_SCALED / 4;
constexpr int64_t PANEL_BYTES = PANEL * PLAIN_UNITS * 64;

// A unit of inputs is four bytes: one float32, two bfloat16, four int8. A unit of 16 outputs' weights has 64
// bytes.
enum class Form { FLOAT32, BFLOAT16, GROUPS, ROW };  // the last two are int8

// Rows of inputs as the kernels read them: so many units at once, of these block after block of rows, in each unit
// after unit, in each row after row. One row alone is so as it is.
struct Inputs {
  Form form;
  int32_t offset;  // of the codes that these inputs meet
  const int32_t *order;
  int64_t rows, units, groups, scaled;
  int64_t at_once;        // units
  const int32_t *codes;   // [units / at_once][block][at_once][rows of block]
  const float *scales;    // the same of scaled
  const int32_t *starts;  // the same of groups: sum of a group's codes times -offset
  const float *totals;    // the same: sum of a group's codes
  const int32_t *sums;    // of one row as it is, that has neither of these; else NULL
};

struct RowBlock {
  int64_t first, rows;
};

// Rows are parted evenly in as few blocks as there can be.
inline int64_t row_blocks(Form form, int64_t rows) {
  const int64_t most = form != Form::GROUPS ? ROWS : rows > GROUP_ROWS ? MANY_GROUP_ROWS : GROUP_ROWS;
  return (rows + most - 1) / most;
}
inline RowBlock row_block(Form form, int64_t rows, int64_t at) {
  const int64_t blocks = row_blocks(form, rows), first = rows * at / blocks;
  return {first, rows * (at + 1) / blocks - first};
}

// Where unit or group `at` of `count` of a block of rows lies, of which `at_once` are together.
inline int64_t place_in_rows(int64_t rows, RowBlock block, int64_t count, int64_t at_once, int64_t at) {
  const int64_t first = at / at_once * at_once, left = count - first;
  return first * rows + block.first * (left < at_once ? left : at_once) + (at - first) * block.rows;
}

inline int64_t units_at_once(Form form) {
  return form == Form::FLOAT32 || form == Form::BFLOAT16 ? PLAIN_UNITS : UNITS;
}

// What one kernel multiplies: the rows of a block by TILES tiles, over `units` units.
struct Block {
  const uint8_t *weights[TILES];             // of the first unit
  const void *scales[TILES], *zeros[TILES];  // of each tile
  const ClMatrix *matrix;
  int64_t first, units;  // the first unit's number
  int32_t offset;        // of Inputs
  bool streams;          // weights come from memory, not from a panel that many rows pass
  int64_t next;          // then: tiles from the end of one to the one in its place that this thread reads next
  int64_t ahead,
      lines;           // else: bytes from here to what this block asks memory for, cache lines of it in each tile
  const char *next_x;  // inputs that these kernels ask for, `x_step` bytes a unit
  int64_t x_step;
  int64_t scales_ahead;  // bytes from scales to those that it asks for; 0: another block does
  const int32_t *x;      // of the first unit, as the next three
  const float *scale, *total;
  const int32_t *start, *sum;
};

// Adds to sums [TILES][rows][16], which are float32, or int32 of CL_W8A8 with one scale.
using Kernel = void (*)(const Block &block, float *sums);

Kernel integer_kernel(const ClMatrix &matrix, int64_t rows);  // CL_W4A8, CL_W8A8
Kernel plain_kernel(const ClMatrix &matrix, int64_t rows);    // CL_F32, CL_BF16, and decoded

// Asks memory for the unit that comes 2 KiB behind this one.
__attribute__((always_inline)) inline void fetch_unit(const Block &b, int64_t unit) {
  constexpr int64_t AHEAD = 32;
  const int64_t skip = unit + AHEAD < b.units ? 0 : b.next * b.units * 64;
  for (int t = 0; t < TILES; ++t) __builtin_prefetch(b.weights[t] + (unit + AHEAD) * 64 + skip);
}

// The same of weights that come behind a panel's, by lines. A burst of them would fill the queues that the block's
// own loads need.
__attribute__((always_inline)) inline void fetch_lines(const Block &b, int64_t first, int64_t count) {
  for (int64_t line = first; line < first + count && line < b.lines; ++line)
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) __builtin_prefetch(b.weights[t] + b.ahead + line * 64, 0, 2);
}

// The same of the next rows' inputs, with `unit`.
__attribute__((always_inline)) inline void fetch_inputs(const Block &b, int64_t unit) {
  __builtin_prefetch(b.next_x + unit * b.x_step, 0, 2);
}

// Bytes of a tile; units of its inputs (as they are when decoded).
int64_t tile_bytes(const ClMatrix &matrix);
int64_t tile_units(const ClMatrix &matrix);
int64_t scale_groups(const ClMatrix &matrix);

// Units first .. first + units - 1 of a tile of CL_DECODED, made plain.
void decode_tile(const ClMatrix &matrix, int64_t tile, int64_t first, int64_t units, uint8_t *panel);

Form form_of(const ClMatrix &matrix);

// The inputs of part `part`, in `scratch` unless one row can be read where it is.
Inputs inputs_of(const ClRows &x, int64_t rows, const ClLinear &weight, int64_t part, char *scratch);

// Writes what inputs_of says is in scratch, by all threads. Returns whether there was something: then a barrier is
// due.
bool lay_inputs(const ClRows &x, int64_t rows, const ClLinear &weight, char *scratch, char *own, const Team &team,
                int phase);
int64_t inputs_bytes(const ClLinear &weight, int64_t rows);
int64_t row_bytes(const ClLinear &weight);  // of each thread's own scratch while inputs are laid out

}  // namespace CL_ISA
