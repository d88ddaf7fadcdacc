// How rows of inputs are laid out for the kernels: in the form that a part's weights need, in its order, in
// blocks.
#include "dot.h"
#include "products.h"

namespace CL_ISA {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

bool integers(Form form) { return form == Form::GROUPS || form == Form::ROW; }

int32_t offset_of(const ClMatrix &m) { return m.kind == CL_W8A8 ? m.offset - CENTRE : m.offset; }

// Whether two parts read the same inputs.
bool same(const ClMatrix &a, const ClMatrix &b) {
  return form_of(a) == form_of(b) && a.order == b.order && (!integers(form_of(a)) || offset_of(a) == offset_of(b));
}

// The first part that reads the same inputs as this one.
int64_t first_like(const ClLinear &weight, int64_t part) {
  for (int64_t p = 0; p < part; ++p)
    if (same(weight.parts[p], weight.parts[part])) return p;
  return part;
}

int64_t units_of(Form form, int64_t width) {
  return form == Form::FLOAT32 ? width : padded(width) / (form == Form::BFLOAT16 ? 2 : 4);
}

int64_t groups_of(Form form, int64_t width) {
  return form == Form::GROUPS ? (width + CL_GROUP - 1) / CL_GROUP : form == Form::ROW ? 1 : 0;
}

int64_t scales_of(Form form, int64_t width) {
  return form == Form::GROUPS ? (width + CL_SCALED - 1) / CL_SCALED : form == Form::ROW ? 1 : 0;
}

int64_t laid_bytes(const ClMatrix &m, int64_t rows) {
  const Form form = form_of(m);
  return aligned(rows * units_of(form, m.in) * 4) + aligned(rows * scales_of(form, m.in) * 4) +
         2 * aligned(rows * groups_of(form, m.in) * 4);
}

// Whether x has the rows in the form that a part needs.
bool has(const ClRows &x, const ClMatrix &m) {
  if (m.order) return false;
  switch (form_of(m)) {
    case Form::FLOAT32: return x.f32;
    case Form::BFLOAT16: return x.bf16;
    case Form::GROUPS: return x.int8 && x.group == CL_SCALED;
    default: return x.int8 && x.group == 0;
  }
}

struct Row {  // in the form that is needed
  const int32_t *codes;
  const float *scales;
  const int32_t *sums;
};

Row given(const ClRows &x, Form form, int64_t at) {
  if (form == Form::FLOAT32) return {reinterpret_cast<const int32_t *>(x.f32 + at * x.width), nullptr, nullptr};
  if (form == Form::BFLOAT16)
    return {reinterpret_cast<const int32_t *>(x.bf16 + at * padded(x.width)), nullptr, nullptr};
  return {reinterpret_cast<const int32_t *>(x.int8 + at * padded(x.width)), x.scales + at * scales_of(x),
          x.sums + at * sums_of(x)};
}

// Row `at` made from float32, in a thread's own scratch.
Row made(const ClRows &x, const ClMatrix &m, int64_t at, char *own) {
  const int64_t width = x.width, stride = padded(width);
  const float *from = x.f32 + at * width;
  if (m.order) {
    float *ordered = reinterpret_cast<float *>(own);
    for (int64_t i = 0; i < width; ++i) ordered[i] = from[m.order[i]];
    from = ordered;
  }
  const Form form = form_of(m);
  if (form == Form::FLOAT32) return {reinterpret_cast<const int32_t *>(from), nullptr, nullptr};
  own += stride * 4;
  ClRows one = {};
  one.width = width;
  one.group = form == Form::ROW ? 0 : CL_SCALED;
  if (form == Form::BFLOAT16) {
    one.bf16 = reinterpret_cast<uint16_t *>(own);
  } else {
    one.int8 = reinterpret_cast<int8_t *>(own);
    one.scales = reinterpret_cast<float *>(own + stride);
    one.sums = reinterpret_cast<int32_t *>(own + 2 * stride);
  }
  write_row(one, 0, from);
  return {reinterpret_cast<const int32_t *>(own), one.scales, one.sums};
}

typedef int32_t Four __attribute__((vector_size(16)));

inline Four four(const int32_t *from) {
  Four x;
  memcpy(&x, from, sizeof x);
  return x;
}

// Four units of each of four rows: a unit's four beside each other.
inline void turn_four(const Row *rows, int64_t unit, int32_t *to, int64_t stride) {
  const Four a = four(rows[0].codes + unit), b = four(rows[1].codes + unit), c = four(rows[2].codes + unit),
             d = four(rows[3].codes + unit);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Four turned[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                          __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5),
                          __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7)};
  for (int64_t k = 0; k < 4; ++k) memcpy(to + k * stride, turned + k, sizeof(Four));
}

