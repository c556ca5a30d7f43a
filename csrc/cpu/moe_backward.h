// The experts' backward pass on the CPU, in three sweeps:
//
//   tokens     sorts x and dy by expert, as factors of the products below
//   features   for some hidden features of an expert and all of its tokens: d = dy down, from it and hidden dweights, dhidden and w u, and
//              with them these features' part of dgate_up = dhidden^T x and ddown = dy^T (w u)
//   columns    for some columns of x and every expert: adds their part of dx = dhidden gate_up to the tokens' dx
//
// for a group of experts at a time, and the last two for a range of the hidden features at a time where one expert has many tokens, so
// that what is sorted by expert takes little memory. dweights are added up over the features at last. The gradients of the experts, or dx
// and with it the last sweep, are left out where nobody needs them.
//
// So every weight is packed once, every gradient of a weight written once and by one thread, and y is never needed. Compute-bound: 12 C F
// FLOPs for each pair, 2 C F each for d and ddown, twice that for dgate_up and dx. Moved: weights, their gradients and hidden once;
// scratch memory for sorted x and dy and for dhidden.
#pragma once
#include "moe_plan.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace moe_pass {

constexpr int64_t ROWS = 128;   // tokens of a product
constexpr int64_t CHUNK = 512;  // tokens whose dhidden and w u are kept for the gradients of the weights: a multiple of ROWS

// Experts e0 .. e1 - 1 pass through the sweeps together, `features` of their F hidden ones at a time: as many as share some scratch memory,
// so that it stays a small part of what the gradients take. A matter of shapes and of the routing alone.
struct Group {
  int64_t e0, e1, features;

  static constexpr int64_t LEAST_BYTES = 3 << 20, SHARE = 16;  // of scratch memory at least, or the SHARE-th part of what all would need
  static constexpr int64_t LEAST_FEATURES = 512;               // that are worth a sweep: their slices occupy several threads

  // The group that begins with expert e0.
  template <class Tile>
  static Group from(const Plan& plan, int64_t e0) {
    const int64_t F = plan.p.F, sorted = 3 * Width<Tile>(plan.p.C).ld, of_row = sorted + 2 * Width<Tile>(F).ld;  // numbers
    const int64_t room = larger(LEAST_BYTES / sizeof(Tile), plan.all_padded_rows() * of_row / SHARE);
    const auto rows = [&](int64_t e1) { return plan.padded_begin(e1) - plan.padded_begin(e0); };
    int64_t e1 = e0 + 1;
    while (e1 < plan.p.E && rows(e1 + 1) * of_row <= room) e1++;
    if (rows(e1) * of_row <= room) return {e0, e1, F};
    const int64_t most = larger(LEAST_FEATURES, (room / rows(e1) - sorted) / 2), ranges = (F + most - 1) / most;
    return {e0, e1, round_up((F + ranges - 1) / ranges, SLICE)};
  }
};

template <class T, class Tile>
struct BackwardContext {
  const MoeBackward& args;
  const Plan& plan;
  const Group group;
  const Products<Tile> multiply;
  const Width<Tile> width;
  const int64_t rows;
  const Pieces blocks;
  const bool dexperts;                      // whether they are needed
  const Buffer<Tile> dy, dy_transposed, x;  // padded rows by expert: dy as left factors, and x as a right one, two of them for dexperts
  const Buffer<Tile> dhidden;               // padded rows by expert, a's features of the range then b's
  const SlicedSums<T>& dx;
  const Buffer<float>& dweights;  // (slices of all features, N, K)

  BackwardContext(const MoeBackward& a, const Plan& p, Group g, const SlicedSums<T>& dx_, const Buffer<float>& dweights_)
      : args(a),
        plan(p),
        group(g),
        multiply(library_products()),
        width(p.p.C),
        rows(p.padded_begin(g.e1) - p.padded_begin(g.e0)),
        blocks(g.e1 - g.e0, [&](int64_t i) { return (p.rows(g.e0 + i) + ROWS - 1) / ROWS; }),
        dexperts(a.dgate_up != nullptr),
        dy(rows * width.ld),
        dy_transposed(dexperts ? rows * width.ld : 0),
        x(dexperts ? rows * width.ld : 0),
        dhidden(rows * 2 * Width<Tile>(smaller(g.features, p.p.F)).ld),
        dx(dx_),
        dweights(dweights_) {}
  bool ready() const { return blocks.ready() && dy.data() && dy_transposed.data() && x.data() && dhidden.data(); }

