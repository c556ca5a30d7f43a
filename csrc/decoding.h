// Decoding: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/decoding.py.
#pragma once
#include "attention.h"

namespace fastprimer {

// S queries at the end of each of B sequences, and the caches of their keys and values. With k, a sequence's length grows by S: its new
// keys and values become the last ones of the caches before any query sees them.
//
// Caches consist of pages, (pages, page_size, Hk, features): token j of sequence b lies in row j % page_size of page
// block_table[b][j / page_size]. A contiguous cache is one page for each sequence, and has no block table: page b.
struct Decoding {
  Heads q, k, v;  // (B, S, heads, features); k.data and v.data null: nothing is appended
  Heads k_cache, v_cache;
  const int32_t* cache_seqlens;  // (B,), without the new tokens
  const int32_t* block_table;    // (B, pages_of_sequence); null: contiguous
  int64_t pages, page_size, pages_of_sequence;
  int64_t room;        // tokens that a sequence may have: page_size pages_of_sequence, if there is a page
  int64_t appended;    // S, or 0 without k and v
  const float* sinks;  // (H,); null: none
  int64_t B, S, H, Hk, D, Dv;
  int64_t left, right;  // AttentionProblem::UNLIMITED, or >= 0
  double scale;
  double softcap;    // 0: none
  Dtype dtype;       // of all tensors but lse
  void* o;           // (B, S, H, Dv), contiguous
  float* lse;        // (B, H, S), contiguous
  float* workspace;  // decoding_workspace(args) numbers
};

inline int64_t decoding_workspace(Cpu, const Decoding&) { return 0; }  // it takes as much as the lengths ask for
int64_t decoding_workspace(Cuda, const Decoding& args);
Error decoding(Cpu, const Decoding& args);
Error decoding(Cuda, const Decoding& args);

}  // namespace fastprimer
