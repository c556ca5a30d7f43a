// The mixture of experts on CUDA: which kernels serve a call, in what shape, and where they leave what to each other.
#include <algorithm>

#include "moe_backward.cuh"

namespace fastprimer {
namespace {

constexpr int64_t MOST = 1 << 30;        // pairs, and features of a row
constexpr int64_t LARGE_TILE_ROWS = 64;  // rows an expert, on average, that are worth a tile of 128
constexpr int64_t LEAST_CHUNK = 256;     // pairs that are worth a warp of moe_count
constexpr int64_t MOST_CHUNKS = 256;     // then they become larger

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned_row(int64_t features) { return divided(features, 8) * 8; }

// Hands out scratch memory, piece by piece; without any (null) it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  void* take(int64_t bytes) {
    void* piece = memory_ == nullptr ? nullptr : memory_ + size_;
    size_ += divided(bytes, 256) * 256;
    return piece;
  }
  template <class T>
  void take(T*& piece, int64_t count) {
    piece = static_cast<T*>(take(count * static_cast<int64_t>(sizeof(T))));
  }

  int64_t size() const { return size_; }

 private:
  unsigned char* memory_;
  int64_t size_ = 0;
};

bool large(const MoeProblem& problem) { return problem.dtype != Dtype::float32 && problem.N * problem.K >= LARGE_TILE_ROWS * problem.E; }
int64_t element_size(const MoeProblem& problem) { return problem.dtype == Dtype::float32 ? 4 : 2; }
int row_bits(const MoeProblem& problem) { return large(problem) ? 7 : 6; }  // tiles of 128 or 64 rows

MoeDispatch dispatch_of(const MoeProblem& problem, Scratch& scratch) {
  const int64_t pairs = problem.N * problem.K, E = problem.E;
  MoeDispatch at = {};
  at.pairs = static_cast<int>(pairs);
  at.E = static_cast<int>(E);
  at.K = static_cast<int>(problem.K);
  at.chunk = static_cast<int>(std::max(LEAST_CHUNK, divided(divided(pairs, MOST_CHUNKS), 32) * 32));
  at.chunks = static_cast<int>(divided(pairs, at.chunk));
  at.row_bits = row_bits(problem);
  at.tiles = static_cast<int>((pairs >> at.row_bits) + std::min(E, pairs));
  scratch.take(at.counts, E * at.chunks);
  scratch.take(at.begins, E + 1);
  scratch.take(at.tile_expert, at.tiles);
  scratch.take(at.tile_begin, at.tiles);
  scratch.take(at.pair_at, pairs);
  scratch.take(at.token_at, pairs);
  scratch.take(at.place_of, pairs);
  return at;
}

MoeForwardScratch forward_of(const MoeProblem& problem, Scratch& scratch) {
  MoeForwardScratch piece = {};
  piece.stride_u = aligned_row(problem.F);
  piece.stride_z = aligned_row(problem.C);
  piece.u = scratch.take(problem.N * problem.K * piece.stride_u * element_size(problem));
  piece.z = scratch.take(problem.N * problem.K * piece.stride_z * element_size(problem));
  return piece;
}

MoeBackwardScratch backward_of(const MoeProblem& problem, Scratch& scratch) {
  const int64_t pairs = problem.N * problem.K, size = element_size(problem);
  MoeBackwardScratch piece = {};
  piece.stride_dhidden = aligned_row(2 * problem.F);
  piece.stride_wu = aligned_row(problem.F);
  piece.stride_dx = aligned_row(problem.C);
  piece.dhidden = scratch.take(pairs * piece.stride_dhidden * size);
  piece.wu = scratch.take(pairs * piece.stride_wu * size);
  piece.dx = scratch.take(pairs * piece.stride_dx * size);
  scratch.take(piece.dots, divided(problem.F, 1 << row_bits(problem)) * pairs);
  return piece;
}

