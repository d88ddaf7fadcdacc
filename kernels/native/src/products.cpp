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
  const int64_t shares = up(wanted, up(tiles, PANEL)), most = up(rows, 96), least = up(rows, MOST);
  return {PANEL, shares > most ? most : shares < least ? least : shares};
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
  const float total = b.sum ? (float)b.sum[row] : b.total[row];
  return value - scale * factors(m, tile, m.zeros) * broadcast(b.scale[row] * total);
}

class Panel {
 public:
  Panel(const Product &product, const Piece &piece, const Inputs &inputs, char *own)
      : product_(product),
        matrix_(product.weight.parts[piece.part]),
        piece_(piece),
        inputs_(inputs),
        space_(reinterpret_cast<uint8_t *>(own)),
        sums_(reinterpret_cast<float *>(own + PANEL_BYTES)),
        first_row_(row_block(inputs.form, product.rows, piece.blocks.first).first),
        width_(up(piece.tiles.end - piece.tiles.first, TILES) * TILES),
        units_(tile_units(matrix_)),
        bytes_(tile_bytes(matrix_)),
        decodes_(matrix_.kind == CL_DECODED),
        streams_(!decodes_ && product.rows <= FEW),
        integers_(inputs.form == Form::GROUPS || inputs.form == Form::ROW),
        at_once_(streams_ ? units_ : units_at_once(inputs.form)) {}

  // All of the piece: unit block after unit block, so that inputs and weights stay in caches.
  void multiply() const {
    for (int64_t first = 0; first < units_; first += at_once_) {
      const int64_t left = units_ - first;
      multiply_units(first, left < at_once_ ? left : at_once_);
    }
  }

 private:
  void multiply_units(int64_t first, int64_t units) const {
    const Span tiles = piece_.tiles;
    const int64_t at_once = streams_ ? TILES : PANEL;  // tiles that all rows pass before the next
    for (int64_t tile = tiles.first; tile < tiles.end; tile += at_once) {
      const int64_t end = tile + at_once < tiles.end ? tile + at_once : tiles.end;
      for (int64_t t = tile; decodes_ && t < end; ++t)
        decode_tile(matrix_, t, first, units, space_ + (t - tile) * at_once_ * 64);
      for (int64_t i = piece_.blocks.first; i < piece_.blocks.end; ++i)
        for (int64_t t = tile; t < end; t += TILES)
          multiply_block(i, t, end, space_ + (t - tile) * at_once_ * 64, first, units);
    }
  }