  // Where an expert's rows begin in the scratch memory of its group.
  int64_t begin(int64_t e) const { return plan.padded_begin(e) - plan.padded_begin(group.e0); }
  // Padded rows of the chunk that begins with row i0.
  int64_t chunk(int64_t e, int64_t i0) const { return smaller(CHUNK, plan.padded_rows(e) - i0); }
  // dy of that chunk, (C, chunk): so few strides that the library, which generates a product for each, does not go on doing so for ever.
  Tile* transposed(int64_t e, int64_t i0) const { return dy_transposed.data() + (begin(e) + i0) * width.ld; }
};

// A range of the hidden features, of all experts of a group.
template <class T, class Tile>
struct Features {
  const BackwardContext<T, Tile>& context;
  const int64_t begin, end, slices;
  const Width<Tile> width;
  const int64_t stride_dhidden;  // a's features, then b's

  Features(const BackwardContext<T, Tile>& x, int64_t first)
      : context(x),
        begin(first),
        end(smaller(first + x.group.features, x.plan.p.F)),
        slices((end - begin + SLICE - 1) / SLICE),
        width(end - begin),
        stride_dhidden(2 * width.ld) {}
};

template <class T, class Tile>
class SortTokens {
 public:
  explicit SortTokens(const BackwardContext<T, Tile>& context)
      : x_(context), tokens_(is_bfloat16<Tile> && x_.dexperts ? ROWS * x_.width.ld : 0) {}
  bool ready() const { return tokens_.data() != nullptr; }

  void operator()(int64_t task) const {
    const auto [place, i] = x_.blocks[task];
    const Plan& plan = x_.plan;
    const int64_t e = x_.group.e0 + place, i0 = i * ROWS, n = smaller(ROWS, plan.rows(e) - i0), padded = round_up(n, TOKEN_STEP<Tile>),
                  begin = x_.begin(e);
    Tile* dy = x_.dy.data() + (begin + i0) * x_.width.ld;
    gather_tokens<T>(x_.args.dy, x_.args.stride_dy_row, plan, e, i0, n, padded, x_.width, dy);
    if (!x_.dexperts) return;
    const int64_t i_chunk = i0 / CHUNK * CHUNK;
    transpose_left(dy, padded, x_.width, x_.transposed(e, i_chunk) + i0 - i_chunk, x_.chunk(e, i_chunk));
    Tile* x = x_.x.data() + (begin + i0) * x_.width.ld;
    const auto token = [&](int64_t r) { return static_cast<const T*>(plan.p.x) + plan.token(e, i0 + r) * plan.p.stride_x_row; };
    gather_right_factor<T>(token, n, padded, x_.width, is_bfloat16<Tile> ? tokens_.data() : x, x);
  }

 private:
  const BackwardContext<T, Tile>& x_;
  Buffer<Tile> tokens_;
};

template <class T, class Tile>
class FeatureSlice {
 public:
  explicit FeatureSlice(const Features<T, Tile>& range)
      : x_(range.context),
        p_(x_.plan.p),
        range_(range),
        columns_(SLICE),
        chunk_(smaller(CHUNK, larger(x_.rows, TOKEN_STEP<Tile>))),
        in_place_(sizeof(T) == sizeof(float) && p_.C % STEP == 0 && p_.F % STEP == 0),
        dgate_up_past_cache_(gradient_past_cache<T>(x_.args.dgate_up, 2 * p_.E * p_.F, p_.C)),
        ddown_past_cache_(gradient_past_cache<T>(x_.args.ddown, p_.E * p_.C, p_.F)),
        rows_(round_up(p_.C, STEP) * columns_.ld),
        down_(is_bfloat16<Tile> ? round_up(p_.C, STEP) * columns_.ld : 0),
        d_(ROWS * columns_.ld),
        u_(is_bfloat16<Tile> ? ROWS * columns_.ld : 0),
        dhidden_transposed_(x_.dexperts ? 2 * columns_.ld * chunk_ : 0),
        wu_(chunk_ * columns_.ld),
        dgate_up_(in_place_ || !x_.dexperts ? 0 : 2 * columns_.ld * x_.width.ld),
        ddown_(in_place_ || !x_.dexperts ? 0 : round_up(p_.C, STEP) * columns_.ld) {}
  ~FeatureSlice() { x_.multiply.release(); }
  bool ready() const {
    return rows_.data() && down_.data() && d_.data() && u_.data() && dhidden_transposed_.data() && wu_.data() && dgate_up_.data() &&
           ddown_.data();
  }

