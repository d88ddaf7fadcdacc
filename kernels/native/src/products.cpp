// The product of rows and packed matrices: which thread computes what, in which blocks.
#include "products.h"

#include "dot.h"

namespace CL_ISA {
namespace {

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t tiles_of(const ClMatrix &m) { return up(m.out, CL_TILE); }

struct Product {
  const ClLinear &weight;
  int64_t rows, width;  // of outputs
  int64_t threads;
  float *out;
};

// A part of the outputs: tiles of one matrix, and blocks of rows.
struct Piece {
  int64_t part, column;  // the matrix, and its first output's column
  Span tiles, blocks;
};

// How a product is cut in pieces: so many tiles at once, and all rows or a share of them.
struct Cut {
  int64_t tiles, shares;
};

Cut cut(const ClLinear &weight, int64_t rows, int64_t threads) {
  int64_t tiles = 0, bytes = 0;
  for (int64_t p = 0; p < weight.count; ++p) {
    tiles += tiles_of(weight.parts[p]);
    bytes += packed_bytes(weight.parts[p]);
  }
  const int64_t wanted = 8 * threads;
  if (rows <= FEW) {
    int64_t at_once = up(1 << 17, up(bytes, tiles));
    at_once = at_once < up(tiles, wanted) ? at_once : up(tiles, wanted);
    return {up(at_once, TILES) * TILES, 1};
  }
  const int64_t shares = up(wanted, up(tiles, PANEL)), most = up(rows, 96);
  return {PANEL, shares < most ? shares : most};
}

int64_t pieces_of(const ClLinear &weight, Cut cut) {
  int64_t count = 0;
  for (int64_t p = 0; p < weight.count; ++p) count += up(tiles_of(weight.parts[p]), cut.tiles);
  return count * cut.shares;
}

Piece piece_at(const ClLinear &weight, int64_t rows, Cut cut, int64_t at) {
  const int64_t share = at % cut.shares;
  int64_t panel = at / cut.shares, part = 0, column = 0;
  for (;; ++part) {
    const int64_t count = up(tiles_of(weight.parts[part]), cut.tiles);
    if (panel < count) break;
    panel -= count;
    column += weight.parts[part].out;
  }
  const int64_t last = tiles_of(weight.parts[part]), end = (panel + 1) * cut.tiles;
  const int64_t blocks = row_blocks(form_of(weight.parts[part]), rows);
  return {part,
          column,
          {panel * cut.tiles, end < last ? end : last},
          {blocks * share / cut.shares, blocks * (share + 1) / cut.shares}};
}

F16 factors(const ClMatrix &m, int64_t tile, const void *from) {
  if (m.scale_type == CL_FLOAT16) return load_half(static_cast<const uint16_t *>(from) + tile * CL_TILE);
  return load(static_cast<const float *>(from) + tile * CL_TILE);
}

// The answer of 16 outputs, of whole numbers that were added up over all inputs; the factor is due.
F16 of_row(const ClMatrix &m, int64_t tile, const float *sums, const Block &b, int64_t row) {
  const F16 scale = factors(m, tile, m.scales);
  I16 whole;
  memcpy(&whole, sums, 64);
  const F16 value = to_float(whole) * (scale * broadcast(b.scale[row]));
  if (!m.zeros) return value;
  const float total = b.sum ? b.scale[row] * (float)b.sum[row] : b.total[row];
  return value - scale * factors(m, tile, m.zeros) * broadcast(total);
}

class Panel {
 public:
  Panel(const Product &product, const Piece &piece, const Inputs &inputs, uint8_t *space)
      : product_(product),
        matrix_(product.weight.parts[piece.part]),
        piece_(piece),
        inputs_(inputs),
        space_(space),
        units_(tile_units(matrix_)),
        bytes_(tile_bytes(matrix_)),
        decodes_(matrix_.kind == CL_DECODED),
        streams_(!decodes_ && product.rows <= FEW),
        integers_(inputs.form == Form::GROUPS || inputs.form == Form::ROW) {}

  // All of the piece: unit block after unit block, so that inputs and weights stay in caches.
  void multiply() const {
    const int64_t at_once = streams_ ? units_ : UNITS;
    for (int64_t first = 0; first < units_; first += at_once) {
      const int64_t left = units_ - first;
      multiply_units(first, left < at_once ? left : at_once);
    }
  }

