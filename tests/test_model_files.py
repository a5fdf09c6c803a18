"""The files of a model folder: what is read from them, and one line with file and key for what cannot be read."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quasar.config.schema import ModelSource
from quasar.errors import QuasarError, RequestError
from quasar.model import json_files
from quasar.model.config_file import config_of, read_config
from quasar.model.loading import load_transformer
from quasar.model.rope import Rope
from quasar.model.sources import Checkpoint, locate
from quasar.model.tokenizer import _byte_tokenizer, load_tokenizer

TOKENS = torch.arange(20)
CONFIG = LlamaConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=256,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5)
    model.save_pretrained(tmp_path)
    _byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not DELETE}))


def read_all(folder: Path) -> None:
    load_tokenizer(Checkpoint("model", folder, "here"))
    load_transformer(folder, torch.float32)


DELETE = object()


def theirs(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def ours(folder: Path) -> torch.Tensor:
    return load_transformer(folder, torch.float32)(TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 100_000_000}, r"config\.json: num_hidden_layers=100000000"),
        ({"num_hidden_layers": "2"}, r"config\.json: num_hidden_layers=\"2\""),
        ({"num_hidden_layers": True}, "num_hidden_layers=true"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* and 8 more, which config\.json does not imply"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* and 8 more are missing"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"vocab_size": 300}, r"embed_tokens\.weight has shape \(320, 32\)"),
        ({"hidden_size": DELETE}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "NaN is no JSON number"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"architectures": {}}, "architectures"),
        ({"attention_bias": True}, r"bias and \d+ more are missing"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 changes"),
        ({"transform_config": {"R1": {}}}, "transform_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 5.0}, r"rope_theta=5\.0, rope_parameters\.rope_theta=10000\.0 disagree"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "disagree"),
        ({"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "disagree"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters: factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "nobody_knows": 1}}, "nobody_knows"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"eos_token_id": "256"}, r"config\.json: eos_token_id"),
        ({"eos_token_id": 320}, "eos_token_id=320 is beyond"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"layer_types\.1"),
    ],
)
def test_configs_that_cannot_be_read(changes: dict[str, object], message: str, folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", **changes)
    started = time.process_time()
    with pytest.raises(RequestError, match=message) as caught:
        read_all(folder)
    assert time.process_time() - started < 20
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must contain a JSON object"),
        ("{" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "key 'model_type' has two different values"),
        ("\xff", "not valid JSON"),
    ],
)
def test_json_that_is_no_config(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=message):
        read_config(folder)


def test_unknown_keys_are_named_once(folder: Path) -> None:
    edit(folder / "config.json", nobody_knows=1)
    json_files.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="key 'nobody_knows' is not known"):
        read_config(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(folder)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_missing_keys_mean_what_transformers_makes_of_them(kind: str) -> None:
    needed = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    ours = config_of({"model_type": kind, **needed})
    theirs = AutoConfig.for_model(kind, **needed)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.layers[0].num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.layers[0].window == (theirs.sliding_window if kind == "mistral" else None)
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = [1.0 + index for index in range(4)]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
        YARN | {"truncate": False},
        YARN | {"attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        LONG,
        LONG | {"attention_factor": 1.0},
    ],
)
def test_rope_scaling_equals_transformers(rope: dict, folder: Path) -> None:
    edit(folder / "config.json", rope_parameters=rope)
    assert torch.allclose(ours(folder), theirs(folder), atol=1e-4)
    assert Rope(read_config(folder).rope, 8).frequencies.shape == (4,)


def test_longrope_whose_frequencies_depend_on_the_length_ends_the_context(folder: Path) -> None:
    """Longer texts rotate by other factors, also where the keys are in the cache already."""
    edit(folder / "config.json", rope_parameters=LONG | {"long_factor": [2.0] * 4})
    with pytest.warns(RuntimeWarning, match="the context ends after 64 tokens"):
        config = read_config(folder)
    assert config.context_length == 64
    assert config.rope.factors == tuple(FACTORS)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_tying_follows_transformers(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    json_files.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="they are not tied"):
        found = ours(folder)
    assert torch.allclose(found, theirs(folder), atol=1e-4)
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: tensors[HEAD].clone()}))
    assert torch.allclose(ours(folder), theirs(folder), atol=1e-4)
    assert read_config(folder).tie_word_embeddings
    rewrite(folder, lambda tensors: tensors.pop(EMBEDDING))
    assert torch.allclose(ours(folder), theirs(folder), atol=1e-4)
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(RequestError, match=r"embed_tokens\.weight is missing"):
        ours(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            r"q_proj\.bias, which",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}),
            r"layers\.2.*, which",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)}), r"norm\.weight has shape \(1,\)"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).int()}), r"norm\.weight is I32"),
        # The rows of k and v fit if they are only counted together.
        (
            lambda tensors: tensors.update(
                {
                    "model.layers.0.self_attn.k_proj.weight": torch.ones(8, 32),
                    "model.layers.0.self_attn.v_proj.weight": torch.ones(24, 32),
                }
            ),
            r"k_proj\.weight has shape \(8, 32\)",
        ),
    ],
)
def test_tensors_are_exactly_those_that_the_config_implies(
    change: Callable[[dict], None], message: str, folder: Path
) -> None:
    rewrite(folder, change)
    with pytest.raises(RequestError, match=message):
        ours(folder)


def test_buffers_that_transformers_computes_may_be_there(folder: Path) -> None:
    expected = ours(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(ours(folder), expected)


def sharded(folder: Path) -> dict[str, str]:
    """Write the weights as two shards with an index; returns its weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    listed = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return listed


