// Every native operation's signature: the table of contents of csrc/. The same functions, with the same names and
// arguments, stand in the chapters of fastprimer/ops/ (a test compares the two).
#include <torch/csrc/stable/library.h>

// The emulated CUDA kernels are a library of their own, so that both can be loaded at once.
#ifndef FASTPRIMER_NAMESPACE
#define FASTPRIMER_NAMESPACE fastprimer
#endif

STABLE_TORCH_LIBRARY(FASTPRIMER_NAMESPACE, m) {
  m.def("rms_norm_forward(Tensor x, Tensor? weight, float eps, Tensor? residual, float weight_offset) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, float weight_offset, bool needs_dweight) -> "
      "(Tensor, Tensor)");
  m.def("rope_forward(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> (Tensor, Tensor)");
  m.def("rope_backward(Tensor dq, Tensor? dk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> (Tensor, Tensor)");
  m.def("swiglu_forward(Tensor gate, Tensor? up, float alpha, float beta, float? limit, float offset) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor? up, float alpha, float beta, float? limit, float offset) -> (Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, float scale, SymInt? left, SymInt? right, float? softcap) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? sinks, Tensor? "
      "cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float scale, SymInt? left, SymInt? right, float? "
      "softcap) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_with_kv_cache_forward(Tensor q, Tensor(a1!) k_cache, Tensor(a2!) v_cache, Tensor cache_seqlens, Tensor? k, Tensor? v, "
      "Tensor? block_table, Tensor? sinks, float scale, SymInt? left, SymInt? right, float? softcap) -> (Tensor, Tensor)");
  m.def(
      "route_forward(Tensor logits, SymInt k, SymInt score, bool renormalize, Tensor? bias, SymInt? groups, SymInt? top_groups, float "
      "scale) "
      "-> (Tensor, Tensor)");
  m.def("route_backward(Tensor dweights, Tensor logits, Tensor experts, SymInt score, bool renormalize, float scale) -> Tensor");
  m.def("moe_forward(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor experts) -> (Tensor, Tensor)");
  m.def(
      "moe_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor experts, Tensor hidden, bool needs_dx, bool "
      "needs_dexperts) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, SymInt ignore_index, float label_smoothing, float z_loss, float? softcap) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor? dlse, Tensor logits, Tensor target, Tensor lse, Tensor correction, SymInt "
      "ignore_index, float "
      "label_smoothing, float z_loss, float? softcap) -> Tensor");
  m.def(
      "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor target, Tensor? bias, SymInt ignore_index, float label_smoothing, "
      "float z_loss, float? softcap, SymInt memory_budget) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor dloss, Tensor? dlse, Tensor x, Tensor weight, Tensor target, Tensor lse, Tensor correction, "
      "Tensor kept, Tensor "
      "shift, Tensor? bias, SymInt ignore_index, float label_smoothing, float z_loss, float? softcap, bool needs_dx, bool "
      "needs_dweight) -> (Tensor, Tensor, Tensor)");
  m.def("set_loss_piece_bytes(int bytes) -> int");  // for tests: csrc/linear_cross_entropy.cpp
#ifndef FASTPRIMER_EMULATED
  m.def("limit_cpu_instruction_set(int limit) -> int");  // for tests: csrc/cpu/dispatch.cpp
  m.def("allow_brgemm(bool allow) -> bool");             // for tests: csrc/cpu/brgemm.h
  m.def("force_bfloat16_tiles(bool force) -> bool");     // the same
  m.def("poison_scratch(bool poison) -> bool");          // for tests: csrc/cpu/memory.h
#else
  m.def("take_traffic() -> int");   // for tests: tests/emulator/traffic.cpp
  m.def("take_products() -> int");  // the same
#endif
}
