// Cross-entropy's CUDA kernels (csrc/cuda/cross_entropy.cu) against float64, through the interface of csrc/cross_entropy.h: plain, and the
// passes of the fused operation on pieces of logits.
#include <algorithm>

#include "check.h"
#include "cross_entropy.h"

namespace {

using namespace check;
using fastprimer::Cuda;
using fastprimer::DlogitsPiece;
using fastprimer::Dtype;
using fastprimer::Kept16;
using fastprimer::kept_blocks;
using fastprimer::LinearCrossEntropyProblem;
using fastprimer::LogitsPiece;
using fastprimer::LossGradients;
using fastprimer::LossOptions;
using fastprimer::LossOutputs;
using fastprimer::LossState;

constexpr int64_t IGNORED = -7;

struct Case {
  int N, V;
  double label_smoothing = 0, z_loss = 0, softcap = 0;
  int more = 0;       // how much further apart than V the rows of logits are
  size_t offset = 0;  // of the logits' first number from an address that 16 divides
  bool dlse = false, bias = false;
  int width = 256;  // of the first piece

  LossOptions options() const { return {IGNORED, label_smoothing, z_loss, softcap}; }
};

const Case CASES[] = {
    {.N = 1, .V = 1, .z_loss = 0.5},                                                                // one word
    {.N = 3, .V = 700, .label_smoothing = 0.1, .z_loss = 0.1, .dlse = true, .width = 301},          // rows of 16 bits unaligned, blocks
    {.N = 9, .V = 37, .label_smoothing = 0.1, .more = 2, .dlse = true, .bias = true, .width = 20},  // a warp a token, nothing aligned
    {.N = 5, .V = 2048, .softcap = 3, .offset = 4, .bias = true},                                   // vectors behind a head
    {.N = 3, .V = 2311, .label_smoothing = 0.2, .z_loss = 0.1, .softcap = 5, .dlse = true},         // a block a token
    {.N = 150, .V = 70, .z_loss = 0.01, .bias = true, .width = 64},                                 // more tokens than dbias' run
    {.N = 4, .V = 4099, .z_loss = 0.01, .more = 5, .offset = 1, .dlse = true, .bias = true, .width = 3001},
};

// The chapter's formulas for one token, of its logits with their bias.
struct Truth {
  std::vector<double> z, dl, size,
      slope;  // size: of what dl is the sum of, with the error of its exponent; slope: of dl over z, without a cap
  double lse, loss, terms;
  int argmax;

  Truth(const Case& c, const std::vector<double>& l, int target, double dloss, double dlse) : z(l) {
    const double cap = c.softcap;
    for (double& v : z) v = cap > 0 ? cap * std::tanh(v / cap) : v;
    argmax = static_cast<int>(std::max_element(z.begin(), z.end()) - z.begin());
    double sum = 0, total = 0, total_size = 0;
    for (double v : z) {
      sum += std::exp(v - z[argmax]);
      total += v;
      total_size += std::abs(v);
    }
    lse = z[argmax] + std::log(sum);
    loss = lse - (1 - c.label_smoothing) * z[target] - c.label_smoothing / c.V * total + c.z_loss * lse * lse;
    terms = std::abs(lse) + std::abs(z[target]) + total_size / c.V + c.z_loss * lse * lse + 4;
    const double top = dloss * (1 + 2 * c.z_loss * lse) + dlse;
    for (int v = 0; v < c.V; v++) {
      const double p = std::exp(z[v] - lse), cap_slope = cap > 0 ? 1 - z[v] * z[v] / (cap * cap) : 1;
      const double dz = top * p - dloss * ((v == target ? 1 - c.label_smoothing : 0) + c.label_smoothing / c.V);
      dl.push_back(dz * cap_slope);
      slope.push_back(std::abs(top) * p);
      size.push_back((std::abs(dloss) + std::abs(dlse)) * p * (4 + std::abs(z[v]) + std::abs(lse)) +
                     std::abs(dloss) * (v == target ? 1 : c.label_smoothing / c.V) + std::abs(dl.back()));
    }
  }
};

// Random logits, targets and upstream gradients; every fourth token but the first is ignored, and full of NaN.
template <class T>
struct Run {
  const Case& c;
  int stride;
  Buffer<T> logits;
  Buffer<float> bias, dloss, dlse, loss, lse, correction;
  Buffer<int64_t> target, argmax;

