// The fused cross-entropy on a GPU: the logits, or their gradients, of one piece of the vocabulary after the other. Products are the
// library's; what lies between them is csrc/cuda/cross_entropy.cu.
#pragma once
#include <algorithm>

#include "cross_entropy.h"
#include "product.h"

namespace fastprimer {

constexpr int64_t PIECE_BYTES = 64 << 20;
inline int64_t piece_bytes = PIECE_BYTES;

// For tests, which need several pieces of few columns: sets PIECE_BYTES (0: what it was), returns what was in force.
inline int64_t set_piece_bytes(int64_t bytes) {
  const int64_t before = piece_bytes;
  piece_bytes = bytes > 0 ? bytes : PIECE_BYTES;
  return before;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Of how many columns a piece is. Wide ones, for a product of few columns leaves a GPU idle, and adding up dx costs as much for a narrow
// piece as for a wide one; but no more memory than the caller has granted anyway, or than matters beside weights and their gradients.
inline int64_t piece_width(int64_t N, int64_t V, int64_t budget) {
  const int64_t columns = std::max(budget, piece_bytes) / (4 * N) / 256 * 256;
  return std::min(std::max<int64_t>(columns, 256), round_up(V, 64));
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
inline Tensor some_columns(Tensor t, int64_t first, int64_t n) { return torch::stable::narrow(t, 1, first, n); }
inline Tensor some_rows(Tensor t, int64_t first, int64_t n) { return torch::stable::narrow(t, 0, first, n); }

// The pieces one after the other: those of `kept` stand there if it is float32, the others in one scratch tensor.
class Pieces {
 public:
  const int64_t width;

  // compute_kept: whether logits of kept pieces are to be computed, too: those of 16 bits beside what is kept, so a few at a time.
  Pieces(const LinearCrossEntropyProblem& p, const Tensor& weight, const Tensor& kept, bool compute_kept)
      : width(piece_width(p.N, p.V, (p.in_16_bits ? 2 : 4) * p.N * p.columns / (p.in_16_bits && compute_kept ? 4 : 1))),
        p_(p),
        weight_(weight),
        kept_(kept),
        scratch_(empty(weight, {p_.columns < p_.V || (p_.in_16_bits && compute_kept) ? p_.N : 0, width}, ScalarType::Float)) {}

  bool single() const { return p_.V <= width && (p_.columns == 0 || p_.columns == p_.V); }

  // body(piece, its logits, its rows of the weights).
  template <class Body>
  void each(Body body) const {
    for (int64_t first = 0; first < p_.V;) {
      const bool kept = first < p_.columns;
      const int64_t n = std::min(width, (kept ? p_.columns : p_.V) - first);
      const bool there = kept && !p_.in_16_bits;
      const Tensor logits = there ? some_columns(kept_, first, n) : some_columns(scratch_, 0, n);
      body(LogitsPiece{.logits = static_cast<float*>(logits.mutable_data_ptr()),
                       .stride_row = there ? p_.columns : width,
                       .first = first,
                       .width = n,
                       .kept = kept},
           logits, some_rows(weight_, first, n));
      first += n;
    }
  }

 private:
  const LinearCrossEntropyProblem& p_;
  const Tensor weight_, kept_, scratch_;
};

inline Kept16 kept_in_16_bits(const LinearCrossEntropyProblem& p, const Tensor& kept, const Tensor& shift) {
  if (!p.in_16_bits) return {};
  return {static_cast<int16_t*>(kept.mutable_data_ptr()), static_cast<float*>(shift.mutable_data_ptr())};
}

inline void forward_by_pieces(Cuda device, const LinearCrossEntropyProblem& p, const Tensor& x, const Tensor& weight,
                              const LossOutputs& outputs, const Tensor& kept, const Tensor& shift) {
  const Pieces pieces(p, weight, kept, true);
  const auto done = [](Error error) { check(error, "linear_cross_entropy_forward"); };
  Tensor room = empty(kept, {p.N * static_cast<int64_t>(sizeof(LossState))}, ScalarType::Byte);
  auto* const state = static_cast<LossState*>(room.mutable_data_ptr());
  const Tensor tokens = torch::stable::contiguous(x);  // as they are in backward, where the library is to round the same product alike
  pieces.each([&](const LogitsPiece& piece, const Tensor& logits, const Tensor& rows) {
    product(tokens, transposed(rows), logits);
    done(linear_cross_entropy_fold(device, p, piece, state, outputs));
    if (piece.kept && p.in_16_bits) done(linear_cross_entropy_keep(device, p, piece, state, kept_in_16_bits(p, kept, shift)));
  });
}

// Three products a piece, of which dx or dweight may not be needed (null), and zeros for ignored tokens in the end. Those of 16 bits are of
// dlogits rounded to them; float16 has too few exponents for what a mean over many tokens and words makes so small: there dlogits are
// scaled, and the products scaled back. What those of 16 bits give is float32, and rounded here: a library may split a product, and add up
// the parts in the type of the result.
class BackwardByPieces {
 public:
  BackwardByPieces(Cuda device, const LinearCrossEntropyProblem& p, const Tensor& weight, const LossGradients& gradients,
                   const Tensor& kept, const Tensor& shift, Tensor* dx, Tensor* dweight, float* dbias)
      : device_(device),
        p_(p),
        gradients_(gradients),
        pieces_(p, weight, kept, false),
        kept_(kept_in_16_bits(p, kept, shift)),
        dweight_(dweight),
        dx_(dx),
        dbias_(dbias),
        scaled_(p_.dtype == Dtype::float16),
        direct_(p_.dtype == Dtype::float32),
        tokens_(empty(weight, {p_.N, p_.C}, weight.scalar_type())),
        dlogits_(empty(weight, {p_.N, pieces_.width}, weight.scalar_type())),
        dx_sum_(dx && direct_ ? *dx : empty(weight, {dx ? p_.N : 0, p_.C}, ScalarType::Float)),
        dx_part_(empty(weight, {!dx || pieces_.single() ? 0 : p_.N, p_.C}, ScalarType::Float)),
        dweight_part_(empty(weight, {!dweight || direct_ ? 0 : pieces_.width, p_.C}, ScalarType::Float)),
        scale_(empty(weight, {1}, ScalarType::Float)) {}

  void run() {
    done(linear_cross_entropy_tokens(device_, p_, tokens_.mutable_data_ptr()));
    if (scaled_) done(linear_cross_entropy_scale(device_, p_, gradients_, static_cast<float*>(scale_.mutable_data_ptr())));
    pieces_.each([&](const LogitsPiece& piece, const Tensor& logits, const Tensor& weight) {
      if (!piece.kept) product(tokens_, transposed(weight), logits);
      const DlogitsPiece out = {.dlogits = dlogits_.mutable_data_ptr(),
                                .stride_row = pieces_.width,
                                .scale = scale(),
                                .dbias = dbias_ ? dbias_ + piece.first : nullptr};
      done(linear_cross_entropy_dlogits(device_, p_, piece, kept_, gradients_, out));
      const Tensor dlogits = some_columns(dlogits_, 0, piece.width);
      if (dweight_) write_dweight(piece, dlogits);
      if (dx_) add_dx(piece, dlogits, weight);
    });
    if (dx_ == nullptr) return;
    LinearCrossEntropyProblem result = p_;
    result.x = dx_->const_data_ptr();
    result.stride_x_row = p_.C;
    done(linear_cross_entropy_tokens(device_, result, dx_->mutable_data_ptr()));  // dlogits of 0 times a weight that is NaN are none
  }

 private:
  const float* scale() const { return scaled_ ? static_cast<const float*>(scale_.const_data_ptr()) : nullptr; }

  static void done(Error error) { check(error, "linear_cross_entropy_backward"); }

  void write_dweight(const LogitsPiece& piece, const Tensor& dlogits) {
    Tensor rows = some_rows(*dweight_, piece.first, piece.width);
    if (direct_) return product(transposed(dlogits), tokens_, rows);
    Tensor part = some_rows(dweight_part_, 0, piece.width);
    product(transposed(dlogits), tokens_, part);
    add(nullptr, part, rows.mutable_data_ptr());
  }

  void add_dx(const LogitsPiece& piece, const Tensor& dlogits, const Tensor& weight) {
    const bool first = piece.first == 0, last = piece.first + piece.width == p_.V;
    Tensor& part = first ? dx_sum_ : dx_part_;
    product(dlogits, weight, part);
    if (first ? last && !direct_ : true)
      add(first ? nullptr : static_cast<float*>(dx_sum_.mutable_data_ptr()), part, last ? dx_->mutable_data_ptr() : nullptr);
  }

  void add(float* sum, const Tensor& part, void* out) {
    const auto* numbers = static_cast<const float*>(part.const_data_ptr());
    done(linear_cross_entropy_add(device_, p_.dtype, sum, numbers, part.numel(), scale(), out));
  }

  Cuda device_;
  const LinearCrossEntropyProblem& p_;
  const LossGradients gradients_;
  const Pieces pieces_;
  const Kept16 kept_;
  Tensor *dweight_, *dx_;
  float* dbias_;
  const bool scaled_, direct_;  // direct: products are written where they belong, and dx_sum_ is dx itself
  Tensor tokens_, dlogits_, dx_sum_, dx_part_, dweight_part_, scale_;
};

}  // namespace fastprimer