Error unsupported(const MoeProblem& problem) {
  if (problem.E > MOE_MOST_EXPERTS) return "more than 8192 experts are not supported";
  if (problem.N * problem.K >= MOST || problem.C >= MOST || problem.F >= MOST / 2) return "2^30 pairs or features are not supported";
  return nullptr;
}

// Calls launch(T{}, LARGE) with the element type and the size of tiles.
template <class Launch>
Error by_shape(const MoeProblem& problem, Launch launch) {
  if (Error error = unsupported(problem)) return error;
  return by_dtype(problem.dtype, [&](auto element) -> Error {
    if constexpr (sizeof(element) == 2) {
      if (large(problem)) return launch(element, std::true_type{});
    }
    return launch(element, std::false_type{});
  });
}

template <class... Parameters, class... Arguments>
Error launch_blocks(void (*kernel)(Parameters...), Cuda device, int64_t blocks, int threads, size_t shared, const Arguments&... arguments) {
  if (blocks > 0x7FFFFFFF) return "too many tokens, features and experts for one launch";
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared, device, arguments...);
}

Error dispatch(Cuda device, const MoeProblem& problem, const MoeDispatch& at, void* hidden) {
  const size_t counters = at.E * sizeof(int);
  const int64_t hidden_row = problem.F * element_size(problem);  // 2 F elements, in 16 bits
  if (Error error = launch_blocks(moe_count, device, at.chunks, 32, counters, at, problem.experts)) return error;
  if (Error error = launch_blocks(moe_places, device, divided(at.E, PLACES_THREADS / 32), PLACES_THREADS, 0, at)) return error;
  if (Error error = launch_blocks(moe_offsets, device, 1, OFFSETS_THREADS, counters + sizeof(int), at)) return error;
  return launch_blocks(moe_scatter, device, at.chunks, 32, counters, at, problem.experts, static_cast<uint16_t*>(hidden), hidden_row);
}

template <class T>
Error combine(Cuda device, const MoeProblem& problem, const MoeDispatch& at, const void* rows, int64_t stride, void* out, bool wide) {
  const int C = static_cast<int>(problem.C);
  return launch_blocks(moe_combine<T>, device, divided(problem.N * divided(C, 8), COMBINE_THREADS), COMBINE_THREADS, 0, at, rows, stride,
                       out, problem.N, C, wide);
}

// Whether rows may be read in accesses of 16 bytes, or written eight numbers at a time.
template <class T>
bool wide(const void* p, int64_t stride, int64_t other_stride = 0) {
  return aligned<T, CHUNK<T>>(p, stride) && aligned<T, CHUNK<T>>(p, other_stride);
}

}  // namespace

int64_t moe_forward_scratch(Cuda, const MoeProblem& problem) {
  if (unsupported(problem)) return 0;
  Scratch scratch(nullptr);
  dispatch_of(problem, scratch);
  forward_of(problem, scratch);
  return scratch.size();
}

int64_t moe_backward_scratch(Cuda, const MoeProblem& problem) {
  if (unsupported(problem)) return 0;
  Scratch scratch(nullptr);
  dispatch_of(problem, scratch);
  backward_of(problem, scratch);
  return scratch.size();
}

Error moe_forward(Cuda device, const MoeForward& args) {
  const MoeProblem& problem = args.problem;
  return by_shape(problem, [&](auto element, auto large) -> Error {
    using T = decltype(element);
    constexpr bool LARGE = decltype(large)::value;
    using Shape = GemmShape<T, LARGE>;
    Scratch memory(args.scratch);
    const MoeDispatch at = dispatch_of(problem, memory);
    MoeForwardScratch scratch = forward_of(problem, memory);
    scratch.wide_x = wide<T>(problem.x, problem.stride_x_row);
    scratch.wide_gate_up = wide<T>(problem.gate_up, problem.stride_gate_up_row, problem.stride_gate_up_expert);
    scratch.wide_down = wide<T>(problem.down, problem.stride_down_row, problem.stride_down_expert);
    scratch.wide_hidden = wide<T>(args.hidden, problem.F);
    const int64_t across = divided(problem.F, Shape::COLUMNS / 2), across_C = divided(problem.C, Shape::COLUMNS);
    if (Error error = dispatch(device, problem, at, args.hidden)) return error;
    if (Error error = launch_blocks(moe_hidden<T, LARGE>, device, at.tiles * across, Shape::THREADS, Shape::SHARED, args, at, scratch)) {
      return error;
    }
    if (Error error = launch_blocks(moe_down<T, LARGE>, device, at.tiles * across_C, Shape::THREADS, Shape::SHARED, args, at, scratch)) {
      return error;
    }
    return combine<T>(device, problem, at, scratch.z, scratch.stride_z, args.y, wide<T>(args.y, problem.C));
  });
}