// Puts rows in the columns of a block from `column` on; so many units of each by turns that both sides stay in
// cache.
void lay_codes(const Inputs &to, RowBlock block, int64_t column, int64_t count, const Row *rows) {
  constexpr int64_t TOGETHER = 16;
  for (int64_t u = 0; u < to.units; u += TOGETHER) {
    int32_t *codes =
        const_cast<int32_t *>(to.codes) + place_in_rows(to.rows, block, to.units, to.at_once, u) + column;
    const int64_t some = to.units - u < TOGETHER ? to.units - u : TOGETHER;
    const int64_t fours = count < 4 ? 0 : some / 4 * 4;
    for (int64_t i = 0; fours && i < count; i += 4) {
      const int64_t row = i + 4 < count ? i : count - 4;  // the last may be there already
      for (int64_t k = 0; k < fours; k += 4)
        turn_four(rows + row, u + k, codes + k * block.rows + row, block.rows);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = fours; k < some; ++k) codes[k * block.rows + i] = rows[i].codes[u + k];
  }
}

void lay_scales(const Inputs &to, RowBlock block, int64_t column, const Row &row) {
  float *scales = const_cast<float *>(to.scales) + column, *totals = const_cast<float *>(to.totals) + column;
  int32_t *starts = const_cast<int32_t *>(to.starts) + column;
  for (int64_t g = 0; g < to.scaled; ++g)
    scales[place_in_rows(to.rows, block, to.scaled, to.at_once / SCALED_UNITS, g)] = row.scales[g];
  for (int64_t g = 0; g < to.groups; ++g) {
    const int64_t at = place_in_rows(to.rows, block, to.groups, to.at_once / GROUP_UNITS, g);
    totals[at] = (float)row.sums[g];
    starts[at] = -to.offset * row.sums[g];
  }
}

void lay_block(const ClRows &x, const ClMatrix &m, const Inputs &to, int64_t block_at, char *own) {
  const RowBlock block = row_block(to.form, to.rows, block_at);
  Row rows[ROWS];
  const bool ready = has(x, m);
  for (int64_t i = 0; i < block.rows; ++i) {
    rows[i] = ready ? given(x, to.form, block.first + i) : made(x, m, block.first + i, own);
    if (!ready) lay_codes(to, block, i, 1, rows + i);  // the next is made in its place
    lay_scales(to, block, i, rows[i]);
  }
  if (ready) lay_codes(to, block, 0, block.rows, rows);
}

// Whether a part's inputs are to be laid out in scratch, and by it, not by an earlier part.
bool lays(const ClRows &x, int64_t rows, const ClLinear &weight, int64_t part) {
  return first_like(weight, part) == part && !(rows == 1 && has(x, weight.parts[part]));
}

}  // namespace

Inputs inputs_of(const ClRows &x, int64_t rows, const ClLinear &weight, int64_t part, char *scratch) {
  const int64_t like = first_like(weight, part);
  const ClMatrix &m = weight.parts[part];
  Inputs to = {};
  to.form = form_of(m);
  to.offset = offset_of(m);
  to.order = m.order;
  to.rows = rows;
  to.units = units_of(to.form, m.in);
  to.groups = groups_of(to.form, m.in);
  to.scaled = scales_of(to.form, m.in);
  to.at_once = rows > FEW ? units_at_once(to.form) : (to.units + SCALED_UNITS - 1) / SCALED_UNITS * SCALED_UNITS;
  if (rows == 1 && has(x, m)) {
    const Row row = given(x, to.form, 0);
    to.codes = row.codes, to.scales = row.scales, to.sums = row.sums;
    return to;
  }
  for (int64_t p = 0; p < like; ++p)
    if (first_like(weight, p) == p) scratch += laid_bytes(weight.parts[p], rows);
  const int64_t each = aligned(rows * to.groups * 4);
  to.totals = reinterpret_cast<float *>(scratch);
  to.starts = reinterpret_cast<int32_t *>(scratch + each);
  to.scales = reinterpret_cast<float *>(scratch + 2 * each);
  to.codes = reinterpret_cast<int32_t *>(scratch + 2 * each + aligned(rows * to.scaled * 4));
  return to;
}

int64_t inputs_bytes(const ClLinear &weight, int64_t rows) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < weight.count; ++p)
    if (first_like(weight, p) == p) bytes += laid_bytes(weight.parts[p], rows);
  return bytes;
}

int64_t row_bytes(const ClLinear &weight) { return 8 * padded(weight.parts[0].in); }

bool lay_inputs(const ClRows &x, int64_t rows, const ClLinear &weight, char *scratch, char *own, const Team &team,
                int phase) {
  int64_t laid = 0;
  for (int64_t p = 0; p < weight.count; ++p)
    if (lays(x, rows, weight, p)) laid += row_blocks(form_of(weight.parts[p]), rows);
  Span span;
  while (laid && team.take(phase, laid, 1, &span)) {
    int64_t part = 0, block = span.first;
    for (;; ++part) {
      const int64_t blocks = lays(x, rows, weight, part) ? row_blocks(form_of(weight.parts[part]), rows) : 0;
      if (block < blocks) break;
      block -= blocks;
    }
    lay_block(x, weight.parts[part], inputs_of(x, rows, weight, part, scratch), block, own);
  }
  return laid > 0;
}

}  // namespace CL_ISA
