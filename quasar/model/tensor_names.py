"""Which tensors of a Hugging Face checkpoint the parameters of `Transformer` are made of."""

from __future__ import annotations

from quasar.model.config import ModelConfig
from quasar.model.transformer import Transformer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names of the embedding and of the output layer in a checkpoint."""

# Name of a tensor in `Transformer` -> names of the checkpoint's tensors whose rows are stacked.
_TOP = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight"}
_BLOCK = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.{kind}": ["self_attn.q_proj.{kind}", "self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}"],
    "attention.output.{kind}": ["self_attn.o_proj.{kind}"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention_post_norm.weight": ["post_attention_layernorm.weight"],
    "mlp_post_norm.weight": ["post_feedforward_layernorm.weight"],
    "mlp.gate_up.{kind}": ["mlp.gate_proj.{kind}", "mlp.up_proj.{kind}"],
    "mlp.down.{kind}": ["mlp.down_proj.{kind}"],
}


def source_names(model: Transformer) -> dict[str, list[str]]:
    """Map every parameter of the model to the tensors of a Hugging Face checkpoint that are stacked in it.

    Tied weights occur once.
    """
    in_block = _block_names(model.config)
    names: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if name in _TOP:
            names[name] = [_TOP[name]]
        elif name == "lm_head.weight":
            names[name] = [name]
        else:
            _, index, rest = name.split(".", 2)
            kind = rest.rsplit(".", 1)[1]
            sources = in_block[rest] if rest in in_block else in_block[rest.removesuffix(kind) + "{kind}"]
            names[name] = [f"model.layers.{index}.{source.format(kind=kind)}" for source in sources]
    return names


def _block_names(config: ModelConfig) -> dict[str, list[str]]:
    # The name of the norm before the MLP is that of the norm after attention in models that have the latter.
    own = {"mlp_norm.weight": [f"{'pre_feedforward' if config.post_norms else 'post_attention'}_layernorm.weight"]}
    if config.fused_tensors:
        own["attention.qkv.{kind}"] = ["self_attn.qkv_proj.{kind}"]
        own["mlp.gate_up.{kind}"] = ["mlp.gate_up_proj.{kind}"]
    return {**_BLOCK, **own}


def source_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a Hugging Face checkpoint of the model, by name."""
    config = model.config
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sources in source_names(model).items():
        shape = tuple(model.get_parameter(name).shape)
        rows: tuple[int, ...] = (shape[0],)
        if len(sources) == 3:
            layer = config.layers[int(name.split(".")[1])]
            rows = tuple(config.head_dim * heads for heads in (layer.num_heads, *2 * (layer.num_kv_heads,)))
        elif len(sources) == 2:
            rows = (shape[0] // 2,) * 2
        shapes |= {source: (count, *shape[1:]) for source, count in zip(sources, rows, strict=True)}
    return shapes
