// Attention's CUDA kernels (csrc/cuda/attention*.cu) against float64, through the interface of csrc/attention.h.
#pragma once
#include "attention.h"
#include "check.h"

namespace check {

using fastprimer::AttentionProblem;
using fastprimer::Cuda;
using fastprimer::Dtype;

constexpr int ANY = AttentionProblem::UNLIMITED;

struct Case {
  std::vector<int> S, T;  // of each sequence
  int H, Hk, D, Dv;
  bool packed = false;
  int left = ANY, right = ANY;
  double softcap = 0, scale = 0.3;
  bool sinks = false, dlse = true;
  int more = 0, offset = 0;  // how much further apart than contiguous the tokens of q, k, v, do are; from a 16-byte boundary
  int nan_sequence = -1;     // whose queries, keys, values and do are NaN and infinite
  int nan_key = -1;          // of every sequence, whose k is NaN
  bool quick = false;
};

// (B, tokens, heads, features), or packed; `more` further apart than that.
template <class T>
struct Tensor {
  std::vector<int> first;  // token of each sequence
  int heads, features;
  int64_t stride_token, stride_batch;
  Buffer<T> data;

  Tensor(const Case& c, const std::vector<int>& lengths, int heads, int features, int more, int offset)
      : first(1, 0),
        heads(heads),
        features(features),
        stride_token(heads * features + more),
        stride_batch(c.packed ? 0 : stride_token * lengths[0]),
        data((first_tokens(lengths) - 1) * stride_token + heads * features, offset) {}

  size_t index(int b, int i, int h, int d) const { return (first[b] + i) * stride_token + h * features + d; }
  T& at(int b, int i, int h, int d) { return data[index(b, i, h, d)]; }
  fastprimer::Heads heads_of() { return {data.data(), stride_batch, stride_token, features}; }

 private:
  int64_t first_tokens(const std::vector<int>& lengths) {
    for (int length : lengths) first.push_back(first.back() + length);
    return first.back();
  }
};

// What one query head has in float64.
struct Row {
  double lse = -INFINITY;
  double score_terms = 0;    // the largest sum of the sizes of a score's terms
  std::vector<double> p, z;  // by key; 0 where it is not visible
};

template <class T>
class Check {
 public:
  Check(const Case& c, Dtype dtype, const std::string& name)
      : c_(c),
        dtype_(dtype),
        name_(name),
        sequences_(static_cast<int>(c.S.size())),
        random_(c.S[0] + c.D),
        q_(c, c.S, c.H, c.D, c.more, c.offset),
        k_(c, c.T, c.Hk, c.D, c.more, c.offset),
        v_(c, c.T, c.Hk, c.Dv, c.more, c.offset),
        o_(c, c.S, c.H, c.Dv, 0, 0),
        tokens_(o_.first.back()),
        lse_(static_cast<size_t>(c.H) * tokens_),
        sinks_(c.H),
        cu_seqlens_q_(sequences_ + 1),
        cu_seqlens_k_(sequences_ + 1) {
    randomize(q_.data, random_);
    randomize(k_.data, random_);
    randomize(v_.data, random_);
    randomize(sinks_, random_);
    for (int b = 0; b <= sequences_; b++) {
      cu_seqlens_q_[b] = q_.first[b];
      cu_seqlens_k_[b] = k_.first[b];
    }
    for (int b = 0; b < sequences_ && c.nan_key >= 0; b++) {
      for (int h = 0; h < c.Hk; h++) {
        for (int d = 0; d < c.D; d++) k_.at(b, c.nan_key, h, d) = narrow<T>(NAN);
      }
    }
    spoil(q_, c.S);
    spoil(k_, c.T);
    spoil(v_, c.T);
  }

  void run() {
    emulator::bank_conflicts = 0;
    if (const char* error = fastprimer::attention_forward(Cuda{}, {.problem = problem(),
                                                                   .o = o_.data.data(),
                                                                   .lse = lse_.data(),
                                                                   .stride_lse_batch = stride_lse_batch(),
                                                                   .stride_lse_head = stride_lse_head()})) {
      return fail(name_ + ": " + error);
    }
    const int before = failures;
    for_rows([&](int b, int i, int h) {
      if (failures == before) check_row(b, i, h);
    });
    o_.data.finish(name_ + ": o");
    lse_.finish(name_ + ": lse");
    if (failures == before) check_backward();
    if (emulator::bank_conflicts != 0) fail(name_ + ": bank conflicts: " + std::to_string(emulator::bank_conflicts));
  }

 private:
  void spoil(Tensor<T>& t, const std::vector<int>& lengths) {
    const int b = c_.nan_sequence;
    for (int i = 0; b >= 0 && i < lengths[b]; i++) {
      for (int h = 0; h < t.heads; h++) {
        for (int d = 0; d < t.features; d++) t.at(b, i, h, d) = narrow<T>(d % 2 == 0 ? NAN : INFINITY);
      }
    }
  }

