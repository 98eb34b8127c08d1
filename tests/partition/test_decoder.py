"""Decoders as rows of layers against the unsplit models of transformers: logits, gradients, names, files."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnipipe.partition import measure_layers, split_decoder
from dnipipe.partition.decoder import decoder_as_sequential, export_hf, hf_names, tied_weight

V, T, B = 97, 11, 3
_SLIDING = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}
_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": _SLIDING,
    "qwen3": {"head_dim": 24},
}
FAMILIES = tuple(_OWN_OPTIONS)


def options_of(family: str, **more: Any) -> dict[str, Any]:
    """Of a small model; windows are shorter than T."""
    options = {"model_type": family, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    if family != "gpt2":
        options |= {"intermediate_size": 48, "num_key_value_heads": 1}
    return {**options, "vocab_size": V, **_OWN_OPTIONS[family], **more}


def _row(family: str, untie: bool = False, **more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return decoder_as_sequential(options_of(family, **more), untie=untie)


def _unsplit(row: nn.Sequential) -> nn.Module:
    """The model of transformers with the row's config, and copies of its weights under their names there."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_config(row[0].config)
    model.load_state_dict({theirs: row.get_parameter(ours) for ours, theirs in hf_names(row).items()}, strict=True)
    return model.train()


def _tokens(rows: int = B, length: int = T) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