def test_shards_are_those_of_the_index(folder: Path) -> None:
    expected = ours(folder)
    listed = sharded(folder)
    index = folder / "model.safetensors.index.json"
    assert torch.equal(ours(folder), expected)
    first, second = sorted(set(listed.values()))

    def refused(message: str, **changes: object) -> None:
        edit(index, **changes)
        with pytest.raises(RequestError, match=message):
            ours(folder)

    name = next(iter(listed))
    refused(f"{name}, which .*index.json does not list", weight_map={n: f for n, f in listed.items() if n != name})
    refused(f"tensor {name} is not in {second}", weight_map=listed | {name: second})
    refused("tensor extra is not in", weight_map=listed | {"extra": first})
    refused(r"weight_map\.x='\.\./x\.safetensors'", weight_map=listed | {"x": "../x.safetensors"})
    refused("weight_map", weight_map=[1])
    index.unlink()
    assert torch.equal(ours(folder), expected)
    save_file({name: load_file(folder / first)[name]}, folder / "model-00001-of-00003.safetensors")
    with pytest.raises(RequestError, match="are not the parts of one model"):
        ours(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / second).unlink()
    with pytest.raises(RequestError, match="not the parts of one model"):
        ours(folder)


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="merge the adapter"):
        ours(folder)


def loaded_tokenizer(folder: Path):
    return load_tokenizer(Checkpoint("model", folder, "here"))


def test_stop_tokens_follow_transformers(folder: Path) -> None:
    def both() -> tuple[frozenset[int], object]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return loaded_tokenizer(folder).stop_tokens, model.generation_config.eos_token_id

    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [256, 257]}))
    assert both() == (frozenset({256, 257}), [256, 257])
    generation.write_text(json.dumps({"do_sample": True}))
    json_files.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="names no eos_token_id"):
        assert both() == (frozenset(), None)
    generation.unlink()
    assert both() == (frozenset({256}), 256)
    edit(folder / "config.json", eos_token_id=DELETE)
    assert both() == (frozenset({256}), None), "the tokenizer's, where transformers has none"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "2"}', r"generation_config\.json: eos_token_id=\"2\""),
        ("generation_config.json", '{"eos_token_id": [true]}', r"generation_config\.json: eos_token_id"),
        ("generation_config.json", '{"eos_token_id": 999}', "eos_token_id=999 is beyond"),
        ("generation_config.json", "[]", "must contain a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', r"tokenizer_config\.json: chat_template=5"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"eos_token": 5}', r"tokenizer_config\.json: eos_token=5"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON"),
        ("special_tokens_map.json", '{"eos_token": [1]}', r"special_tokens_map\.json: eos_token"),
        ("added_tokens.json", '{"a": -1}', r"added_tokens\.json: a=-1"),
        ("tokenizer.json", "{", r"tokenizer\.json: not valid JSON"),
        ("tokenizer.json", "{}", r"tokenizer\.json: model is missing"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}',
            r"tokenizer\.json: model\.vocab",
        ),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{"id": -5, "content": "b"}]}',
            r"tokenizer\.json: added_tokens\.0\.id=-5",
        ),
    ],
)
def test_damaged_tokenizers(file: str, content: str, message: str, folder: Path) -> None:
    (folder / file).write_text(content)
    with pytest.raises(RequestError, match=message) as caught:
        loaded_tokenizer(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"contains no tokenizer; it needs one of tokenizer\.json"):
        loaded_tokenizer(folder)


def test_tokens_beyond_the_embedding_are_named_when_they_occur(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 400, "content": "<far>", "special": True}
    content["added_tokens"].append({**content["added_tokens"][0], **token})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit(folder / "config.json", vocab_size=260)
    tokenizer = loaded_tokenizer(folder)
    assert tokenizer.encode("near") == _byte_tokenizer().encode("near", add_special_tokens=False)
    with pytest.raises(RequestError, match=r"'<far>' the id \d+, but config\.json has vocab_size=260"):
        tokenizer.encode("<far>")


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CUBIC = "{% set t = messages[0].content %}" + "{% for a in t %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED, "takes more than 5 s"),
        (CUBIC, "takes more than 5 s"),
        ("{{ 'x' * 10000000000 }}", "needs more than 1024 MiB"),
        ("{{ 'x' * 5000000 }}", "more than 4194304 characters"),
        (
            "{% set ns = namespace(t='x') %}{% for a in range(40) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
            "MiB|characters",
        ),
    ],
)
def test_chat_templates_are_bounded(template: str, message: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match=f"its chat template .*({message})"):
        loaded_tokenizer(folder)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages.nothing.more }}", "{% if %}", "{{ raise_exception('no') }}"]
)
def test_failing_chat_templates_are_named(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match="the chat template fails"):
        loaded_tokenizer(folder).encode_chat([{"role": "user", "content": "hello"}])


def test_a_partly_filled_hub_cache_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(name="model", source="hub", repo="somebody/model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert locate(source).folder == folder
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(QuasarError, match=r"could not be downloaded from the hub \(its local copy is incomplete"):
            locate(source)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"],
)
def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(RequestError, match=rf"{re.escape(name)}: is a pipe"):
        read_all(folder)