  explicit Run(const Case& c)
      : c(c),
        stride(c.V + c.more),
        logits(static_cast<size_t>(c.N - 1) * stride + c.V, c.offset),
        bias(c.V),
        dloss(c.N),
        dlse(c.N),
        loss(c.N),
        lse(c.N),
        correction(c.N),
        target(c.N),
        argmax(c.N) {
    std::mt19937 random(c.N + c.V);
    randomize(logits, random);
    randomize(bias, random);
    randomize(dloss, random);
    randomize(dlse, random);
    for (int n = 0; n < c.N; n++) {
      target[n] = n % 4 == 3 ? IGNORED : static_cast<int64_t>(random() % c.V);
      if (!ignored(n)) continue;
      dloss[n] = INFINITY;
      for (int v = 0; v < c.V; v++) logits[static_cast<size_t>(n) * stride + v] = narrow<T>(NAN);
    }
  }

  bool ignored(int n) { return target[n] == IGNORED; }
  LossOutputs outputs() { return {loss.data(), lse.data(), correction.data(), argmax.data()}; }
  LossGradients gradients() { return {dloss.data(), c.dlse ? dlse.data() : nullptr, lse.data(), correction.data()}; }

  Truth truth(int n, bool with_bias) {
    std::vector<double> l;
    for (int v = 0; v < c.V; v++) l.push_back(widen(logits[static_cast<size_t>(n) * stride + v]) + (with_bias ? bias[v] : 0.0f));
    return Truth(c, l, static_cast<int>(target[n]), dloss[n], c.dlse ? dlse[n] : 0);
  }