  AttentionProblem problem() {
    return {.q = q_.heads_of(),
            .k = k_.heads_of(),
            .v = v_.heads_of(),
            .sinks = c_.sinks ? sinks_.data() : nullptr,
            .cu_seqlens_q = c_.packed ? cu_seqlens_q_.data() : nullptr,
            .cu_seqlens_k = c_.packed ? cu_seqlens_k_.data() : nullptr,
            .B = sequences_,
            .S = *std::max_element(c_.S.begin(), c_.S.end()),
            .T = *std::max_element(c_.T.begin(), c_.T.end()),
            .H = c_.H,
            .Hk = c_.Hk,
            .D = c_.D,
            .Dv = c_.Dv,
            .tokens_q = q_.first.back(),
            .tokens_k = k_.first.back(),
            .left = c_.left,
            .right = c_.right,
            .scale = c_.scale,
            .softcap = c_.softcap,
            .dtype = dtype_};
  }
  int64_t stride_lse_head() const { return c_.packed ? tokens_ : c_.S[0]; }
  int64_t stride_lse_batch() const { return c_.packed ? 0 : c_.H * stride_lse_head(); }
  size_t lse_at(int b, int i, int h) const { return b * stride_lse_batch() + h * stride_lse_head() + (c_.packed ? o_.first[b] : 0) + i; }

  template <class Function>
  void for_rows(Function function) {
    for (int b = 0; b < sequences_; b++) {
      for (int i = 0; i < c_.S[b]; i++) {
        for (int h = 0; h < c_.H; h++) function(b, i, h);
      }
    }
  }

  Row row(int b, int i, int h) {
    Row row;
    const int hk = h / (c_.H / c_.Hk), diagonal = i + c_.T[b] - c_.S[b];
    row.p.assign(c_.T[b], 0);
    row.z.assign(c_.T[b], -INFINITY);
    double top = c_.sinks ? sinks_[h] : -INFINITY;
    for (int j = 0; j < c_.T[b]; j++) {
      if ((c_.left != ANY && j < diagonal - c_.left) || (c_.right != ANY && j > diagonal + c_.right)) continue;
      double s = 0, terms = 0;
      for (int d = 0; d < c_.D; d++) {
        const double term = c_.scale * widen(q_.at(b, i, h, d)) * widen(k_.at(b, j, hk, d));
        s += term;
        terms += std::abs(term);
      }
      row.score_terms = std::max(row.score_terms, terms);
      row.z[j] = c_.softcap > 0 ? c_.softcap * std::tanh(s / c_.softcap) : s;
      top = std::max(row.z[j], top);
    }
    if (top == -INFINITY) return row;
    double total = c_.sinks ? std::exp(sinks_[h] - top) : 0;
    for (double z : row.z) total += std::exp(z - top);
    row.lse = top + std::log(total);
    for (int j = 0; j < c_.T[b]; j++) row.p[j] = std::exp(row.z[j] - row.lse);
    return row;
  }

  void check_row(int b, int i, int h) {
    if (b == c_.nan_sequence) return;
    const Row truth = row(b, i, h);
    const float lse = lse_[lse_at(b, i, h)];
    const bool same = std::isnan(truth.lse) ? std::isnan(lse) : truth.lse == lse || close(lse, truth.lse, 1 + truth.score_terms);
    if (!same) return fail(name_ + ": lse is wrong");
    const int hk = h / (c_.H / c_.Hk);
    for (int d = 0; d < c_.Dv; d++) {
      double o = 0, terms = 0;
      for (int j = 0; j < c_.T[b]; j++) {
        if (truth.p[j] == 0) continue;
        o += truth.p[j] * widen(v_.at(b, j, hk, d));
        terms += truth.p[j] * std::abs(widen(v_.at(b, j, hk, d)));
      }
      if (!near(o_.at(b, i, h, d), o, terms, truth.score_terms)) return fail(name_ + ": o is wrong");
    }
  }

  // A gradient in float64, and the sum of the sizes of its terms.
  struct Truth {
    std::vector<double> value, terms;

    explicit Truth(size_t count) : value(count), terms(count) {}
    void add(size_t i, double term) {
      value[i] += term;
      terms[i] += std::abs(term);
    }
  };