def _loss(logits_BTV: Tensor, token_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), token_BT[:, 1:].flatten())


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_unsplit_model(family: str, tied: bool) -> None:
    row = _row(family, tie_word_embeddings=tied)
    model, token_BT = _unsplit(row), _tokens()
    ours, theirs = row(token_BT), model(token_BT).logits
    assert ours.shape == (B, T, V) and len(row) == 6
    assert _largest_difference(ours, theirs) < 1e-5
    _loss(ours, token_BT).backward()
    _loss(theirs, token_BT).backward()
    for name, hf_name in hf_names(row).items():
        grad = row.get_parameter(name).grad
        assert grad is not None and float(grad.abs().max()) > 0, name
        assert _largest_difference(grad, model.get_parameter(hf_name).grad) < 1e-5, name


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_token_looks_no_further_than_its_window(family: str) -> None:
    row = _row(family, num_hidden_layers=1, **({"max_window_layers": 0} if family == "qwen2" else {})).eval()
    token_BT = _tokens()
    changed_BT = token_BT.clone()
    changed_BT[:, 0] = (changed_BT[:, 0] + 1) % V
    differ_T = (row(token_BT) - row(changed_BT)).abs().amax((0, 2)) > 0
    assert differ_T.tolist() == [True] * 4 + [False] * (T - 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_depends_on_what_comes_later(family: str) -> None:
    row, token_BT = _row(family).eval(), _tokens()
    torch.testing.assert_close(row(token_BT[:, :6]), row(token_BT)[:, :6], atol=1e-5, rtol=0)


def test_dropout_is_that_of_the_config() -> None:
    row = _row("gpt2", embd_pdrop=0.3, resid_pdrop=0.2, attn_pdrop=0.1)
    model, token_BT, logits = _unsplit(row), _tokens(), []
    for each in (row, model):
        torch.manual_seed(5)
        logits.append(each(token_BT))
    assert _largest_difference(logits[0], logits[1].logits) < 1e-5
    assert _largest_difference(logits[0], row(token_BT)) > 0.01, "other random numbers"
    assert torch.equal(row.eval()(token_BT), row(token_BT))


def test_a_decoder_in_half_precision() -> None:
    row = decoder_as_sequential(options_of("llama"), dtype="bfloat16")
    assert {parameter.dtype for parameter in row.parameters()} == {torch.bfloat16}
    assert row(_tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_stages", [2, 3, 6])
def test_the_stages_chained_are_the_row(family: str, num_stages: int) -> None:
    row, token_BT = _row(family), _tokens()
    torch.manual_seed(0)
    stages = split_decoder(options_of(family), num_stages)
    assert len(stages) == num_stages
    assert torch.equal(nn.Sequential(*stages)(token_BT), row(token_BT))
    assert {name for stage in stages for name in stage.state_dict()} == set(row.state_dict())


def test_the_embedding_and_the_head_count_by_default_and_weights_replace_them() -> None:
    options = options_of("llama", num_hidden_layers=3)
    assert [len(stage) for stage in split_decoder({**options, "vocab_size": 5000}, 3)] == [1, 3, 1]
    assert [len(stage) for stage in split_decoder(options, 3, weights=[1, 1, 1, 3, 3])] == [3, 1, 1]


def test_the_layers_of_a_decoder_are_measured() -> None:
    row = _row("qwen2")
    costs = measure_layers(row, _tokens(), torch.sum, repeats=1)
    assert [cost.name.split()[1] for cost in costs] == ["Embedding", *["Block"] * 4, "Head"]
    assert sum(cost.parameter_bytes for cost in costs) == 4 * sum(p.numel() for p in row.parameters())


def test_a_tied_weight_is_one_in_one_stage_and_two_equal_copies_in_several() -> None:
    options = options_of("gpt2")
    (whole,) = split_decoder(options, 1)
    assert whole[0].tokens.weight is whole[-1].project.weight and tied_weight(whole) is None
    first, middle, last = split_decoder(options, 3)
    ends = tied_weight(first), tied_weight(last)
    assert ends[0] is first[0].tokens.weight and ends[1] is last[-1].project.weight and tied_weight(middle) is None
    assert ends[0] is not ends[1] and torch.equal(ends[0], ends[1])


def test_an_untied_head_starts_as_a_copy_and_nothing_is_tied() -> None:
    first, last = split_decoder(options_of("gpt2"), 2, untie=True)
    assert torch.equal(first[0].tokens.weight, last[-1].project.weight)
    assert tied_weight(first) is None and tied_weight(last) is None
    row = _row("gpt2", untie=True)
    assert row[0].tokens.weight is not row[-1].project.weight
    assert "lm_head.weight" in _unsplit(row).state_dict()


@pytest.mark.parametrize("form", ["row", "stages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_transformers_loads_and_so_do_we(family: str, form: str, tmp_path: Any) -> None:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    stages = split_decoder(options_of(family), 1 if form == "row" else 3)
    row, token_BT = nn.Sequential(*stages).eval(), _tokens()
    export_hf(stages[0] if form == "row" else stages, tmp_path / "new" / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", use_safetensors=True)
    assert _largest_difference(row(token_BT), model.eval()(token_BT).logits) < 1e-5
    assert model.config.tie_word_embeddings == (family == "gpt2")
    back = decoder_as_sequential(tmp_path / "new" / "model")
    assert back.training and all(part.training for part in back.modules())
    assert torch.equal(row(token_BT), back.eval()(token_BT))


def test_ends_that_have_come_to_differ_are_exported_as_two_weights(tmp_path: Any) -> None:
    transformers = importlib.import_module("transformers")
    row = _row("gpt2", untie=True)
    with torch.no_grad():
        row[-1].project.weight.add_(torch.randn(V, 32))
    export_hf(row, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert not model.config.tie_word_embeddings
    assert _largest_difference(row.eval()(_tokens()), model.eval()(_tokens()).logits) < 1e-5


def test_a_part_of_a_decoder_is_not_exported(tmp_path: Any) -> None:
    stages = split_decoder(options_of("llama"), 3)
    for part in (stages[:2], stages[1:], [stages[0], stages[2]], stages[0]):
        with pytest.raises(ValueError, match="no whole decoder of 4 blocks: give all stages in order"):
            export_hf(part, tmp_path)
    with pytest.raises(ValueError, match="nothing is no whole decoder"):
        export_hf([], tmp_path)
    with pytest.raises(TypeError, match="a ReLU is no layer of a decoder"):
        export_hf(nn.Sequential(nn.ReLU()), tmp_path)


def test_a_config_object_and_a_folder_without_weights_are_taken_and_left_as_they_are(tmp_path: Any) -> None:
    config = _row("qwen2").pop(0).config
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    rows = []
    for source in (config, tmp_path, str(tmp_path)):
        torch.manual_seed(0)
        rows.append(decoder_as_sequential(source, untie=True))
    assert config.tie_word_embeddings
    assert all(torch.equal(row(_tokens()), rows[0](_tokens())) for row in rows)


@pytest.mark.parametrize("source", [{"model_type": "bloom"}, {"hidden_size": 32}, object()])
def test_another_model_is_refused_with_the_list_of_those_known(source: Any) -> None:
    with pytest.raises(ValueError, match="none of the decoders known here: gpt2, llama, mistral, qwen2, qwen3"):
        decoder_as_sequential(source)


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(ValueError, match="'hidden_sise' is no option of a llama config: see LlamaConfig"):
        decoder_as_sequential({"model_type": "llama", "hidden_sise": 32})


@pytest.mark.parametrize("dtype", ["float12", "int64", "nn"])
def test_a_dtype_that_is_none_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype = '{dtype}' must be a floating-point type of torch"):
        decoder_as_sequential(options_of("llama"), dtype=dtype)


def test_a_name_of_the_hub_is_not_downloaded() -> None:
    with pytest.raises(FileNotFoundError, match="gpt2 is no folder with a config.json: models are not downloaded here"):
        decoder_as_sequential("gpt2")


def test_pickles_are_neither_loaded_nor_passed_over(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(options_of("llama")))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin, a pickle, .*: convert them to safetensors"):
        decoder_as_sequential(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Any) -> None:
    export_hf(_row("qwen3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    config |= {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FileNotFoundError, match="lacks 11 weights of its model, such as model.layers.4.input_layernorm"
    ):
        decoder_as_sequential(tmp_path)


def test_a_sequence_beyond_the_learned_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences of 17 tokens; the model has 16 learned positions"):
        _row("gpt2")(_tokens(length=17))


def test_dnipipe_is_imported_without_transformers_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, dnipipe; dnipipe.split_decoder; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"need transformers: pip install 'dnipipe\[hf\]'"):
        decoder_as_sequential(options_of("llama"))