 private:
  void multiply_units(int64_t first, int64_t units) const {
    const Span tiles = piece_.tiles;
    const int64_t at_once = streams_ ? TILES : PANEL;  // tiles that all rows pass before the next
    for (int64_t tile = tiles.first; tile < tiles.end; tile += at_once) {
      const int64_t end = tile + at_once < tiles.end ? tile + at_once : tiles.end;
      for (int64_t t = tile; decodes_ && t < end; ++t)
        decode_tile(matrix_, t, first, units, space_ + (t - tile) * UNITS * 64);
      for (int64_t i = piece_.blocks.first; i < piece_.blocks.end; ++i) {
        if (!streams_ && !decodes_ && !integers_) fetch_share(tile, end, first + units, i - piece_.blocks.first);
        for (int64_t t = tile; t < end; t += TILES)
          multiply_block(i, t, end, space_ + (t - tile) * UNITS * 64, first, units);
      }
    }
  }

  // While a block of rows passes: asks memory for its share of the weights that come after these.
  void fetch_share(int64_t tile, int64_t end, int64_t next, int64_t block) const {
    const int64_t unit_bytes = matrix_.kind == CL_W4A8 ? 32 : 64, count = piece_.blocks.end - piece_.blocks.first;
    const bool over = next == units_;
    const int64_t bytes = (over ? UNITS : units_ - next) * unit_bytes;
    const int64_t share = up(up(bytes < UNITS * unit_bytes ? bytes : UNITS * unit_bytes, 64), count) * 64;
    const uint8_t *from = static_cast<const uint8_t *>(matrix_.weights) + share * block;
    from += over ? (tile + PANEL * product_.threads) * bytes_ : tile * bytes_ + next * unit_bytes;
    for (int64_t t = tile; t < end; ++t, from += bytes_)
      for (int64_t line = 0; line < share; line += 64) __builtin_prefetch(from + line, 0, 2);
  }

  // What a block of rows asks memory for, bit by bit: its share of the weights that come after these.
  void look_ahead(Block *b, int64_t block) const {
    const int64_t unit_bytes = matrix_.kind == CL_W4A8 ? 32 : 64, blocks = piece_.blocks.end - piece_.blocks.first;
    const bool over = b->first + b->units == units_;
    const int64_t next = over ? 0 : b->first + b->units, left = units_ - next;
    const int64_t tiles = over ? PANEL * product_.threads : 0, units = next - b->first;
    b->lines = up(up((left < UNITS ? left : UNITS) * unit_bytes, 64), blocks);
    b->ahead = tiles * bytes_ + units * unit_bytes + block * b->lines * 64;
    if (block || !matrix_.group) return;
    const int64_t bytes = CL_TILE * (matrix_.scale_type == CL_FLOAT16 ? 2 : 4);
    b->scales_ahead = (tiles * scale_groups(matrix_) + units * 4 / matrix_.group) * bytes;
  }

  void multiply_block(int64_t block, int64_t tile, int64_t end, uint8_t *panel, int64_t first,
                      int64_t units) const {
    const RowBlock rows = row_block(inputs_.form, product_.rows, block);
    Block b = {};
    b.matrix = &matrix_;
    b.first = first, b.units = units, b.offset = inputs_.offset;
    b.streams = streams_, b.next = TILES - 1;
    if (tile + TILES >= piece_.tiles.end)  // pieces are taken by turns
      b.next += (product_.threads - 1) * (piece_.tiles.end - piece_.tiles.first);
    if (!streams_ && integers_) look_ahead(&b, block - piece_.blocks.first);
    for (int64_t i = 0; i < TILES; ++i) {
      const int64_t t = tile + i < end ? tile + i : tile;  // one too many is computed twice
      const int64_t item = matrix_.scale_type == CL_FLOAT16 ? 2 : 4,
                    at = t * scale_groups(matrix_) * CL_TILE * item;
      b.weights[i] = decodes_ ? panel + (t - tile) * UNITS * 64
                              : static_cast<const uint8_t *>(matrix_.weights) + t * bytes_ +
                                    first * (matrix_.kind == CL_W4A8 ? 32 : 64);
      if (matrix_.scales) b.scales[i] = static_cast<const char *>(matrix_.scales) + at;
      if (matrix_.zeros) b.zeros[i] = static_cast<const char *>(matrix_.zeros) + at;
    }
    const int64_t group = inputs_.form == Form::GROUPS ? first / GROUP_UNITS : 0;
    const int64_t g = rows.first * inputs_.groups + group * rows.rows;
    b.x = inputs_.codes + rows.first * inputs_.units + first * rows.rows;
    b.scale = inputs_.scales + g;
    if (inputs_.sums)
      b.sum = inputs_.sums + g;
    else
      b.start = inputs_.starts + g, b.total = inputs_.totals + g;

    alignas(64) float sums[TILES * ROWS * 16];
    const bool last = first + units == units_;
    for (int64_t m = 0; m < rows.rows; ++m)
      for (int64_t t = 0; t < TILES; ++t) __builtin_prefetch(at(rows.first + m, tile + t), 1);
    for (int64_t t = 0; t < TILES; ++t) continue_sums(rows, tile + t, end, first, sums + t * rows.rows * 16);
    kernel(rows.rows)(b, sums);
    for (int64_t t = 0; t < TILES && tile + t < end; ++t) {
      const float *from = sums + t * rows.rows * 16;
      if (last && inputs_.form == Form::ROW)
        for (int64_t m = 0; m < rows.rows; ++m)
          store(sums + (t * rows.rows + m) * 16, of_row(matrix_, tile + t, from + m * 16, b, m));
      put(rows, tile + t, from, last);
    }
  }

