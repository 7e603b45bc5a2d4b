"""FlashInfer kernel that adds a bias to the logits: source and build arguments."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["biased_module_arguments"]

# Reads the bias in place: by padded position (slot), through the strides of the model's tensor. The module also has
# paged kernels, whose parameters lack kv_indptr; they are compiled but never run.
_BIASED_VARIANT = """
DEFINE_HAS_MEMBER(kv_indptr)

struct BiasedAttention : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale, sm_scale_log2;

  template <typename Params>
  __device__ __host__ BiasedAttention(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    sm_scale = params.sm_scale;
    sm_scale_log2 = math::log2e;
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    logits *= sm_scale;
    if (qo_idx < qo_len && kv_idx < kv_len) {
      int64_t query_slot = qo_idx;
      int64_t key_slot = kv_idx;
      if (params.maybe_query_slots != nullptr) {
        query_slot = params.maybe_query_slots[params.q_indptr[batch_idx] + qo_idx];
      }
      if constexpr (has_kv_indptr_v<Params>) {
        if (params.maybe_key_slots != nullptr) {
          key_slot = params.maybe_key_slots[params.kv_indptr[batch_idx] + kv_idx];
        }
      }
      logits += float(params.bias[batch_idx * params.bias_stride_row + qo_head_idx * params.bias_stride_head +
                                  query_slot * params.bias_stride_query + key_slot * params.bias_stride_key]);
    }
    return logits;
  })
};
"""
_CPP_NAMES = {torch.float16: "half", torch.bfloat16: "nv_bfloat16"}


def biased_module_arguments(dtype: torch.dtype, head_dim: int) -> list[Any]:
    """Returns the `jit_args` with which FlashInfer builds the kernel."""
    strides = ("bias_stride_row", "bias_stride_head", "bias_stride_query", "bias_stride_key")
    return [
        # Name of the compiled file: a change of the source must change it.
        f"hf_flashinfer_attn_bias_1_{str(dtype).removeprefix('torch.')}_{head_dim}",
        dtype, dtype, dtype, torch.int32, head_dim, head_dim,
        ["bias", "maybe_query_slots", "maybe_key_slots"], [_CPP_NAMES[dtype], "int32_t", "int32_t"],
        ["sm_scale", *strides], ["double", *["int64_t"] * len(strides)],
        "BiasedAttention", _BIASED_VARIANT,
    ]  # fmt: skip
