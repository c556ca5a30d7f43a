// RoPE's CUDA kernels (csrc/cuda/rope.cu) against float64, through the interface of csrc/rope.h.
#include "check.h"
#include "rope.h"

namespace {

using namespace check;
using fastprimer::Cuda;
using fastprimer::Dtype;
using fastprimer::RopeHeads;

// How q and k lie in memory: (B, S, heads, D), heads before tokens, or one sequence that stands for all.
enum class Layout { tokens_first, heads_first, expanded };

struct Case {
  int B, S, H, Hk, D, R;
  Layout layout = Layout::tokens_first;
  int more = 0;        // how much further apart than D the heads of q are; of k 16 more
  int offset = 0;      // of q and k from a 16-byte boundary
  int more_table = 0;  // how much further apart than R / 2 the rows of cos and sin are
  bool wide = true;    // the tables are float32, else of q's type
  int positions = 0;   // 32 or 64 bits; 0: none
  bool both = true;    // both pairings, else half-split alone
  bool quick = false;
};

const Case CASES[] = {
    {.B = 1, .S = 1, .H = 1, .Hk = 1, .D = 2, .R = 2, .quick = true},                                               // one pair
    {.B = 2, .S = 5, .H = 4, .Hk = 2, .D = 64, .R = 64, .quick = true},                                             // tokens share a block
    {.B = 2, .S = 3, .H = 3, .Hk = 1, .D = 23, .R = 6, .positions = 32, .quick = true},                             // odd
    {.B = 3, .S = 4, .H = 3, .Hk = 2, .D = 48, .R = 32, .wide = false, .positions = 64, .quick = true},             // a rest of vectors
    {.B = 1, .S = 4, .H = 9, .Hk = 1, .D = 32, .R = 24, .wide = false, .quick = true},                              // 12 pairs
    {.B = 2, .S = 3, .H = 2, .Hk = 2, .D = 32, .R = 16, .more = 2, .quick = true},                                  // strides not aligned
    {.B = 1, .S = 3, .H = 2, .Hk = 1, .D = 32, .R = 32, .offset = 1, .quick = true},                                // pointers not aligned
    {.B = 1, .S = 3, .H = 2, .Hk = 1, .D = 32, .R = 32, .more_table = 1, .wide = false, .quick = true},             // tables not aligned
    {.B = 2, .S = 3, .H = 5, .Hk = 2, .D = 32, .R = 32, .layout = Layout::heads_first, .more = 16, .quick = true},  // other strides
    {.B = 3, .S = 2, .H = 2, .Hk = 1, .D = 32, .R = 32, .layout = Layout::expanded, .quick = true},                 // stride 0
    {.B = 1, .S = 1, .H = 128, .Hk = 8, .D = 64, .R = 64, .positions = 64, .both = false, .quick = true},           // blocks share a token
    {.B = 2, .S = 9, .H = 3, .Hk = 0, .D = 64, .R = 32},                                                            // q alone
    {.B = 2, .S = 600, .H = 5, .Hk = 2, .D = 16, .R = 16, .positions = 32},    // several heads a thread
    {.B = 1, .S = 40, .H = 40, .Hk = 8, .D = 256, .R = 192},                   // several times
    {.B = 1, .S = 2, .H = 2, .Hk = 1, .D = 1030, .R = 1026},                   // more units than threads
    {.B = 2, .S = 150, .H = 2, .Hk = 1, .D = 514, .R = 514, .positions = 64},  // more tokens than a grid
};

// q or k: `more` further apart than D are its heads.
template <class T>
struct Heads {
  const char* name;
  int heads;
  int64_t stride_batch, stride_token, stride_head;
  Buffer<T> x, rotated;

  Heads(const char* name, const Case& c, int heads, int more)
      : name(name),
        heads(heads),
        stride_batch(c.layout == Layout::expanded ? 0 : static_cast<int64_t>(c.S) * heads * (c.D + more)),
        stride_token((c.layout == Layout::heads_first ? 1 : heads) * (c.D + more)),
        stride_head((c.layout == Layout::heads_first ? c.S : 1) * (c.D + more)),
        x(heads == 0 ? 0 : (c.B - 1) * stride_batch + (c.S - 1) * stride_token + (heads - 1) * stride_head + c.D, c.offset),
        rotated(static_cast<size_t>(c.B) * c.S * heads * c.D) {}

  RopeHeads arguments() {
    if (heads == 0) return {};
    return {.x = x.data(),
            .stride_batch = stride_batch,
            .stride_token = stride_token,
            .stride_head = stride_head,
            .rotated = rotated.data(),
            .heads = heads};
  }
};

template <class T, class W>
class Check {
 public:
  Check(const Case& c, Dtype dtype, Dtype table_dtype, bool interleaved, bool inverse, const std::string& name)
      : c_(c),
        dtype_(dtype),
        table_dtype_(table_dtype),
        interleaved_(interleaved),
        inverse_(inverse),
        name_(name),
        stride_table_(c.R / 2 + c.more_table),
        random_(c.S + c.D),
        q_("q", c, c.H, c.more),
        k_("k", c, c.Hk, c.more + 16),
        cos_((P - 1) * stride_table_ + c.R / 2),
        sin_((P - 1) * stride_table_ + c.R / 2),
        narrow_positions_(c.positions == 32 ? c.B * c.S : 0),
        wide_positions_(c.positions == 64 ? c.B * c.S : 0) {
    randomize(q_.x, random_);
    randomize(k_.x, random_);
    randomize(cos_, random_);
    randomize(sin_, random_);
    for (int i = 0; i < c.B * c.S; i++) {
      const int64_t outside[] = {-1, P, c.positions == 64 ? int64_t{1} << 33 : -2147483647};
      const int64_t position = i % 5 == 4 ? outside[i / 5 % 3] : static_cast<int64_t>(random_() % P);
      if (c.positions == 32) narrow_positions_[i] = static_cast<int32_t>(position);
      if (c.positions == 64) wide_positions_[i] = position;
    }
  }

