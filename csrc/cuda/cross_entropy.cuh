// Cross-entropy on CUDA. The mathematics: fastprimer/ops/cross_entropy.py.
//
// How tokens lie in a grid. A token has blockDim.x threads: those of a warp, and a block has blockDim.y tokens, or all of its block. They
// go along its row of numbers, from the left to the right: single ones up to an address that 16 divides, vectors of 16 bytes, single ones
// again. So rows of any length and stride move in vectors, unless what is read and what is written lie differently.
#pragma once
#include <cmath>

#include "../cross_entropy.h"
#include "device.cuh"

namespace fastprimer {

constexpr int LOSS_THREADS = 256;  // of a token at most, and of a block
constexpr int LOSS_BATCH = 4;      // loads under way at once, of each thread

template <class T>
constexpr int LOSS_VECTOR = 16 / sizeof(T);

// Calls body(vector, index of its first number) for this thread's part of `count` numbers; with W at an address of `out` that 16 divides.
template <int W, int BATCH = LOSS_BATCH, class In, class Out, class Body>
__device__ __forceinline__ void along_row(const In* in, const Out* out, int64_t count, int64_t thread, int64_t threads, Body body) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  int64_t head = (16 - address(out) % 16) % 16 / sizeof(Out);
  if (head > count || address(in + head) % 16 != 0) head = count;
  const int64_t vectors = (count - head) / W, tail = head + vectors * W;
  for (int64_t i = thread; i < head; i += threads) body(load<1>(in + i), i);
  const In* body_in = in + head;
  for (int64_t first = thread; first < vectors; first += BATCH * threads) {
    Vector<In, W> v[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++)
      if (first + b * threads < vectors) v[b] = load<W>(body_in + (first + b * threads) * W);
#pragma unroll
    for (int b = 0; b < BATCH; b++)
      if (first + b * threads < vectors) body(v[b], head + (first + b * threads) * W);
  }
  for (int64_t i = tail + thread; i < count; i += threads) body(load<1>(in + i), i);
}

// e^v, for results that are rounded to T.
template <class T>
__device__ __forceinline__ float exp_for(float v) {
  return sizeof(T) == 2 ? fast_exp(v) : expf(v);
}

// From logits to z.
struct LossCap {
  float cap, reciprocal;  // 0: none
  const float* bias;      // of these columns, or null
  bool done;              // they are z already

  // In place. What holds for all columns is asked once a vector.
  template <int W>
  __device__ __forceinline__ void apply(float (&z)[W], int64_t column) const {
    if (done) return;
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < W; i++) z[i] += bias[column + i];
    }
    if (cap > 0) {
#pragma unroll
      for (int i = 0; i < W; i++) z[i] = cap * tanhf(z[i] * reciprocal);
    }
  }
  // 1 - t^2 of t = z / cap: z times the reciprocal, whose rounding would show where t is nearly 1, corrected by what that leaves of z.
  __device__ __forceinline__ float slope(float z) const {
    const float near = z * reciprocal, t = fmaf(fmaf(-near, cap, z), reciprocal, near);
    return 1 - t * t;
  }
  __device__ __forceinline__ bool changes() const { return cap > 0 || bias != nullptr; }
};

// What every pass knows of the logits it reads: the columns from `first` on.
struct LossArgs {
  const void* logits;  // (N, width)
  int64_t stride_row, first, width;
  const float* shift;  // (N, blocks), of logits in 16 bits, which are z
  int64_t blocks;
  const int64_t* target;
  int64_t N, V, ignore_index;
  LossCap cap;

  template <class T>
  __device__ __forceinline__ const T* row(int64_t n) const {
    return static_cast<const T*>(logits) + n * stride_row;
  }
  __device__ __forceinline__ bool counts(int64_t n) const { return target[n] != ignore_index; }