  void operator()(int64_t task) const {
    const int64_t e = x_.group.e0 + task / range_.slices, f = range_.begin + task % range_.slices * SLICE,
                  features = smaller(SLICE, range_.end - f), n = x_.plan.rows(e);
    if (n == 0) return x_.dexperts ? clear_gradients(e, f, features) : void();
    const Width<Tile> width(features);
    const Tile* down = pack_down(e, f, width);
    for (int64_t i0 = 0; i0 < n; i0 += CHUNK) {
      const int64_t rows = smaller(CHUNK, n - i0), padded = round_up(rows, TOKEN_STEP<Tile>);
      for (int64_t j = 0; j < rows; j += ROWS) differentiate(e, f, i0, j, smaller(ROWS, rows - j), width, down);
      if (x_.dexperts) add_gradients(e, f, i0, padded, width);
    }
    if (x_.dexperts && !in_place_) write_gradients(e, f, features, width);
  }

 private:
  // These columns of down as a right factor.
  const Tile* pack_down(int64_t e, int64_t f, const Width<Tile>& width) const {
    const auto row = [&](int64_t c) { return x_.plan.template down<T>(e, c) + f; };
    return gather_right_factor<T>(row, p_.C, round_up(p_.C, STEP), width, rows_.data(), down_.data());
  }

  // For n rows from row j of a chunk: d, and all that follows from it.
  void differentiate(int64_t e, int64_t f, int64_t i0, int64_t j, int64_t n, const Width<Tile>& width, const Tile* down) const {
    const int64_t padded = round_up(n, TOKEN_STEP<Tile>), at = x_.begin(e) + i0 + j;
    for (int64_t r = 0; r < n; r++) ask_for_hidden<T>(x_.args.hidden, x_.plan.pair(e, i0 + j + r), p_.F, f, width.C);
    x_.multiply(padded, width.used, x_.width.used, x_.dy.data() + at * x_.width.ld, x_.width.ld, down, width.ld, d_.data(), width.ld,
                false);
    Tile* wu_right = wu_.data() + j * width.ld;
    Tile* wu_rows = is_bfloat16<Tile> ? u_.data() : wu_right;
    Tile* const dhidden = x_.dhidden.data() + at * range_.stride_dhidden + f - range_.begin;
    for (int64_t r = 0; r < padded; r++) {
      Tile *da = dhidden + r * range_.stride_dhidden, *db = da + range_.width.ld, *wu = wu_rows + r * width.ld;
      if (r < n) {
        const int64_t pair = x_.plan.pair(e, i0 + j + r);
        x_.dweights[f / SLICE * p_.N * p_.K + pair] =
            differentiate_row(hidden(pair) + f, p_.F, p_.weights[pair], width.C, d_.data() + r * width.ld, da, db, wu);
      }
      const int64_t written = r < n ? width.C : 0;
      Tile* const all[] = {da, db, wu};
      for (Tile* row : all) __builtin_memset(row + written, 0, (width.ld - written) * sizeof(Tile));
    }
    if (!x_.dexperts) return;
    for (int64_t half = 0; half < 2; half++)
      transpose_left(dhidden + half * range_.width.ld, range_.stride_dhidden, padded, width,
                     dhidden_transposed_.data() + half * width.ld * chunk_ + j, chunk_);
    right_factor(wu_rows, padded, width, wu_right);
  }