  void check_outputs(const std::string& name, bool with_bias) {
    for (int n = 0; n < c.N; n++) {
      if (ignored(n)) {
        if (loss[n] != 0 || lse[n] != 0 || correction[n] != 0 || argmax[n] != -1)
          return fail(name + ": outputs of an ignored token are wrong");
        continue;
      }
      const Truth t = truth(n, with_bias);
      if (!close(lse[n], t.lse, t.terms)) return fail(name + ": lse is wrong");
      if (!close(loss[n], t.loss, t.terms)) return fail(name + ": loss is wrong");
      if (std::abs(t.z[argmax[n]] - t.z[t.argmax]) > 1e-6) return fail(name + ": argmax is wrong");
    }
    loss.finish(name + ": loss");
    lse.finish(name + ": lse");
    correction.finish(name + ": correction");
    argmax.finish(name + ": argmax");
  }
};

template <class T>
void check_plain(const Case& c, Dtype dtype, const std::string& name) {
  Run<T> run(c);
  Buffer<T> dlogits(static_cast<size_t>(c.N) * c.V, c.offset);
  const fastprimer::CrossEntropyProblem problem = {run.logits.data(), run.stride, run.target.data(), c.N, c.V, dtype, c.options()};
  if (const char* error = cross_entropy_forward(Cuda{}, {problem, run.outputs()})) return fail(name + ": forward: " + error);
  run.check_outputs(name, false);
  if (const char* error = cross_entropy_backward(Cuda{}, {problem, run.gradients(), dlogits.data()}))
    return fail(name + ": backward: " + error);
  for (int n = 0; n < c.N; n++) {
    const T* row = dlogits.data() + static_cast<size_t>(n) * c.V;
    if (run.ignored(n)) {
      if (std::any_of(row, row + c.V, [](T v) { return widen(v) != 0; })) return fail(name + ": dlogits of an ignored token are wrong");
      continue;
    }
    const Truth t = run.truth(n, false);
    for (int v = 0; v < c.V; v++)
      if (!close(row[v], t.dl[v], t.size[v])) return fail(name + ": dlogits is wrong");
  }
  dlogits.finish(name + ": dlogits");
}

// Of z in 16 bits, and a little for the float32 in which they are counted.
constexpr double HALF_A_STEP = 0.505 / fastprimer::KEPT_STEPS;

// What kept numbers of 16 bits stand for.
double recalled(const LinearCrossEntropyProblem& p, const Kept16& kept, int64_t n, int64_t v) {
  const int16_t steps = kept.z[n * p.columns + v];
  const float shift = kept.shift[n * kept_blocks(p.columns) + v / fastprimer::KEPT_BLOCK];
  return steps == fastprimer::KEPT_LOWEST ? -INFINITY : static_cast<double>(steps) / fastprimer::KEPT_STEPS + shift;
}

// The same numbers as two pieces of float32 logits, of which the first is kept, in 16 bits where T has no more; dlogits of T.
template <class T>
void check_pieces(const Case& c, Dtype dtype, const std::string& name) {
  Run<float> run(c);
  const int widths[] = {std::min(c.width, c.V), c.V - std::min(c.width, c.V)};
  Buffer<float> kept(static_cast<size_t>(c.N) * widths[0]), dbias(c.V);
  Buffer<LossState> state(c.N);
  Buffer<int16_t> kept_numbers(kept.size());
  Buffer<float> kept_shifts(c.N * kept_blocks(widths[0]));
  const Kept16 kept16 = {kept_numbers.data(), kept_shifts.data()};
  const LinearCrossEntropyProblem problem = {.x = nullptr,
                                             .stride_x_row = 0,
                                             .weight = nullptr,
                                             .stride_weight_row = 0,
                                             .bias = c.bias ? run.bias.data() : nullptr,
                                             .target = run.target.data(),
                                             .N = c.N,
                                             .C = 1,
                                             .V = c.V,
                                             .dtype = dtype,
                                             .options = c.options(),
                                             .columns = widths[0],
                                             .in_16_bits = sizeof(T) == 2 && c.softcap == 0};
  for (int n = 0; n < c.N; n++)
    std::copy_n(run.logits.data() + static_cast<size_t>(n) * run.stride, widths[0], kept.data() + static_cast<size_t>(n) * widths[0]);
  const LogitsPiece pieces[] = {{kept.data(), widths[0], 0, widths[0], true},
                                {run.logits.data() + widths[0], run.stride, widths[0], widths[1], false}};
  for (const LogitsPiece& piece : pieces) {
    if (piece.width == 0) continue;
    if (const char* error = linear_cross_entropy_fold(Cuda{}, problem, piece, state.data(), run.outputs()))
      return fail(name + ": fold: " + error);
    if (!piece.kept || !problem.in_16_bits) continue;
    if (const char* error = linear_cross_entropy_keep(Cuda{}, problem, piece, state.data(), kept16)) return fail(name + ": keep: " + error);
  }
  run.check_outputs(name, c.bias);
  for (int n = 0; n < c.N; n++) {  // every other block by another shift, so that blocks are told apart
    for (int v = 128; problem.in_16_bits && v < widths[0]; v++) {
      if (v / 128 % 2 == 0) continue;
      if (v % 128 == 0) kept_shifts[n * kept_blocks(widths[0]) + v / 128] += 1;
      kept_numbers[static_cast<size_t>(n) * widths[0] + v] -= static_cast<int16_t>(fastprimer::KEPT_STEPS);
    }
  }
  std::vector<double> sums(c.V), sizes(c.V);
  for (LogitsPiece piece : pieces) {
    if (piece.width == 0) continue;
    const bool in_16_bits = piece.kept && problem.in_16_bits;
    const int64_t stride = piece.width + (in_16_bits ? 8 : 3);  // 8: rows lie as those of kept do, and vectors across two blocks
    if (in_16_bits) piece.logits = nullptr;
    Buffer<T> dlogits(static_cast<size_t>(c.N - 1) * stride + piece.width);
    const DlogitsPiece out = {dlogits.data(), stride, nullptr, c.bias ? dbias.data() + piece.first : nullptr};
    if (const char* error = linear_cross_entropy_dlogits(Cuda{}, problem, piece, kept16, run.gradients(), out))
      return fail(name + ": dlogits: " + error);
    for (int n = 0; n < c.N; n++) {
      const bool ignored = run.ignored(n);
      const Truth t = ignored ? Truth(c, std::vector<double>(c.V), 0, 0, 0) : run.truth(n, c.bias);
      for (int64_t i = 0; i < piece.width; i++) {
        const int64_t v = piece.first + i;
        const double expected = ignored ? 0 : t.z[v];
        if (in_16_bits && !(std::abs(recalled(problem, kept16, n, v) - expected) <= (ignored ? 0 : HALF_A_STEP)))
          return fail(name + ": kept is wrong");
        if (piece.kept && !in_16_bits && !close(piece.logits[n * piece.stride_row + i], expected, ignored ? 0 : 1 + std::abs(expected)))
          return fail(name + ": kept is wrong");
        // As if it were the rounding of so large a sum.
        const double size = ignored ? 0 : t.size[v] + (in_16_bits ? HALF_A_STEP * t.slope[v] / (8 * ROUNDING<float>) : 0);
        if (!close(dlogits[n * stride + i], ignored ? 0 : t.dl[v], size)) return fail(name + ": dlogits is wrong");
        sums[v] += ignored ? 0 : t.dl[v];
        sizes[v] += size;
      }
    }
    if (c.more == 0) dlogits.finish(name + ": dlogits");
  }
  for (int v = 0; c.bias && v < c.V; v++)
    if (!close(dbias[v], sums[v], sizes[v])) return fail(name + ": dbias is wrong");
  if (c.bias) dbias.finish(name + ": dbias");
  kept.finish(name + ": kept");
  if (!problem.in_16_bits) return;
  kept_numbers.finish(name + ": kept");
  kept_shifts.finish(name + ": shift");
}

// What stands around the products: tokens without gaps, sums of parts, the scale of 16 bits.
template <class T>
void check_around(Dtype dtype, const std::string& name) {
  const Case c = {.N = 11, .V = 45, .z_loss = 0.1};
  Run<T> run(c);
  Run<float> wide(c);
  LinearCrossEntropyProblem problem = {};
  problem.x = run.logits.data();
  problem.stride_x_row = run.stride;
  problem.target = run.target.data();
  problem.N = c.N;
  problem.C = problem.V = c.V;
  problem.dtype = dtype;
  problem.options = c.options();
  Buffer<T> tokens(static_cast<size_t>(c.N) * c.V), out(tokens.size());
  if (const char* error = linear_cross_entropy_tokens(Cuda{}, problem, tokens.data())) return fail(name + ": tokens: " + error);
  for (size_t i = 0; i < tokens.size(); i++) {
    const bool ignored = run.ignored(static_cast<int>(i / c.V));
    if (widen(tokens[i]) != (ignored ? 0 : widen(run.logits[i]))) return fail(name + ": tokens is wrong");
  }
  tokens.finish(name + ": tokens");

  Buffer<float> sum(tokens.size()), part(tokens.size()), scale(1);
  std::mt19937 random(1);
  randomize(sum, random);
  randomize(part, random);
  std::vector<float> before(sum.data(), sum.data() + sum.size());
  scale[0] = 8;
  const int64_t count = static_cast<int64_t>(sum.size());
  if (const char* error = linear_cross_entropy_add(Cuda{}, dtype, sum.data(), part.data(), count, nullptr, nullptr))
    return fail(name + ": add: " + error);
  for (size_t i = 0; i < sum.size(); i++)
    if (sum[i] != before[i] + part[i]) return fail(name + ": sum is wrong");
  if (const char* error = linear_cross_entropy_add(Cuda{}, dtype, sum.data(), part.data(), count, scale.data(), out.data()))
    return fail(name + ": add: " + error);
  for (size_t i = 0; i < sum.size(); i++)
    if (widen(out[i]) != widen(narrow<T>((sum[i] + part[i]) / 8))) return fail(name + ": out is wrong");
  sum.finish(name + ": sum");
  out.finish(name + ": out");

  for (int n = 0; n < c.N; n++) run.lse[n] = 2, run.correction[n] = 1;
  if (const char* error = linear_cross_entropy_scale(Cuda{}, problem, run.gradients(), scale.data()))
    return fail(name + ": scale: " + error);
  double most = 0;
  for (int n = 0; n < c.N; n++) {
    if (!run.ignored(n)) most = std::max(most, std::abs(run.dloss[n] * (1 + 2 * c.z_loss * 2.0)) + std::abs(run.dloss[n]));
  }
  int exponent;
  if (std::frexp(scale[0], &exponent) != 0.5 || most * scale[0] >= 32768 || most * scale[0] < 8192) fail(name + ": scale is wrong");
}

// Rows of NaN, of infinities and of equal numbers; a target that is no word's; a token that the model is sure of, far from 0.
void check_special() {
  const Case c = {.N = 7, .V = 2500};
  Run<float> run(c);
  for (int v = 0; v < c.V; v++) {
    run.logits[v] = v == 1900 || v == 2000 ? NAN : 1;
    run.logits[c.V + v] = -INFINITY;
    run.logits[2 * c.V + v] = v == 700 || v == 1800 ? 5 : -INFINITY;
    run.logits[4 * c.V + v] = 0;
    run.logits[6 * c.V + v] = v == 700 ? 1001 : v == 5 ? 993 : -INFINITY;
  }
  for (int n = 0; n < c.N; n++) run.target[n] = n == 5 ? int64_t{1} << 40 : n == 3 ? IGNORED : 700;
  Buffer<float> dlogits(static_cast<size_t>(c.N) * c.V);
  const fastprimer::CrossEntropyProblem problem = {run.logits.data(), run.stride, run.target.data(), c.N, c.V, Dtype::float32, c.options()};
  if (const char* error = cross_entropy_forward(Cuda{}, {problem, run.outputs()})) return fail(std::string("special: ") + error);
  if (const char* error = cross_entropy_backward(Cuda{}, {problem, run.gradients(), dlogits.data()}))
    return fail(std::string("special: ") + error);
  expect("special: a NaN hides", std::isnan(run.loss[0]) && run.argmax[0] == 1900);
  expect("special: -infinity alone", !(run.lse[1] > -INFINITY) && run.argmax[1] == 0);
  expect("special: lse of two", std::abs(run.lse[2] - 5 - std::log(2)) < 1e-5 && run.argmax[2] == 700);
  expect("special: not the first of equals", run.argmax[4] == 0);
  expect("special: a target that is no word's", std::isnan(run.loss[5]) && std::isfinite(run.lse[5]));
  expect("special: loss of the sure token", std::abs(run.loss[6] - std::log1p(std::exp(-8))) < 2e-7);
  const float* sure = dlogits.data() + 6 * c.V;
  const double p = 1 / (1 + std::exp(8));
  expect("special: dlogits of the sure token",
         std::abs(sure[5] - run.dloss[6] * p) < 2e-7 && std::abs(sure[700] + run.dloss[6] * p) < 4e-7);
  dlogits.finish("special: dlogits");
}

template <class T>
void check_dtype(Dtype dtype, const char* type) {
  for (const Case& c : CASES) {
    const std::string name = std::string(type) + " " + std::to_string(c.N) + " x " + std::to_string(c.V);
    check_plain<T>(c, dtype, "cross_entropy " + name);
    check_pieces<T>(c, dtype, "linear_cross_entropy " + name);
  }
  check_around<T>(dtype, std::string("linear_cross_entropy ") + type);
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool) {
    check_dtype<float>(Dtype::float32, "float32");
    check_dtype<bfloat16>(Dtype::bfloat16, "bfloat16");
    check_dtype<float16>(Dtype::float16, "float16");
    check_special();
  });
}