  // The numbers of token n from `column` of this piece on: of a block or two, if they are in 16 bits.
  template <class T, int W>
  __device__ __forceinline__ void widen_row(const Vector<T, W>& v, int64_t n, int64_t column, float (&wide)[W]) const {
    if constexpr (std::is_same_v<T, int16_t>) {
      const float* shifts = shift + n * blocks;
      const int64_t block = (first + column) / KEPT_BLOCK, last = (first + column + W - 1) / KEPT_BLOCK;
      const float here = shifts[block], behind = shifts[last];
#pragma unroll
      for (int i = 0; i < W; i++) {
        const float steps = v.data[i] == KEPT_LOWEST ? -INFINITY : static_cast<float>(v.data[i]);
        wide[i] = steps * (1 / KEPT_STEPS) + ((first + column + i) / KEPT_BLOCK == block ? here : behind);
      }
    } else {
      widen(v, wide);
    }
  }
};

struct FoldArgs {
  LossArgs in;
  float* z;          // (N, width): where a kept piece stands, or null
  LossState* state;  // null for plain logits, which are one piece
  LossOutputs outputs;
  double label_smoothing, z_loss;
};

__device__ __forceinline__ int64_t loss_token() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// What has been seen of a token's z. `top` is NaN as soon as one z is, and so is all that comes of it.
struct Seen {
  float top, sum, total;
  int64_t argmax;  // -1: nothing above -infinity

  // In place of `top`, where that is infinite, so that a sum is 0 or infinite but not NaN.
  __device__ __forceinline__ float shift() const { return fabsf(top) == INFINITY ? 0 : top; }

  template <class T, int W>
  __device__ __forceinline__ void add(const float (&z)[W], int64_t column, bool with_total) {
    float most = z[0];
#pragma unroll
    for (int i = 1; i < W; i++) most = larger(most, z[i]);
    if (most > top || (most != most && top == top)) {
      int at = 0;
#pragma unroll
      for (int i = W - 1; i >= 0; i--) at = z[i] == most || z[i] != z[i] ? i : at;
      sum *= exp_for<T>(top - most);
      top = most;
      argmax = column + at;
    }
    const float from = shift();
#pragma unroll
    for (int i = 0; i < W; i++) sum += exp_for<T>(z[i] - from);
    if (!with_total) return;
#pragma unroll
    for (int i = 0; i < W; i++) total += z[i];
  }

  // The sum as it is for a larger `top`: of lanes once for all, for every time rounds it.
  __device__ __forceinline__ void rescale(float most) { sum *= top == most ? 1 : expf(top - most); }

  // With what was seen of other columns, both sums for the same `top`.
  __device__ __forceinline__ void add_rescaled(const Seen& other) {
    const bool first = other.argmax < 0 || (argmax >= 0 && argmax < other.argmax);
    const bool mine = top != top ? first || other.top == other.top : top > other.top || (top == other.top && first);
    sum += other.sum;
    top = mine ? top : other.top;
    argmax = mine ? argmax : other.argmax;
    total += other.total;
  }

  __device__ __forceinline__ void add(Seen other) {
    const float most = larger(top, other.top);
    rescale(most);
    other.rescale(most);
    add_rescaled(other);
  }

  __device__ __forceinline__ Seen of_lane(int distance) const {
    Seen other;
    other.top = __shfl_xor_sync(FULL_WARP, top, distance);
    other.sum = __shfl_xor_sync(FULL_WARP, sum, distance);
    other.total = __shfl_xor_sync(FULL_WARP, total, distance);
    other.argmax = __shfl_xor_sync(FULL_WARP, argmax, distance);
    return other;
  }

  // Of all threads of a token: complete in the first of them. What they wrote is seen there too.
  __device__ __forceinline__ void meet() {
    FASTPRIMER_SHARED(warps, Seen[LOSS_THREADS / 32]);
    float most = top;
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2) most = larger(most, __shfl_xor_sync(FULL_WARP, most, distance));
    rescale(most);
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2) add_rescaled(of_lane(distance));
    if (blockDim.x == 32) {
      __syncwarp();
      return;
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = *this;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned i = 1; i < blockDim.x / 32; i++) add(warps[i]);
  }
};

