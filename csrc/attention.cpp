// Attention: tensors in, tensors out. Reads the strides of queries, keys and values, and calls the kernels of the tensors' device.
#include "attention.h"

#include <tuple>
#include <type_traits>
#include <vector>

#include "attention_tensors.h"

namespace fastprimer {
namespace {

// Cumulative lengths of x's tokens, none longer than `longest`: their values too, where they can be read.
template <class Device>
void check_lengths(const char* name, const std::optional<Tensor>& cu_seqlens, int64_t size, Integer longest, const Tensor& x) {
  STD_TORCH_CHECK(cu_seqlens && cu_seqlens->dim() == 1 && cu_seqlens->size(0) == size && size >= 2 &&
                      cu_seqlens->get_device_index() == x.get_device_index(),
                  "fastprimer: ", name, ": expected shape (B + 1,), on q's device");
  if constexpr (std::is_same_v<Device, Cpu>) {
    const auto* values = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    bool rising = values[0] == 0 && values[size - 1] == x.size(0);
    for (int64_t b = 1; b < size; b++) rising = rising && values[b - 1] <= values[b];
    STD_TORCH_CHECK(rising, "fastprimer: ", name, ": expected lengths summed up, from 0 to the number of tokens, never falling");
    bool fits = true;
    for (int64_t b = 1; b < size && longest; b++) fits = fits && values[b] - values[b - 1] <= *longest;
    STD_TORCH_CHECK(fits, "fastprimer: ", name, ": expected no sequence longer than its max_seqlen, ", longest.value_or(0));
  }
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sinks, bool packed) {
  const int64_t dims = packed ? 3 : 4;
  STD_TORCH_CHECK(q.dim() == dims && q.size(dims - 2) > 0 && q.size(dims - 1) > 0,
                  "fastprimer: q: expected shape (B, S, H, D), or packed (N, H, D)");
  check_kind("k", k, q);
  check_kind("v", v, q);
  STD_TORCH_CHECK(k.dim() == dims && k.size(dims - 1) == q.size(dims - 1) && (packed || k.size(0) == q.size(0)) && k.size(dims - 2) > 0 &&
                      q.size(dims - 2) % k.size(dims - 2) == 0,
                  "fastprimer: k: expected shape (..., Hk, D) of q's batch and head size, where Hk divides H");
  bool fits = v.dim() == dims && v.size(dims - 1) > 0;
  for (int64_t d = 0; fits && d < dims - 1; d++) fits = v.size(d) == k.size(d);
  STD_TORCH_CHECK(fits, "fastprimer: v: expected shape (..., Hk, Dv) of k's batch, tokens and heads");
  check_sinks(sinks, q);
}

// The inputs as the kernels read them, and the tensors that hold what had to be copied.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> sinks, cu_seqlens_q, cu_seqlens_k;
  bool packed;
  AttentionProblem problem;
};

template <class Device>
Inputs inputs_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sinks,
                 const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k, Integer max_seqlen_q,
                 Integer max_seqlen_k, double scale, Integer left, Integer right, std::optional<double> softcap) {
  const bool packed = cu_seqlens_q.has_value();
  STD_TORCH_CHECK(packed || !cu_seqlens_k.has_value(), "fastprimer: cu_seqlens_k: expected only with cu_seqlens_q");
  check_shapes(q, k, v, sinks, packed);
  Inputs in = {.q = with_adjacent_features(q),
               .k = with_adjacent_features(k),
               .v = with_adjacent_features(v),
               .sinks = as(ScalarType::Float, sinks),
               .cu_seqlens_q = as(ScalarType::Int, cu_seqlens_q),
               .cu_seqlens_k = as(ScalarType::Int, cu_seqlens_k),
               .packed = packed,
               .problem = {}};
  if (packed) {
    const int64_t size = cu_seqlens_q->dim() == 1 ? cu_seqlens_q->size(0) : 0;
    check_lengths<Device>("cu_seqlens_q", in.cu_seqlens_q, size, max_seqlen_q, q);
    check_lengths<Device>("cu_seqlens_k", in.cu_seqlens_k, size, max_seqlen_k, k);
  }
  const int64_t dims = q.dim(), S = q.size(dims - 3), T = k.size(dims - 3);
  in.problem = {.q = heads_of(in.q),
                .k = heads_of(in.k),
                .v = heads_of(in.v),
                .sinks = data_of<float>(in.sinks),
                .cu_seqlens_q = data_of<int32_t>(in.cu_seqlens_q),
                .cu_seqlens_k = data_of<int32_t>(in.cu_seqlens_k),
                .B = packed ? cu_seqlens_q->size(0) - 1 : q.size(0),
                .S = packed && max_seqlen_q && *max_seqlen_q < S ? *max_seqlen_q : S,
                .T = packed && max_seqlen_k && *max_seqlen_k < T ? *max_seqlen_k : T,
                .H = q.size(dims - 2),
                .Hk = k.size(dims - 2),
                .D = q.size(dims - 1),
                .Dv = v.size(dims - 1),
                .tokens_q = S,
                .tokens_k = T,
                .left = limit_of(left),
                .right = limit_of(right),
                .scale = scale,
                .softcap = softcap_of(softcap),
                .dtype = dtype_of(q)};
  return in;
}

