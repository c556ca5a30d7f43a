// Decoding: tensors in, tensors out. Reads the strides of caches, queries and new tokens, and calls the kernels of the tensors' device.
#include "decoding.h"

#include <tuple>
#include <type_traits>

#include "attention_tensors.h"

namespace fastprimer {
namespace {

// A cache is written in place: no copy could stand in for it.
void check_cache(const char* name, const Tensor& cache, const Tensor& q) {
  check_kind(name, cache, q);
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(3) > 0 && (cache.size(3) == 1 || cache.stride(3) == 1), "fastprimer: ", name,
                  ": expected shape (..., T, Hk, D), the features of a head next to each other");
}

void check_shapes(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_seqlens,
                  const std::optional<Tensor>& k, const std::optional<Tensor>& v, const std::optional<Tensor>& block_table) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(1) > 0 && q.size(2) > 0 && q.size(3) > 0, "fastprimer: q: expected shape (B, S, H, D)");
  check_cache("k_cache", k_cache, q);
  check_cache("v_cache", v_cache, q);
  const int64_t B = q.size(0), S = q.size(1), Hk = k_cache.size(2);
  STD_TORCH_CHECK((block_table || k_cache.size(0) == B) && Hk > 0 && q.size(2) % Hk == 0 && k_cache.size(3) == q.size(3),
                  "fastprimer: k_cache: expected q's batch and head size, and a number of heads that divides H");
  check_shape("v_cache", v_cache, {k_cache.size(0), k_cache.size(1), Hk, v_cache.size(3)});
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "fastprimer: v: expected both k and v or neither");
  if (k) {
    check_kind("k", *k, q);
    check_kind("v", *v, q);
    check_shape("k", *k, {B, S, Hk, q.size(3)});
    check_shape("v", *v, {B, S, Hk, v_cache.size(3)});
  }
  check_shape("cache_seqlens", cache_seqlens, {B});
  STD_TORCH_CHECK(cache_seqlens.get_device_index() == q.get_device_index(), "fastprimer: cache_seqlens: expected q's device");
  STD_TORCH_CHECK(
      !block_table || (block_table->dim() == 2 && block_table->size(0) == B && block_table->get_device_index() == q.get_device_index()),
      "fastprimer: block_table: expected shape (B, n), on q's device");
}

// The values of lengths and pages, where they can be read: kernels follow them.
void check_places(const Decoding& args) {
  for (int64_t b = 0; b < args.B; b++) {
    const int64_t length = args.cache_seqlens[b] + args.appended;
    STD_TORCH_CHECK(args.cache_seqlens[b] >= 0 && length <= args.room, "fastprimer: cache_seqlens: expected 0..", args.room,
                    " tokens, the new ones included");
    for (int64_t n = 0; args.block_table && n * args.page_size < length; n++) {
      const int64_t page = args.block_table[b * args.pages_of_sequence + n];
      STD_TORCH_CHECK(page >= 0 && page < args.pages, "fastprimer: block_table: expected pages in 0..", args.pages - 1);
    }
  }
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_seqlens_,
                                   std::optional<Tensor> k_, std::optional<Tensor> v_, std::optional<Tensor> block_table_,
                                   std::optional<Tensor> sinks_, double scale, Integer left, Integer right, std::optional<double> softcap) {
  const On<Device> on(q_);
  check_shapes(q_, k_cache, v_cache, cache_seqlens_, k_, v_, block_table_);
  check_sinks(sinks_, q_);
  const Tensor q = with_adjacent_features(q_), cache_seqlens = as(ScalarType::Int, cache_seqlens_);
  const std::optional<Tensor> k = with_adjacent_features(k_), v = with_adjacent_features(v_);
  const std::optional<Tensor> block_table = as(ScalarType::Int, block_table_), sinks = as(ScalarType::Float, sinks_);
  if (k) k_cache.mutable_data_ptr(), v_cache.mutable_data_ptr();  // makes them their own, where they share memory until written to
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), Dv = v_cache.size(3);
  Tensor o = empty(q, {B, S, H, Dv}, q.scalar_type()), lse = empty(q, {B, H, S}, ScalarType::Float);
  Decoding args = {.q = heads_of(q),
                   .k = heads_of(k),
                   .v = heads_of(v),
                   .k_cache = heads_of(k_cache),
                   .v_cache = heads_of(v_cache),
                   .cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr()),
                   .block_table = data_of<int32_t>(block_table),
                   .pages = k_cache.size(0),
                   .page_size = k_cache.size(1),
                   .pages_of_sequence = block_table ? block_table->size(1) : 1,
                   .room = 0,
                   .appended = k ? S : 0,
                   .sinks = data_of<float>(sinks),
                   .B = B,
                   .S = S,
                   .H = H,
                   .Hk = k_cache.size(2),
                   .D = q.size(3),
                   .Dv = Dv,
                   .left = limit_of(left),
                   .right = limit_of(right),
                   .scale = scale,
                   .softcap = softcap_of(softcap),
                   .dtype = dtype_of(q),
                   .o = o.mutable_data_ptr(),
                   .lse = static_cast<float*>(lse.mutable_data_ptr()),
                   .workspace = nullptr};
  if (args.pages > 0) args.room = args.page_size * args.pages_of_sequence;
  if (B == 0) return {o, lse};
  if constexpr (std::is_same_v<Device, Cpu>) check_places(args);
  const Tensor workspace = empty(q, {decoding_workspace(on.device, args)}, ScalarType::Float);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  check(decoding(on.device, args), "attention_with_kv_cache_forward");
  return {o, lse};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) { m.impl("attention_with_kv_cache_forward", TORCH_BOX(&fastprimer::forward<Device>)); }