  // The share of a chunk: the rows from i0 on, padded.
  void add_gradients(int64_t e, int64_t f, int64_t i0, int64_t padded, const Width<Tile>& width) const {
    const Tile* x = x_.x.data() + (x_.begin(e) + i0) * x_.width.ld;
    for (int64_t half = 0; half < 2; half++) {
      const Place sums = sums_of_gate_up(e, half, f, width);
      x_.multiply(width.ld, x_.width.used, padded, dhidden_transposed_.data() + half * width.ld * chunk_, chunk_, x, x_.width.ld, sums.data,
                  sums.ld, i0 > 0);
    }
    const Place sums = sums_of_down(e, f);
    x_.multiply(round_up(p_.C, STEP), width.used, padded, x_.transposed(e, i0), x_.chunk(e, i0), wu_.data(), width.ld, sums.data, sums.ld,
                i0 > 0);
  }

  // Where products add up a gradient of weights: in the gradient itself if it is of float and they fill it exactly, else in a tile.
  struct Place {
    float* data;
    int64_t ld;
  };
  Place sums_of_gate_up(int64_t e, int64_t half, int64_t f, const Width<Tile>& width) const {
    if constexpr (sizeof(T) == sizeof(float))
      if (in_place_) return {dgate_up(e, half, f), p_.C};
    return {dgate_up_.data() + half * width.ld * x_.width.ld, x_.width.ld};
  }
  Place sums_of_down(int64_t e, int64_t f) const {
    if constexpr (sizeof(T) == sizeof(float))
      if (in_place_) return {ddown(e, 0) + f, p_.F};
    return {ddown_.data(), columns_.ld};
  }

  void write_gradients(int64_t e, int64_t f, int64_t features, const Width<Tile>& width) const {
    with_stores(dgate_up_past_cache_, [&](auto put) {
      for (int64_t half = 0; half < 2; half++)
        for (int64_t i = 0; i < features; i++)
          write_row(dgate_up(e, half, f + i), dgate_up_.data() + (half * width.ld + i) * x_.width.ld, p_.C, put);
    });
    with_stores(ddown_past_cache_, [&](auto put) {
      for (int64_t c = 0; c < p_.C; c++) write_row(ddown(e, c) + f, ddown_.data() + c * columns_.ld, features, put);
    });
  }

  template <class Put>
  static void write_row(T* row, const float* sums, int64_t n, const Put& put) {
    for_columns<float>(0, n, [&](int64_t c, auto count, int) { put(row + c, load(sums + c, count), count); });
  }

  // Of an expert without tokens: this task's part, of ddown as much as these features are of all, but in one piece.
  void clear_gradients(int64_t e, int64_t f, int64_t features) const {
    for (int64_t half = 0; half < 2; half++) clear(dgate_up(e, half, f), features * p_.C, dgate_up_past_cache_);
    clear(ddown(e, 0) + f * p_.C, features * p_.C, ddown_past_cache_);
  }

  T* dgate_up(int64_t e, int64_t half, int64_t f) const { return static_cast<T*>(x_.args.dgate_up) + ((2 * e + half) * p_.F + f) * p_.C; }
  const T* hidden(int64_t pair) const { return static_cast<const T*>(x_.args.hidden) + pair * 2 * p_.F; }
  T* ddown(int64_t e, int64_t c) const { return static_cast<T*>(x_.args.ddown) + (e * p_.C + c) * p_.F; }

  const BackwardContext<T, Tile>& x_;
  const MoeProblem& p_;
  const Features<T, Tile>& range_;
  const Width<Tile> columns_;
  const int64_t chunk_;
  const bool in_place_, dgate_up_past_cache_, ddown_past_cache_;
  Buffer<Tile> rows_, down_;
  Buffer<float> d_;
  Buffer<Tile> u_;
  Buffer<Tile> dhidden_transposed_, wu_;
  Buffer<float> dgate_up_, ddown_;
};

template <class T, class Tile>
class ColumnSlice {
 public:
  explicit ColumnSlice(const Features<T, Tile>& range)
      : x_(range.context),
        p_(x_.plan.p),
        range_(range),
        columns_(SLICE),
        rows_(range.stride_dhidden * columns_.ld),
        gate_up_(is_bfloat16<Tile> ? range.stride_dhidden * columns_.ld : 0),
        dx_(ROWS * columns_.ld) {}
  ~ColumnSlice() { x_.multiply.release(); }
  bool ready() const { return rows_.data() && gate_up_.data() && dx_.data(); }

