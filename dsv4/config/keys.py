"""Every key of a config.json that dsv4 knows, and what it does with it. A key in none of these tables is an error."""

from typing import Any

# Required integers, with the smallest value that makes sense.
INTEGERS: dict[str, int] = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 1,
    "q_lora_rank": 1,
    "o_groups": 1,
    "o_lora_rank": 1,
    "sliding_window": 1,
    "moe_intermediate_size": 1,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "index_n_heads": 1,
    "index_head_dim": 1,
    "index_topk": 1,
    "hc_mult": 1,
    "hc_sinkhorn_iters": 1,
    "max_position_embeddings": 1,
    "num_nextn_predict_layers": 0,
}

# Required numbers, all greater than zero.
POSITIVE_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")

# Keys with one value that this code computes. Some writers leave some of them out (transformers never writes
# topk_method), so only the first group must be there; a different value is always refused.
FIXED_REQUIRED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
}
FIXED_OPTIONAL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "num_key_value_heads": 1,
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
}

# Read by parse.py or rope.py, each with its own rule.
SPECIAL = (
    "qk_rope_head_dim",
    "partial_rotary_factor",
    "compress_ratios",
    "layer_types",
    "compress_rates",
    "compress_rate_csa",
    "compress_rate_hca",
    "num_hash_layers",
    "mlp_layer_types",
    "rope_theta",
    "compress_rope_theta",
    "rope_scaling",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "dtype",
    "expert_dtype",
    "quantization_config",
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "dspark_markov_rank",
)

# Accepted and ignored: none of them changes what the model computes here.
IGNORED: dict[str, str] = {
    "use_cache": "dsv4 always keeps a cache",
    "initializer_range": "weights come from the checkpoint",
    "transformers_version": "says which library wrote the file",
    "_name_or_path": "says where the file came from",
    "pad_token_id": "batches are ragged; nothing is padded",
    "attention_dropout": "acts in training only",
    "output_router_logits": "asks transformers for an extra output",
    "output_hidden_states": "asks transformers for an extra output",
    "output_attentions": "asks transformers for an extra output",
    "return_dict": "chooses the output class of transformers",
    "router_aux_loss_coef": "acts in training only",
    "router_jitter_noise": "acts in training only",
    "id2label": "names classes of a classifier head, which is absent",
    "label2id": "names classes of a classifier head, which is absent",
    "problem_type": "belongs to a classifier head, which is absent",
    "chunk_size_feed_forward": "a memory setting of transformers",
}

# Keys that make other libraries import code. Never needed: dsv4 has the model itself.
REMOTE_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation",
               "_attn_implementation_internal", "_attn_implementation_autoset", "attn_implementation")  # fmt: skip

# Keys that show what the file really is, so that the message can say so instead of listing it key by key.
OTHER_MODELS: dict[str, str] = {
    "text_config": "a composite (V4.1 or multimodal) config",
    "engram_layer_ids": "a V4.1 config",
    "kv_source_layer_ids": "a V4.1 config",
    "vision_n_layers": "a Vision config",
    "vision_config": "a multimodal config",
    "n_layers": "DeepSeek's inference/config.json, which uses other names",
}
