// Decoding's CUDA kernels (csrc/cuda/decoding.cu) against float64, through the interface of csrc/decoding.h.
#include "check.h"
#include "decoding.h"

namespace {

using namespace check;
using fastprimer::Cuda;
using fastprimer::Decoding;
using fastprimer::Dtype;

constexpr int ANY = fastprimer::AttentionProblem::UNLIMITED;

struct Case {
  std::vector<int> cached;  // tokens of each sequence
  int S, H, Hk, D, Dv;
  int page = 0;  // tokens; 0: contiguous caches
  bool append = true;
  int left = ANY, right = 0;
  double softcap = 0, scale = 0.3;
  bool sinks = false;
  int more = 0, offset = 0;  // how much further apart than contiguous the tokens are; from a 16-byte boundary
  bool nan_value = false;    // of the last token, which all queries but the last do not see
  bool wild = false;         // lengths and pages are beyond what there is: nothing is promised but that memory is safe
  bool quick = false;
};

const Case CASES[] = {
    {.cached = {5, 0, 17}, .S = 1, .H = 4, .Hk = 2, .D = 16, .Dv = 16, .quick = true},
    {.cached = {300, 70}, .S = 1, .H = 3, .Hk = 1, .D = 64, .Dv = 64, .sinks = true, .quick = true},        // splits
    {.cached = {40, 3}, .S = 4, .H = 4, .Hk = 2, .D = 24, .Dv = 40, .page = 16, .left = 9, .quick = true},  // a window
    {.cached = {70, 20}, .S = 16, .H = 2, .Hk = 1, .D = 32, .Dv = 32, .left = 2, .quick = true},            // no key seen by all
    {.cached = {20, 1}, .S = 3, .H = 2, .Hk = 2, .D = 20, .Dv = 9, .append = false, .right = ANY, .more = 3, .offset = 1, .quick = true},
    {.cached = {0, 1}, .S = 2, .H = 2, .Hk = 1, .D = 16, .Dv = 16, .append = false, .sinks = true, .quick = true},   // rows without keys
    {.cached = {30}, .S = 3, .H = 2, .Hk = 1, .D = 16, .Dv = 16, .softcap = 0.7, .nan_value = true, .quick = true},  // NaN in one value
    {.cached = {200, 9, -4}, .S = 2, .H = 2, .Hk = 1, .D = 16, .Dv = 16, .page = 16, .wild = true, .quick = true},
    {.cached = {600, 0, 64}, .S = 5, .H = 8, .Hk = 2, .D = 64, .Dv = 64, .page = 64},  // two tiles of rows
    {.cached = {530}, .S = 16, .H = 5, .Hk = 1, .D = 128, .Dv = 80, .page = 32, .left = 300, .sinks = true},
    {.cached = {280, 33}, .S = 2, .H = 4, .Hk = 2, .D = 256, .Dv = 256, .right = ANY, .softcap = 5},
    {.cached = {140}, .S = 9, .H = 4, .Hk = 2, .D = 136, .Dv = 64, .left = 100, .right = 3, .more = 8},
};

// (B, tokens, heads, features), the tokens `more` further apart than that.
template <class T>
struct Tensor {
  int64_t tokens, heads, features, stride_token;
  Buffer<T> data;

  Tensor(int64_t B, int64_t tokens, int64_t heads, int64_t features, const Case& c)
      : tokens(tokens),
        heads(heads),
        features(features),
        stride_token(heads * features + c.more),
        data((B * tokens - 1) * stride_token + heads * features, c.offset) {}