  void check_backward() {
    Tensor<T> dout(c_, c_.S, c_.H, c_.Dv, c_.more, c_.offset), dq(c_, c_.S, c_.H, c_.D, 0, 0);
    Tensor<T> dk(c_, c_.T, c_.Hk, c_.D, 0, 0), dv(c_, c_.T, c_.Hk, c_.Dv, 0, 0);
    Buffer<float> dlse(lse_.size()), delta(lse_.size()), dsinks(c_.H);
    randomize(dout.data, random_);
    spoil(dout, c_.S);
    randomize(dlse, random_);
    for (size_t i = 0; i < lse_.size(); i++) {
      if (lse_[i] == -INFINITY) dlse[i] = i % 2 == 0 ? NAN : INFINITY;  // to be ignored
    }
    if (const char* error = fastprimer::attention_backward(Cuda{}, {.problem = problem(),
                                                                    .dout = dout.heads_of(),
                                                                    .dlse = c_.dlse ? dlse.data() : nullptr,
                                                                    .o = o_.data.data(),
                                                                    .lse = lse_.data(),
                                                                    .stride_lse_batch = stride_lse_batch(),
                                                                    .stride_lse_head = stride_lse_head(),
                                                                    .delta = delta.data(),
                                                                    .dq = dq.data.data(),
                                                                    .dk = dk.data.data(),
                                                                    .dv = dv.data.data(),
                                                                    .dsinks = c_.sinks ? dsinks.data() : nullptr})) {
      return fail(name_ + ": backward: " + error);
    }
    Truth dq_truth(dq.data.size()), dk_truth(dk.data.size()), dv_truth(dv.data.size()), dsinks_truth(c_.H);
    double score_terms = 0;
    for_rows([&](int b, int i, int h) {
      if (b == c_.nan_sequence) return;
      const Row truth = row(b, i, h);
      score_terms = std::max(score_terms, truth.score_terms);
      if (truth.lse == -INFINITY) return;
      const int hk = h / (c_.H / c_.Hk);
      double shift = c_.dlse ? -dlse[lse_at(b, i, h)] : 0, shift_terms = std::abs(shift);
      for (int d = 0; d < c_.Dv; d++) {
        const double term = static_cast<double>(widen(dout.at(b, i, h, d))) * widen(o_.at(b, i, h, d));
        shift += term;
        shift_terms += std::abs(term);
      }
      if (c_.sinks) {
        dsinks_truth.value[h] -= std::exp(sinks_[h] - truth.lse) * shift;
        dsinks_truth.terms[h] += std::exp(sinks_[h] - truth.lse) * shift_terms;
      }
      for (int j = 0; j < c_.T[b]; j++) {
        if (truth.p[j] == 0) continue;
        double dp = 0, dp_terms = shift_terms;
        for (int d = 0; d < c_.Dv; d++) {
          const double dout_d = widen(dout.at(b, i, h, d));
          dv_truth.add(dv.index(b, j, hk, d), truth.p[j] * dout_d);
          dp += dout_d * widen(v_.at(b, j, hk, d));
          dp_terms += std::abs(dout_d * widen(v_.at(b, j, hk, d)));
        }
        const double slope = c_.softcap > 0 ? 1 - std::pow(truth.z[j] / c_.softcap, 2) : 1;
        const double ds = c_.scale * truth.p[j] * (dp - shift) * slope, ds_terms = c_.scale * truth.p[j] * dp_terms;
        for (int d = 0; d < c_.D; d++) {
          const double k = widen(k_.at(b, j, hk, d)), q = widen(q_.at(b, i, h, d));
          dq_truth.value[dq.index(b, i, h, d)] += ds * k;
          dq_truth.terms[dq.index(b, i, h, d)] += ds_terms * std::abs(k);
          dk_truth.value[dk.index(b, j, hk, d)] += ds * q;
          dk_truth.terms[dk.index(b, j, hk, d)] += ds_terms * std::abs(q);
        }
      }
    });
    check_gradient("dq", dq, dq_truth, c_.S, score_terms);
    check_gradient("dk", dk, dk_truth, c_.T, score_terms);
    check_gradient("dv", dv, dv_truth, c_.T, score_terms);
    for (int h = 0; h < c_.H && c_.sinks; h++) {
      const double scale = dsinks_truth.terms[h] * (4 + score_terms);
      if (!close(dsinks[h], dsinks_truth.value[h], scale)) return fail(name_ + ": dsinks is wrong");
    }
    delta.finish(name_ + ": delta");
    dsinks.finish(name_ + ": dsinks");
  }

  void check_gradient(const std::string& what, Tensor<T>& gradient, const Truth& truth, const std::vector<int>& lengths,
                      double score_terms) {
    for (int b = 0; b < sequences_; b++) {
      if (b == c_.nan_sequence) continue;
      const size_t first = gradient.index(b, 0, 0, 0), end = first + static_cast<size_t>(lengths[b]) * gradient.heads * gradient.features;
      for (size_t i = first; i < end; i++) {
        if (!near(gradient.data[i], truth.value[i], truth.terms[i], score_terms)) return fail(name_ + ": " + what + " is wrong");
      }
    }
    gradient.data.finish(name_ + ": " + what);
  }

  const Case& c_;
  Dtype dtype_;
  std::string name_;
  int sequences_;
  std::mt19937 random_;
  Tensor<T> q_, k_, v_, o_;
  int tokens_;
  Buffer<float> lse_, sinks_;
  Buffer<int32_t> cu_seqlens_q_, cu_seqlens_k_;
};

template <class T>
void check_dtype(Dtype dtype, const char* type, bool quick, const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    if (quick && !c.quick) continue;
    const std::string name = std::string("attention ") + type + " " + std::to_string(c.S[0]) + " x " + std::to_string(c.T[0]) + " x (" +
                             std::to_string(c.H) + " : " + std::to_string(c.Hk) + ") x " + std::to_string(c.D);
    Check<T>(c, dtype, name).run();
  }
}

}  // namespace check