  void operator()(int64_t task) const {
    const int64_t c = task * SLICE;
    const Width<Tile> width(smaller(SLICE, p_.C - c));
    if (x_.group.e0 == 0 && range_.begin == 0) x_.dx.clear(c);
    for (int64_t e = x_.group.e0; e < x_.group.e1; e++) {
      const int64_t n = x_.plan.rows(e);
      if (n == 0) continue;
      const Tile* gate_up = pack_gate_up(e, c, width);
      for (int64_t i0 = 0; i0 < n; i0 += ROWS) {
        const int64_t rows = smaller(ROWS, n - i0);
        for (int64_t r = 0; r < rows; r++) ask_for_row(x_.dx.row(x_.plan.token(e, i0 + r), c), width.C);
        x_.multiply(round_up(rows, TOKEN_STEP<Tile>), width.used, range_.stride_dhidden,
                    x_.dhidden.data() + (x_.begin(e) + i0) * range_.stride_dhidden, range_.stride_dhidden, gate_up, width.ld, dx_.data(),
                    width.ld, false);
        for (int64_t r = 0; r < rows; r++) add(dx_.data() + r * width.ld, width.C, x_.dx.row(x_.plan.token(e, i0 + r), c));
      }
    }
  }

 private:
  // These columns of gate_up as a right factor: a's features of the range and zeros behind them, then b's.
  const Tile* pack_gate_up(int64_t e, int64_t c, const Width<Tile>& width) const {
    const int64_t half = range_.width.ld, size = half * width.ld;
    for (int64_t i = 0; i < 2; i++) {
      const auto row = [&](int64_t f) { return x_.plan.template gate_up<T>(e, i * p_.F + range_.begin + f) + c; };
      gather_right_factor<T>(row, range_.end - range_.begin, half, width, rows_.data() + i * size, gate_up_.data() + i * size);
    }
    return is_bfloat16<Tile> ? gate_up_.data() : rows_.data();
  }

  static void add(const float* row, int64_t n, float* sums) {
    for_columns<float>(0, n, [&](int64_t c, auto count, int) { store(sums + c, load(sums + c, count) + load(row + c, count), count); });
  }

  const BackwardContext<T, Tile>& x_;
  const MoeProblem& p_;
  const Features<T, Tile>& range_;
  const Width<Tile> columns_;
  Buffer<Tile> rows_, gate_up_;
  Buffer<float> dx_;
};

template <class T, class Tile>
Error backward(const MoeBackward& args, const Plan& plan) {
  const MoeProblem& p = args.problem;
  const int64_t slices = (p.F + SLICE - 1) / SLICE, columns = (p.C + SLICE - 1) / SLICE, pairs = p.N * p.K;
  const Buffer<float> dweights(slices * pairs);
  const SlicedSums<T> dx(args.dx, args.dx ? p.N : 0, p.C);
  if (!dx.ready() || !dweights.data()) return OUT_OF_MEMORY;
  for (int64_t e = 0; e < p.E;) {
    const Group group = Group::from<Tile>(plan, e);
    const BackwardContext<T, Tile> context(args, plan, group, dx, dweights);
    if (!context.ready()) return OUT_OF_MEMORY;
    if (const Error error = run_tasks<SortTokens<T, Tile>>(context.blocks.size(), context)) return error;
    for (int64_t f = 0; f < p.F; f += group.features) {
      const Features<T, Tile> range(context, f);
      if (const Error error = run_tasks<FeatureSlice<T, Tile>>((group.e1 - group.e0) * range.slices, range)) return error;
      if (args.dx == nullptr) continue;
      if (const Error error = run_tasks<ColumnSlice<T, Tile>>(columns, range)) return error;
    }
    e = group.e1;
  }
  dx.write();
  for (int64_t i = 0; i < pairs; i++) {
    args.dweights[i] = 0;
    for (int64_t s = 0; s < slices; s++) args.dweights[i] += dweights[s * pairs + i];
  }
  return nullptr;
}

}  // namespace moe_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