  T& at(int64_t b, int64_t i, int64_t h, int64_t d) { return data[(b * tokens + i) * stride_token + h * features + d]; }
  fastprimer::Heads heads_of() { return {data.data(), tokens * stride_token, stride_token, features}; }
};

template <class T>
class Check {
 public:
  Check(const Case& c, Dtype dtype, const std::string& name)
      : c_(c),
        dtype_(dtype),
        name_(name),
        B_(static_cast<int>(c.cached.size())),
        room_(c.wild ? 30 : *std::max_element(c.cached.begin(), c.cached.end()) + c.S),
        pages_of_sequence_(c.page ? (room_ + c.page - 1) / c.page : 1),
        random_(c.cached[0] + c.D),
        q_(B_, c.S, c.H, c.D, c),
        k_(B_, c.S, c.Hk, c.D, c),
        v_(B_, c.S, c.Hk, c.Dv, c),
        k_cache_(pages(), c.page ? c.page : room_, c.Hk, c.D, c),
        v_cache_(pages(), c.page ? c.page : room_, c.Hk, c.Dv, c),
        o_(static_cast<size_t>(B_) * c.S * c.H * c.Dv),
        lse_(static_cast<size_t>(B_) * c.S * c.H),
        sinks_(c.H),
        cached_(B_),
        block_table_(static_cast<size_t>(B_) * pages_of_sequence_) {
    for (Tensor<T>* x : {&q_, &k_, &v_}) randomize(x->data, random_);
    randomize(sinks_, random_);
    for (int b = 0; b < B_; b++) {
      cached_[b] = c.cached[b];
      for (int n = 0; n < pages_of_sequence_; n++) {  // behind the last page lies anything
        const bool used = !c.wild && n * c.page < length(b);
        block_table_[b * pages_of_sequence_ + n] = used ? (B_ - 1 - b) * pages_of_sequence_ + n : n % 2 ? -7 : 1000000;
      }
    }
    if (c.nan_value) v_.at(0, c.S - 1, 0, 0) = narrow<T>(NAN);
    if (!c.wild) fill_caches();
  }

  void run() {
    emulator::bank_conflicts = 0;
    Decoding args = arguments();
    Buffer<float> workspace(decoding_workspace(Cuda{}, args));
    args.workspace = workspace.data();
    if (const char* error = decoding(Cuda{}, args)) return fail(name_ + ": " + error);
    const int before = failures;
    for (int b = 0; b < B_ && !c_.wild; b++) {
      if (failures == before) check_appended(b);
      for (int i = 0; i < c_.S; i++) {
        for (int h = 0; h < c_.H; h++) {
          if (failures == before) check_row(b, i, h);
        }
      }
    }
    o_.finish(name_ + ": o");
    lse_.finish(name_ + ": lse");
    k_cache_.data.finish(name_ + ": k_cache");
    v_cache_.data.finish(name_ + ": v_cache");
    workspace.finish(name_ + ": workspace");
    if (emulator::bank_conflicts != 0) fail(name_ + ": bank conflicts: " + std::to_string(emulator::bank_conflicts));
  }

 private:
  int64_t pages() const { return B_ * pages_of_sequence_; }
  int length(int b) const { return c_.cached[b] + (c_.append ? c_.S : 0); }
  // Key j of sequence b, in a cache.
  T& key(Tensor<T>& cache, int b, int j, int h, int d) {
    if (!c_.page) return cache.at(b, j, h, d);
    return cache.at(block_table_[b * pages_of_sequence_ + j / c_.page], j % c_.page, h, d);
  }

  // Only what some query sees: all else stays NaN.
  void fill_caches() {
    std::normal_distribution<float> normal;
    for (int b = 0; b < B_; b++) {
      for (int j = c_.left == ANY ? 0 : std::max(0, length(b) - c_.S - c_.left); j < c_.cached[b]; j++) {
        for (int h = 0; h < c_.Hk; h++) {
          for (int d = 0; d < c_.D; d++) key(k_cache_, b, j, h, d) = narrow<T>(normal(random_));
          for (int d = 0; d < c_.Dv; d++) key(v_cache_, b, j, h, d) = narrow<T>(normal(random_));
        }
      }
    }
  }