// By one thread: the state of token n with this piece, and after the last one the token's outputs.
template <class T>
__device__ __forceinline__ void finish_token(const FoldArgs& args, Seen seen, int64_t n) {
  const LossArgs& in = args.in;
  LossState state = {-INFINITY, 0, 0, NAN, -1};
  if (in.first > 0) state = args.state[n];
  Seen all = {state.top, state.sum, state.total, state.argmax};
  if (seen.argmax >= 0) seen.argmax += in.first;
  all.add(seen);
  const int64_t target = in.target[n] - in.first;
  if (target >= 0 && target < in.width) {  // on a GPU nobody has looked
    float z[1] = {widen(in.row<T>(n)[target])};
    if (args.z == nullptr) in.cap.apply(z, target);  // else that is z already
    state.z_target = z[0];
  }
  if (args.state != nullptr) args.state[n] = {all.top, all.sum, all.total, state.z_target, all.argmax};
  if (in.first + in.width < in.V) return;
  const double top = all.top, log_sum = log(static_cast<double>(all.sum));
  const float lse = static_cast<float>(top + log_sum);
  double loss = log_sum + (1 - args.label_smoothing) * (top - state.z_target) + args.z_loss * lse * lse;
  if (args.label_smoothing != 0) loss += args.label_smoothing * (top - all.total / static_cast<double>(in.V));
  const double part = lse - top, rounding = (lse - part - top) + (part - log_sum);  // lse - (top + log_sum), exactly
  static_cast<float*>(args.outputs.loss)[n] = static_cast<float>(loss);
  static_cast<float*>(args.outputs.lse)[n] = lse;
  static_cast<float*>(args.outputs.correction)[n] = fabsf(lse) == INFINITY ? 1 : expf(static_cast<float>(rounding));
  args.outputs.argmax[n] = all.argmax < 0 ? 0 : all.argmax;
}

// Sees a piece of the logits: moves N width elements in, and a few numbers of each token. A kept one that a bias or a cap changes is
// written once more.
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS) cross_entropy_fold(const FoldArgs args) {
  constexpr int W = LOSS_VECTOR<T>;
  const LossArgs& in = args.in;
  const int64_t n = loss_token();
  const bool here = n < in.N && in.counts(n);
  Seen seen = {-INFINITY, 0, 0, -1};
  if (here) {
    const T* row = in.row<T>(n);
    float* z_row = args.z != nullptr && in.cap.changes() ? args.z + n * in.stride_row : nullptr;
    along_row<W>(row, row, in.width, threadIdx.x, blockDim.x, [&](auto v, int64_t column) {
      constexpr int COUNT = sizeof v.data / sizeof v.data[0];
      Vector<float, COUNT> z;
      widen(v, z.data);
      in.cap.apply(z.data, column);
      seen.template add<T>(z.data, column, args.label_smoothing != 0);
      if constexpr (std::is_same_v<T, float>)
        if (z_row != nullptr) store(z_row + column, z);
    });
  } else if (n < in.N && args.z != nullptr) {
    for (int64_t i = threadIdx.x; i < in.width; i += blockDim.x) args.z[n * in.stride_row + i] = 0;
  }
  seen.meet();
  if (threadIdx.x > 0 || n >= in.N) return;
  if (here) return finish_token<T>(args, seen, n);
  if (in.first + in.width < in.V) return;
  static_cast<float*>(args.outputs.loss)[n] = 0;
  static_cast<float*>(args.outputs.lse)[n] = static_cast<float*>(args.outputs.correction)[n] = 0;
  args.outputs.argmax[n] = -1;
}

struct DlogitsArgs {
  LossArgs in;
  LossGradients gradients;
  float label_smoothing, z_loss;
  DlogitsPiece out;
};

// The gradient of one token's logits.
struct TokenGradient {
  float lse, top, uniform, share;
  int64_t target;