  // What a block of rows asks memory for, bit by bit: its share of the weights that come after these.
  void look_ahead(Block *b, int64_t block) const {
    const int64_t unit_bytes = matrix_.kind == CL_W4A8 ? 32 : 64, blocks = piece_.blocks.end - piece_.blocks.first;
    const bool over = b->first + b->units == units_;
    const int64_t next = over ? 0 : b->first + b->units, left = units_ - next;
    const int64_t tiles = over ? PANEL * product_.threads : 0, units = next - b->first;
    b->lines = up(up((left < at_once_ ? left : at_once_) * unit_bytes, 64), blocks);
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
    if (!streams_ && !decodes_) look_ahead(&b, block - piece_.blocks.first);
    for (int64_t i = 0; i < TILES; ++i) {
      const int64_t t = tile + i < end ? tile + i : tile;  // one too many is computed twice
      const int64_t item = matrix_.scale_type == CL_FLOAT16 ? 2 : 4,
                    at = t * scale_groups(matrix_) * CL_TILE * item;
      b.weights[i] = decodes_ ? panel + (t - tile) * at_once_ * 64
                              : static_cast<const uint8_t *>(matrix_.weights) + t * bytes_ +
                                    first * (matrix_.kind == CL_W4A8 ? 32 : 64);
      if (matrix_.scales) b.scales[i] = static_cast<const char *>(matrix_.scales) + at;
      if (matrix_.zeros) b.zeros[i] = static_cast<const char *>(matrix_.zeros) + at;
    }
    const int64_t group = inputs_.form == Form::GROUPS ? first / GROUP_UNITS : 0;
    const int64_t g = place_in_rows(inputs_.rows, rows, inputs_.groups, inputs_.at_once / GROUP_UNITS, group);
    b.x = inputs_.codes + place_in_rows(inputs_.rows, rows, inputs_.units, inputs_.at_once, first);
    const int64_t pairs = up(end - piece_.tiles.first, TILES), pair = (tile - piece_.tiles.first) / TILES;
    b.x_step = up(rows.rows * 4, pairs);
    b.next_x = reinterpret_cast<const char *>(b.x + rows.rows * units) + pair * b.x_step * units;
    b.scale = inputs_.scales + place_in_rows(inputs_.rows, rows, inputs_.scaled, inputs_.at_once / SCALED_UNITS,
                                             group * GROUP_UNITS / SCALED_UNITS);
    if (inputs_.sums)
      b.sum = inputs_.sums + g;
    else
      b.start = inputs_.starts + g, b.total = inputs_.totals + g;

    alignas(64) float at_last[TILES * ROWS * 16];
    float *sums = at_last;
    const bool last = first + units == units_;
    if (units < units_)
      sums = sums_ + ((rows.first - first_row_) * width_ + (tile - piece_.tiles.first) * rows.rows) * CL_TILE;
    for (int64_t m = 0; last && m < rows.rows; ++m)
      for (int64_t t = 0; t < TILES; ++t) __builtin_prefetch(at(rows.first + m, tile + t), 1);
    if (first == 0) memset(sums, 0, sizeof(float) * TILES * rows.rows * CL_TILE);
    kernel(rows.rows)(b, sums);
    for (int64_t t = 0; last && t < TILES && tile + t < end; ++t) {
      float *from = sums + t * rows.rows * CL_TILE;
      for (int64_t m = 0; inputs_.form == Form::ROW && m < rows.rows; ++m)
        store(from + m * CL_TILE, of_row(matrix_, tile + t, from + m * CL_TILE, b, m));
      put(rows, tile + t, from);
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

  // Answers, with factor and bias.
  void put(RowBlock rows, int64_t tile, const float *sums) const {
    const int64_t count = outputs(tile);
    const F16 factor = broadcast(matrix_.scales ? matrix_.factor : 1.0f);
    const float *bias = product_.weight.bias;
    const F16 more = bias ? load_some(bias + piece_.column + tile * CL_TILE, count) : F16{};
    float *to = at(rows.first, tile);
    for (int64_t m = 0; m < rows.rows; ++m, to += product_.width) {
      const F16 value = load(sums + m * CL_TILE) * factor;
      store_some(to, bias ? value + more : value, count);
    }
  }

  const Product &product_;
  const ClMatrix &matrix_;
  const Piece &piece_;
  const Inputs &inputs_;
  uint8_t *const space_;
  float *const sums_;  // of units so far: [block of rows][tile][row][16]
  const int64_t first_row_, width_, units_, bytes_;
  const bool decodes_, streams_, integers_;
  const int64_t at_once_;
};

// A thread's own: a row while inputs are laid out, then a panel and its sums. Few rows of decoded codes have more
// tiles in a piece, but by far not so many more as rows fewer: a tile in units by turns has 8 KiB or more.
int64_t own_bytes(const ClLinear &weight) {
  const int64_t row = row_bytes(weight), panel = PANEL_BYTES + PANEL * CL_TILE * 4 * (MOST + ROWS);
  return up(row > panel ? row : panel, 64) * 64;
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
    Panel(product, piece, inputs, own).multiply();
  }
}

void linear(const ClLinearOp &op, const ClStep &step, const Team &team) {
  multiply(*op.x, op.picked ? step.picks : step.tokens, *op.weight, op.out, step.scratch, team, 0);
}

}  // namespace CL_ISA