  Decoding arguments() {
    return {.q = q_.heads_of(),
            .k = c_.append ? k_.heads_of() : fastprimer::Heads{},
            .v = c_.append ? v_.heads_of() : fastprimer::Heads{},
            .k_cache = k_cache_.heads_of(),
            .v_cache = v_cache_.heads_of(),
            .cache_seqlens = cached_.data(),
            .block_table = c_.page ? block_table_.data() : nullptr,
            .pages = pages(),
            .page_size = k_cache_.tokens,
            .pages_of_sequence = pages_of_sequence_,
            .room = k_cache_.tokens * pages_of_sequence_,
            .appended = c_.append ? c_.S : 0,
            .sinks = c_.sinks ? sinks_.data() : nullptr,
            .B = B_,
            .S = c_.S,
            .H = c_.H,
            .Hk = c_.Hk,
            .D = c_.D,
            .Dv = c_.Dv,
            .left = c_.left,
            .right = c_.right,
            .scale = c_.scale,
            .softcap = c_.softcap,
            .dtype = dtype_,
            .o = o_.data(),
            .lse = lse_.data(),
            .workspace = nullptr};
  }

  void check_appended(int b) {
    const auto differs = [](T x, T y) { return std::memcmp(&x, &y, sizeof x) != 0; };
    for (int i = 0; i < c_.S && c_.append; i++) {
      for (int h = 0; h < c_.Hk; h++) {
        bool wrong = false;
        for (int d = 0; d < c_.D; d++) wrong = wrong || differs(key(k_cache_, b, c_.cached[b] + i, h, d), k_.at(b, i, h, d));
        for (int d = 0; d < c_.Dv; d++) wrong = wrong || differs(key(v_cache_, b, c_.cached[b] + i, h, d), v_.at(b, i, h, d));
        if (wrong) return fail(name_ + ": a new token is not in the cache");
      }
    }
  }

  void check_row(int b, int i, int h) {
    const int hk = h / (c_.H / c_.Hk), T_b = length(b), position = T_b - c_.S + i;
    const int first = c_.left == ANY ? 0 : std::max(0, position - c_.left),
              end = c_.right == ANY ? T_b : std::min(T_b, position + c_.right + 1);
    std::vector<double> z, o(c_.Dv), terms(c_.Dv);
    double top = c_.sinks ? sinks_[h] : -INFINITY, score_terms = 0;
    for (int j = first; j < end; j++) {
      double s = 0, size = 0;
      for (int d = 0; d < c_.D; d++) {
        const double term = c_.scale * widen(q_.at(b, i, h, d)) * widen(key(k_cache_, b, j, hk, d));
        s += term;
        size += std::abs(term);
      }
      z.push_back(c_.softcap > 0 ? c_.softcap * std::tanh(s / c_.softcap) : s);
      top = std::max(top, z.back());
      score_terms = std::max(score_terms, size);
    }
    double total = c_.sinks ? std::exp(sinks_[h] - top) : 0;
    for (double logit : z) total += std::exp(logit - top);
    const double truth = top == -INFINITY ? -INFINITY : top + std::log(total);
    const float lse = lse_[(b * c_.H + h) * c_.S + i];
    if (lse != truth && !close(lse, truth, 1 + score_terms)) return fail(name_ + ": lse is wrong");
    for (int j = first; j < end; j++) {
      for (int d = 0; d < c_.Dv; d++) {
        const double term = std::exp(z[j - first] - truth) * widen(key(v_cache_, b, j, hk, d));
        o[d] += term;
        terms[d] += std::abs(term);
      }
    }
    for (int d = 0; d < c_.Dv; d++) {
      if (!near(o_[((b * c_.S + i) * c_.H + h) * c_.Dv + d], o[d], terms[d], score_terms)) return fail(name_ + ": o is wrong");
    }
  }

  const Case& c_;
  Dtype dtype_;
  std::string name_;
  int B_, room_, pages_of_sequence_;
  std::mt19937 random_;
  Tensor<T> q_, k_, v_, k_cache_, v_cache_;
  Buffer<T> o_;
  Buffer<float> lse_, sinks_;
  Buffer<int32_t> cached_, block_table_;
};

template <class T>
void check_dtype(Dtype dtype, const char* type, bool quick) {
  for (const Case& c : CASES) {
    if (quick && !c.quick) continue;
    const std::string name = std::string("decoding ") + type + " " + std::to_string(c.S) + " after " + std::to_string(c.cached[0]) +
                             " x (" + std::to_string(c.H) + " : " + std::to_string(c.Hk) + ") x " + std::to_string(c.D);
    Check<T>(c, dtype, name).run();
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
