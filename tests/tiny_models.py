"""Tiny random transformers models, one a family whose decoding differs. float32, in evaluation mode.

Weights are drawn wider than transformers' default so that attention is far from uniform: with nearly uniform
attention a wrong mask or position hardly shows. Contexts are short, windows shorter still, so that tests go
beyond both.
"""

from __future__ import annotations

import torch
import transformers

from tests.devices import DEVICE

VOCAB = 97
CONTEXT = 96
WINDOW = 6
LONGROPE_ORIGINAL = 40
EOS = 2

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _build(name: str, seed: int = 0, config: str = "{}Config", **changes) -> transformers.PreTrainedModel:
    config = getattr(transformers, config.format(name))(**{**_COMMON, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
            elif "norm" in key:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
    return model.eval().to(DEVICE)


def llama(**changes):
    return _build("Llama", **changes)


def qwen2(**changes):
    return _build("Qwen2", **changes)


def mixed_qwen2(**changes):
    """One full layer, then two with a window."""
    return _build(
        "Qwen2",
        **{
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            **changes,
        },
    )


def qwen3(**changes):
    return _build("Qwen3", **{"head_dim": 16, **changes})


def phi3(**changes):
    """longrope: short and long factors differ, and so does the law above LONGROPE_ORIGINAL positions."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": LONGROPE_ORIGINAL,
        "factor": CONTEXT / LONGROPE_ORIGINAL,
    }
    return _build(
        "Phi3",
        **{"rope_parameters": rope, "original_max_position_embeddings": LONGROPE_ORIGINAL, **changes},
    )


def mistral(**changes):
    return _build("Mistral", **{"sliding_window": WINDOW, **changes})


def gemma2(**changes):
    """Alternating windows, soft-capped scores and logits. Eager: some releases' sdpa leaves the soft cap out."""
    return _build(
        "Gemma2",
        **{
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "attn_implementation": "eager",
            **changes,
        },
    )


def gemma3(**changes):
    """Windows and two rotary bases, by layer type."""
    return _build(
        "Gemma3",
        config="{}TextConfig",
        **{
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            **changes,
        },
    )


def granite(**changes):
    """Logits divided by a number."""
    return _build("Granite", **{"logits_scaling": 4.0, **changes})


def cohere(**changes):
    """Logits multiplied by a number."""
    return _build("Cohere", **{"logit_scale": 0.25, **changes})


def dynamic_llama(**changes):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return _build("Llama", **{"rope_parameters": rope, **changes})


def moe_qwen3(**changes):
    return _build(
        "Qwen3Moe",
        **{
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 1,
            **changes,
        },
    )


def gpt_oss(**changes):
    """Attention sinks, alternating windows, YaRN. Sinks as strong as scores, each head its own."""
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "truncate": False,
        "original_max_position_embeddings": CONTEXT // 4,
    }  # fmt: skip
    model = _build(
        "GptOss",
        **{
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": rope,
            **changes,
        },
    )
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 4.0, 0.5]).roll(index))
    return model


def gpt2():
    """Learned positions."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=EOS
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval().to(DEVICE)


FAMILIES = {
    model.__name__: model
    for model in (llama, qwen2, mixed_qwen2, qwen3, phi3, mistral, gemma2, gemma3, dynamic_llama, moe_qwen3, gpt_oss)
}


# -- models that also look at pictures, or whose last layers attend to the keys and values of earlier ones


_PICTURES = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
_TEXT = {**_COMMON, "vocab_size": VOCAB + 6}  # what stands for a picture lies behind the text's tokens
_QWEN_VL = {"image_token_id": VOCAB, "video_token_id": VOCAB + 1, "vision_start_token_id": VOCAB + 2}


def _of(config, head: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, head)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval().to(DEVICE)


def gemma3_with_pictures():
    text = {
        **_TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {**_PICTURES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=VOCAB, boi_token_index=VOCAB + 1, eoi_token_index=VOCAB + 2,
    )  # fmt: skip
    return _of(config, "Gemma3ForConditionalGeneration")


def gemma3n():
    """The last two layers attend to what the last layer of their kind before them has cached."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    changes = {
        "num_hidden_layers": 5, "num_kv_shared_layers": 2, "layer_types": kinds, "sliding_window": WINDOW,
        "head_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 5,
        "vocab_size_per_layer_input": VOCAB + 6,
    }  # fmt: skip
    return _of(transformers.Gemma3nTextConfig(**{**_TEXT, **changes}), "Gemma3nForCausalLM")


def qwen2_5_vl():
    """Positions of three axes, which are one for text."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        **_PICTURES, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 8,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision, **_QWEN_VL
    )
    return _of(config, "Qwen2_5_VLForConditionalGeneration")


def qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {**_PICTURES, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    text = {**_TEXT, "head_dim": 8, "rope_parameters": rope}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_VL)
    return _of(config, "Qwen3VLForConditionalGeneration")


def mistral3():
    vision = {**_PICTURES, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    text = {**_TEXT, "model_type": "mistral", "head_dim": 8, "sliding_window": None}
    config = transformers.Mistral3Config(
        text_config=text, vision_config={**vision, "head_dim": 8}, image_token_index=VOCAB
    )
    return _of(config, "Mistral3ForConditionalGeneration")


MULTIMODAL = {model.__name__: model for model in (gemma3_with_pictures, gemma3n, qwen2_5_vl, qwen3_vl, mistral3)}


# -- models whose past cannot be rewound, or whose attention is not this engine's


def mamba():
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=4, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config).eval()


def recurrent_gemma():
    return _build("RecurrentGemma", lru_width=32, attention_window_size=8, num_hidden_layers=3)


def qwen3_next():
    """Linear attention in three layers of four."""
    return _build(
        "Qwen3Next",
        num_hidden_layers=4,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def qwen3_5():
    return _build(
        "Qwen3_5", config="{}TextConfig", num_hidden_layers=4, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip


def lfm2():
    """Short convolutions between attention layers."""
    return _build("Lfm2", layer_types=["conv", "full_attention"])


def llama4():
    """Chunked attention."""
    return _build(
        "Llama4", config="{}TextConfig", num_local_experts=2, intermediate_size_mlp=32, head_dim=8,
        attention_chunk_size=8, num_hidden_layers=4,
    )  # fmt: skip


def deepseek_v3():
    """Caches compressed keys and values, attends to expanded ones."""
    return _build(
        "DeepseekV3", num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    )  # fmt: skip


def phimoe():
    """Scales its rotary embedding by the longest position of the batch, in a place of its own."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": LONGROPE_ORIGINAL,
        "short_mscale": 1.0,
        "long_mscale": 1.2,
    }
    return _build("Phimoe", rope_parameters=rope, num_local_experts=2)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bloom():
    """A position bias added outside the attention interface."""
    return _build("Bloom", n_layer=2, n_head=4)


UNSUPPORTED = {
    model.__name__: model
    for model in (mamba, recurrent_gemma, qwen3_next, qwen3_5, lfm2, llama4, deepseek_v3, t5, bloom)
}