  void run() {
    if (const char* error = launch()) return fail(name_ + ": " + error);
    const int before = failures;
    for (Heads<T>* heads : {&q_, &k_}) {
      for (int i = 0; i < c_.B * c_.S * heads->heads && failures == before; i++) {
        check_head(*heads, i / heads->heads / c_.S, i / heads->heads % c_.S, i % heads->heads);
      }
      heads->rotated.finish(name_ + ": " + heads->name);
    }
  }

 private:
  static constexpr int P = 700;

  // Positions lie with the tokens outside, so that neither of their strides is that of contiguous ones.
  const char* launch() {
    const void* positions = c_.positions == 32 ? static_cast<const void*>(narrow_positions_.data()) : wide_positions_.data();
    return fastprimer::rope(Cuda{}, {.q = q_.arguments(),
                                     .k = k_.arguments(),
                                     .cos = cos_.data(),
                                     .stride_cos_row = stride_table_,
                                     .sin = sin_.data(),
                                     .stride_sin_row = stride_table_,
                                     .positions = c_.positions == 0 ? nullptr : positions,
                                     .stride_positions_batch = c_.positions == 0 ? 0 : 1,
                                     .stride_positions_token = c_.positions == 0 ? 0 : c_.B,
                                     .positions_are_64_bit = c_.positions == 64,
                                     .B = c_.B,
                                     .S = c_.S,
                                     .D = c_.D,
                                     .R = c_.R,
                                     .P = P,
                                     .dtype = dtype_,
                                     .table_dtype = table_dtype_,
                                     .interleaved = interleaved_,
                                     .inverse = inverse_});
  }

  int64_t position(int b, int s) {
    if (c_.positions == 0) return s;
    return c_.positions == 32 ? narrow_positions_[s * c_.B + b] : wide_positions_[s * c_.B + b];
  }

  void check_head(Heads<T>& heads, int b, int s, int h) {
    const T* x = heads.x.data() + b * heads.stride_batch + s * heads.stride_token + h * heads.stride_head;
    const T* rotated = heads.rotated.data() + ((static_cast<int64_t>(b) * c_.S + s) * heads.heads + h) * c_.D;
    const int64_t row = position(b, s);
    for (int pair = 0; pair < c_.R / 2; pair++) {
      const int i = interleaved_ ? 2 * pair : pair, j = interleaved_ ? i + 1 : i + c_.R / 2;
      if (row < 0 || row >= P) {
        if (!std::isnan(widen(rotated[i])) || !std::isnan(widen(rotated[j]))) return fail(name_ + ": " + heads.name + " is not NaN");
        continue;
      }
      const double x_i = widen(x[i]), x_j = widen(x[j]), cos = widen(cos_[row * stride_table_ + pair]);
      const double sin = widen(sin_[row * stride_table_ + pair]) * (inverse_ ? -1 : 1);
      if (!close(rotated[i], x_i * cos - x_j * sin, std::abs(x_i * cos) + std::abs(x_j * sin)) ||
          !close(rotated[j], x_i * sin + x_j * cos, std::abs(x_i * sin) + std::abs(x_j * cos))) {
        return fail(name_ + ": " + heads.name + " is wrong");
      }
    }
    if (std::memcmp(x + c_.R, rotated + c_.R, (c_.D - c_.R) * sizeof(T)) != 0) fail(name_ + ": " + heads.name + " is not a copy");
  }

  const Case& c_;
  Dtype dtype_, table_dtype_;
  bool interleaved_, inverse_;
  std::string name_;
  int64_t stride_table_;
  std::mt19937 random_;
  Heads<T> q_, k_;
  Buffer<W> cos_, sin_;
  Buffer<int32_t> narrow_positions_;
  Buffer<int64_t> wide_positions_;
};

template <class T>
void check_dtype(Dtype dtype, const char* type, bool quick) {
  bool inverse = false;
  for (const Case& c : CASES) {
    if (quick && !c.quick) continue;
    for (bool interleaved : {false, true}) {
      if (interleaved && !c.both) continue;
      inverse = !inverse;
      const std::string name = std::string("rope ") + type + (interleaved ? " interleaved " : " ") + std::to_string(c.B) + " x " +
                               std::to_string(c.S) + " x (" + std::to_string(c.H) + " + " + std::to_string(c.Hk) + ") x " +
                               std::to_string(c.D);
      if (c.wide) {
        Check<T, float>(c, dtype, Dtype::float32, interleaved, inverse, name).run();
      } else {
        Check<T, T>(c, dtype, dtype, interleaved, inverse, name).run();
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool quick) {
    check_dtype<float>(Dtype::float32, "float32", quick);
    check_dtype<bfloat16>(Dtype::bfloat16, "bfloat16", quick);
    check_dtype<float16>(Dtype::float16, "float16", quick);
  });
}