Error moe_backward(Cuda device, const MoeBackward& args) {
  const MoeProblem& problem = args.problem;
  return by_shape(problem, [&](auto element, auto large) -> Error {
    using T = decltype(element);
    constexpr bool LARGE = decltype(large)::value;
    using Shape = GemmShape<T, LARGE>;
    Scratch memory(args.scratch);
    const MoeDispatch at = dispatch_of(problem, memory);
    MoeBackwardScratch scratch = backward_of(problem, memory);
    const int64_t C = problem.C, F = problem.F;
    scratch.wide_dy = wide<T>(args.dy, args.stride_dy_row);
    scratch.wide_gate_up = wide<T>(problem.gate_up, problem.stride_gate_up_row, problem.stride_gate_up_expert);
    scratch.wide_down = wide<T>(problem.down, problem.stride_down_row, problem.stride_down_expert);
    scratch.wide_hidden = wide<T>(args.hidden, F);
    scratch.wide_dhidden = wide<T>(scratch.dhidden, F);
    const MoeOuter dgate_up = {scratch.dhidden,
                               problem.x,
                               scratch.stride_dhidden,
                               problem.stride_x_row,
                               false,
                               true,
                               true,
                               wide<T>(problem.x, problem.stride_x_row),
                               wide<T>(args.dgate_up, C),
                               static_cast<int>(2 * F),
                               static_cast<int>(C),
                               args.dgate_up};
    const MoeOuter ddown = {args.dy,
                            scratch.wu,
                            args.stride_dy_row,
                            scratch.stride_wu,
                            true,
                            false,
                            scratch.wide_dy,
                            true,
                            wide<T>(args.ddown, F),
                            static_cast<int>(C),
                            static_cast<int>(F),
                            args.ddown};
    const int64_t across = divided(F, Shape::COLUMNS), across_C = divided(C, Shape::COLUMNS);
    const auto launch_tiles = [&](auto kernel, int64_t tiles, const auto&... arguments) {
      return launch_blocks(kernel, device, tiles, Shape::THREADS, Shape::SHARED, arguments...);
    };
    if (Error error = dispatch(device, problem, at, nullptr)) return error;
    if (Error error = launch_tiles(moe_dhidden<T, LARGE>, at.tiles * across, args, at, scratch)) return error;
    if (args.dgate_up) {
      if (Error error = launch_tiles(moe_dexperts<T, LARGE>, problem.E * divided(2 * F, Shape::ROWS) * across_C, at, dgate_up))
        return error;
      if (Error error = launch_tiles(moe_dexperts<T, LARGE>, problem.E * across_C * across, at, ddown)) return error;
    }
    if (Error error = launch_blocks(moe_dweights, device, divided(at.pairs, COMBINE_THREADS), COMBINE_THREADS, 0, at,
                                    static_cast<const float*>(scratch.dots), static_cast<int>(across), args.dweights)) {
      return error;
    }
    if (args.dx == nullptr) return nullptr;
    if (Error error = launch_tiles(moe_dx<T, LARGE>, at.tiles * across_C, args, at, scratch)) return error;
    return combine<T>(device, problem, at, scratch.dx, scratch.stride_dx, args.dx, wide<T>(args.dx, C));
  });
}

}  // namespace fastprimer