// The shapes of o, (..., H, Dv), and of lse, (B, H, S) or (H, N).
std::vector<int64_t> o_shape(const Inputs& in) {
  std::vector<int64_t> shape(in.q.sizes().begin(), in.q.sizes().end());
  shape.back() = in.problem.Dv;
  return shape;
}

std::vector<int64_t> lse_shape(const Inputs& in) {
  if (in.packed) return {in.problem.H, in.q.size(0)};
  return {in.q.size(0), in.problem.H, in.q.size(1)};
}

int64_t tokens(const Inputs& in) { return in.q.size(in.q.dim() - 3); }

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> sinks,
                                   std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, Integer max_seqlen_q,
                                   Integer max_seqlen_k, double scale, Integer left, Integer right, std::optional<double> softcap) {
  const On<Device> on(q);
  const Inputs in = inputs_of<Device>(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap);
  Tensor o = empty(q, o_shape(in), q.scalar_type());
  Tensor lse = empty(q, lse_shape(in), ScalarType::Float);
  if (o.numel() == 0) return {o, lse};
  check(attention_forward(on.device, {.problem = in.problem,
                                      .o = o.mutable_data_ptr(),
                                      .lse = static_cast<float*>(lse.mutable_data_ptr()),
                                      .stride_lse_batch = in.packed ? 0 : in.problem.H * tokens(in),
                                      .stride_lse_head = tokens(in)}),
        "attention_forward");
  return {o, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout_, std::optional<Tensor> dlse_, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& o_, const Tensor& lse_, std::optional<Tensor> sinks,
                                                    std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                                    Integer max_seqlen_q, Integer max_seqlen_k, double scale, Integer left, Integer right,
                                                    std::optional<double> softcap) {
  const On<Device> on(q);
  const Inputs in = inputs_of<Device>(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap);
  check_kind("o", o_, q);
  check_shape("o", o_, o_shape(in));
  check_like("do", dout_, o_);
  check_shape("lse", lse_, lse_shape(in));
  STD_TORCH_CHECK(lse_.scalar_type() == ScalarType::Float && lse_.get_device_index() == q.get_device_index(),
                  "fastprimer: lse: expected float32, on q's device");
  check_like("dlse", dlse_, lse_);
  const Tensor dout = with_adjacent_features(dout_), o = torch::stable::contiguous(o_), lse = torch::stable::contiguous(lse_);
  const std::optional<Tensor> dlse = as(ScalarType::Float, dlse_);
  Tensor dq = empty(q, q.sizes(), q.scalar_type()), dk = empty(k, k.sizes(), k.scalar_type()), dv = empty(v, v.sizes(), v.scalar_type());
  Tensor dsinks = empty(q, {sinks ? in.problem.H : 0}, ScalarType::Float), delta = empty(q, lse.sizes(), ScalarType::Float);
  check(attention_backward(on.device, {.problem = in.problem,
                                       .dout = heads_of(dout),
                                       .dlse = data_of<float>(dlse),
                                       .o = o.const_data_ptr(),
                                       .lse = static_cast<const float*>(lse.const_data_ptr()),
                                       .stride_lse_batch = in.packed ? 0 : in.problem.H * tokens(in),
                                       .stride_lse_head = tokens(in),
                                       .delta = static_cast<float*>(delta.mutable_data_ptr()),
                                       .dq = dq.mutable_data_ptr(),
                                       .dk = dk.mutable_data_ptr(),
                                       .dv = dv.mutable_data_ptr(),
                                       .dsinks = sinks ? static_cast<float*>(dsinks.mutable_data_ptr()) : nullptr}),
        "attention_backward");
  return {dq, dk, dv, as(sinks ? sinks->scalar_type() : q.scalar_type(), dsinks)};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("attention_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("attention_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