  __device__ __forceinline__ TokenGradient(const DlogitsArgs& args, int64_t n) {
    const auto number = [n](const void* p) { return p == nullptr ? 0 : static_cast<const float*>(p)[n]; };
    const bool exists = args.in.target[n] >= 0 && args.in.target[n] < args.in.V;  // on a GPU nobody has looked
    const float dloss = exists ? number(args.gradients.dloss) : NAN;
    lse = number(args.gradients.lse);
    top = (dloss * (1 + 2 * args.z_loss * lse) + number(args.gradients.dlse)) * number(args.gradients.correction);
    uniform = dloss * args.label_smoothing / static_cast<float>(args.in.V);
    share = dloss * (1 - args.label_smoothing);
    target = args.in.target[n] - args.in.first;
  }

  // From logits, or z, to dlogits that will be rounded to T; in place.
  template <class T, int W>
  __device__ __forceinline__ void apply(const LossCap& cap, float (&z)[W], int64_t column) const {
    cap.apply(z, column);
    float dz[W];
#pragma unroll
    for (int i = 0; i < W; i++) dz[i] = top * exp_for<T>(z[i] - lse) - uniform - (column + i == target ? share : 0);
    if (cap.cap > 0) {
#pragma unroll
      for (int i = 0; i < W; i++) dz[i] *= cap.slope(z[i]);
    }
#pragma unroll
    for (int i = 0; i < W; i++) z[i] = dz[i];
  }
};

// Moves N width elements in and as many out, and a few numbers of each token.
template <class In, class Out>
__global__ void __launch_bounds__(LOSS_THREADS) cross_entropy_dlogits(const DlogitsArgs args) {
  constexpr int W = LOSS_VECTOR<Out>;
  const LossArgs& in = args.in;
  const int64_t n = loss_token();
  if (n >= in.N) return;
  Out* out = static_cast<Out*>(args.out.dlogits) + n * args.out.stride_row;
  if (!in.counts(n)) {  // its numbers may be NaN, its dloss infinite
    along_row<W>(out, out, in.width, threadIdx.x, blockDim.x, [&](auto v, int64_t column) { store(out + whole(column), decltype(v){}); });
    return;
  }
  const TokenGradient gradient(args, n);
  const float scale = args.out.scale == nullptr ? 1 : *args.out.scale;
  along_row<W>(in.row<In>(n), out, in.width, threadIdx.x, blockDim.x, [&](auto v, int64_t column) {
    constexpr int COUNT = sizeof v.data / sizeof v.data[0];
    float dl[COUNT];
    in.widen_row(v, n, column, dl);
    gradient.template apply<Out>(in.cap, dl, column);
#pragma unroll
    for (int i = 0; i < COUNT; i++) dl[i] *= scale;
    store(out + whole(column), narrow<Out>(dl));
  });
}

constexpr int DBIAS_LINES = 8;  // of 32 columns in a block
constexpr int DBIAS_RUN = 16;   // tokens that a line adds up before it adds their sum

// The sums of dlogits' columns, before they are rounded: computed once more. Line i adds tokens i, i + DBIAS_LINES, ..., and one thread a
// column the lines: always the same order. Moves N width numbers in.
template <class In>
__global__ void __launch_bounds__(32 * DBIAS_LINES) cross_entropy_dbias(const DlogitsArgs args) {
  FASTPRIMER_SHARED(lines, float[DBIAS_LINES][32]);
  const LossArgs& in = args.in;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0;
  for (int64_t first = threadIdx.y; first < in.N && column < in.width; first += DBIAS_LINES * DBIAS_RUN) {
    float run = 0;
    for (int64_t n = first; n < in.N && n < first + DBIAS_LINES * DBIAS_RUN; n += DBIAS_LINES) {
      if (!in.counts(n)) continue;
      float dl[1];
      in.widen_row(load<1>(in.row<In>(n) + column), n, column, dl);
      TokenGradient(args, n).apply<float>(in.cap, dl, column);
      run += dl[0];
    }
    sum += run;
  }
  lines[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= in.width) return;
  for (int i = 1; i < DBIAS_LINES; i++) sum += lines[i][threadIdx.x];
  args.out.dbias[column] = sum;
}

}  // namespace fastprimer