  Kernel kernel(int64_t rows) const {
    return integers_ ? integer_kernel(matrix_, rows) : plain_kernel(matrix_, rows);
  }

  float *at(int64_t row, int64_t tile) const {
    return product_.out + row * product_.width + piece_.column + tile * CL_TILE;
  }
  int64_t outputs(int64_t tile) const {
    const int64_t left = matrix_.out - tile * CL_TILE;
    return left < CL_TILE ? left : CL_TILE;
  }

  // Zeros, or what the units before this block of units have added up to.
  void continue_sums(RowBlock rows, int64_t tile, int64_t end, int64_t first, float *sums) const {
    if (first == 0 || tile >= end) return (void)memset(sums, 0, sizeof(float) * CL_TILE * rows.rows);
    const int64_t count = outputs(tile);
    const float *from = at(rows.first, tile);
    for (int64_t m = 0; m < rows.rows; ++m, from += product_.width) store(sums + m * CL_TILE, load_some(from, count));
  }

  // Sums, or at last answers, with factor and bias.
  void put(RowBlock rows, int64_t tile, const float *sums, bool last) const {
    const int64_t count = outputs(tile);
    const F16 factor = broadcast(matrix_.scales ? matrix_.factor : 1.0f);
    const float *bias = last ? product_.weight.bias : nullptr;
    const F16 more = bias ? load_some(bias + piece_.column + tile * CL_TILE, count) : F16{};
    float *to = at(rows.first, tile);
    for (int64_t m = 0; m < rows.rows; ++m, to += product_.width) {
      F16 value = load(sums + m * CL_TILE);
      if (last) value = value * factor;  // not before: they may be whole numbers
      store_some(to, bias ? value + more : value, count);
    }
  }

  const Product &product_;
  const ClMatrix &matrix_;
  const Piece &piece_;
  const Inputs &inputs_;
  uint8_t *const space_;
  const int64_t units_, bytes_;
  const bool decodes_, streams_, integers_;
};

int64_t own_bytes(const ClLinear &weight) {
  const int64_t row = row_bytes(weight);
  return up(row > PANEL_BYTES ? row : PANEL_BYTES, 64) * 64;
}

}  // namespace

int64_t multiply_scratch(const ClLinear &weight, int64_t rows, int64_t threads) {
  return inputs_bytes(weight, rows) + threads * own_bytes(weight);
}

int64_t linear_scratch(const ClLinearOp &op, const ClLimits &limits) {
  return multiply_scratch(*op.weight, op.picked ? limits.picks : limits.tokens, limits.threads);
}

void multiply(const ClRows &x, int64_t rows, const ClLinear &weight, float *out, void *scratch, const Team &team,
              int phase) {
  if (rows == 0) return;
  char *own = static_cast<char *>(scratch) + team.rank * own_bytes(weight);
  char *laid = static_cast<char *>(scratch) + team.threads * own_bytes(weight);
  if (lay_inputs(x, rows, weight, laid, own, team, phase)) team.barrier();
  Product product = {weight, rows, 0, team.threads, out};
  for (int64_t p = 0; p < weight.count; ++p) product.width += weight.parts[p].out;
  const Cut size = cut(weight, rows, team.threads);
  const int64_t count = pieces_of(weight, size);
  Span span;
  while (team.take(phase + 1, count, 1, &span)) {
    const Piece piece = piece_at(weight, rows, size, span.first);
    const Inputs inputs = inputs_of(x, rows, weight, piece.part, laid);
    Panel(product, piece, inputs, reinterpret_cast<uint8_t *>(own)).multiply();
  }
}

void linear(const ClLinearOp &op, const ClStep &step, const Team &team) {
  multiply(*op.x, op.picked ? step.picks : step.tokens, *op.weight, op.out, step.scratch, team, 0);
}

}  // namespace CL_ISA
