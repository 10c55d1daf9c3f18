"""The fields of transformers' configs that change a model's output and leave no trace in its weights.

Fields that change the names or shapes of weights are not needed here: the fingerprint covers them. Fields that users
change in the same model are left out on purpose, such as dropouts, token ids and `max_position_embeddings`.
"""

_NORMS = {
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon", "norm_eps"),
    *("batch_norm_eps", "post_norm_eps", "embedding_layernorm", "norm_type", "normalization_type"),
    *("apply_residual_connection_post_layernorm", "do_layer_norm_before", "do_stable_layer_norm", "normalize_before"),
    *("pre_norm", "use_parallel_residual", "parallel_attn", "num_ln_in_parallel_attn", "use_qk_norm", "qk_layernorm"),
}
_ACTIVATIONS = {
    *("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj", "dense_act_fn"),
    *(
        "is_gated_act",
        "gelu_activation",
        "projector_hidden_act",
        "encoder_activation_function",
        "decoder_activation_function",
    ),
    *("feat_extract_activation", "swiglu_limit", "swiglu_alpha", "mlp_hidden_act"),
}
_HEADS = {
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads", "num_kv_heads", "head_dim"),
    *("attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"),
    *("multi_query", "new_decoder_architecture", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv"),
    *("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_n_groups", "n_groups"),
}
_POSITIONS = {
    *("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "rope_interleave", "rotary_emb_base"),
    *("rotary_embedding_base", "partial_rotary_factor", "rotary_pct", "rotary_dim", "no_rope_layers", "alibi"),
    *("position_embedding_type", "position_embeddings_type", "pos_att_type", "position_biased_input"),
    *("relative_attention", "relative_attention_num_buckets", "relative_attention_max_distance"),
    *("max_relative_positions", "position_buckets", "use_abs_pos", "use_rel_pos"),
}
_ATTENTION = {
    *(
        "is_decoder",
        "is_causal",
        "causal",
        "use_bidirectional_attention",
        "attention_type",
        "attention_window",
        "layer_types",
    ),
    *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "window_size"),
    *("attention_chunk_size", "attention_layers", "local_attention", "global_attn_every_n_layers", "prefix_lm"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "query_pre_attn_scalar", "attention_multiplier"),
    *("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "attention_sink"),
}
_SCALES = {
    *(
        "scale_embedding",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "logit_scale",
        "rescale_every",
        "scale_decoder_outputs",
        "rescale_embeddings",
    ),
    *("normalize_embedding", "token_dropout", "emb_layer_norm_before"),
}
_EXPERTS = {
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method"),
    *("scoring_func", "moe_k", "decoder_sparse_step", "mlp_only_layers"),
}
_STATE_SPACES = {"time_step_limit", "time_step_min", "time_step_max", "time_step_floor"}
_IMAGES = {
    *("patch_size", "patch_stride", "spatial_merge_size", "vision_feature_layer", "vision_feature_select_strategy"),
    *("interpolate_mode", "pooling_type", "classifier_pooling", "use_mean_pooling", "strides", "conv_stride"),
}
FORWARD_FIELDS = frozenset(
    {"model_type"}
    | _NORMS
    | _ACTIVATIONS
    | _HEADS
    | _POSITIONS
    | _ATTENTION
    | _SCALES
    | _EXPERTS
    | _STATE_SPACES
    | _IMAGES
)
# The same function under two names.
FORWARD_SYNONYMS = {"swish": "silu"}
# Releases name the same setting in several ways: the left one is read as the right one.
FORWARD_ALIASES = {
    "rope_theta": "rope_parameters.rope_theta",
    "rope_scaling": "rope_parameters",
    "rope_parameters.type": "rope_parameters.rope_type",
    "partial_rotary_factor": "rope_parameters.partial_rotary_factor",
}
