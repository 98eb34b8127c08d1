"""What one does around a run: look at it before, train on tokens with Muon in bfloat16, let the result write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dnipipe.cli import main
from dnipipe.trainer.trained import load_trained
from tests.trainer.test_trainer import TINY, _records, _train

DECODER = [
    "model.factory=dnipipe.partition:decoder_as_sequential",
    "model.options={source: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64}, untie: true}",
    "model.dtype=bfloat16", "data.kind=tokens", "data.vocab_size=64", "run.sample_tokens=0", "run.compare_with=[]",
    "model.recompute=true", "optim.name=Muon", "optim.schedule=cosine", "optim.warmup_steps=5",
    "pipeline.unlock_after_steps=5",
]  # fmt: skip


def test_a_dry_run_shows_split_memory_and_bubble_and_trains_nothing(tmp_path: Path) -> None:
    done = _train([*TINY, f"run.output_dir={tmp_path / 'new'}", "--dry-run"], COLUMNS="150")
    assert done.returncode == 0, done.stderr
    for said in ("1 Block", "weights, gradients, moments MB", "DNI synthetic: a step takes", "P is what local_head"):
        assert said in done.stdout, done.stdout
    assert not (tmp_path / "new").exists()
    wrong = _train([*TINY, "pipeline.lag=0", "--dry-run"], torchrun=False)
    assert wrong.returncode == 2 and "pipeline.lag = 0" in wrong.stderr


def test_a_decoder_learns_tokens_with_muon_in_bfloat16_recomputing(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the optional dependency that makes the decoder")
    walk = np.cumsum(np.random.default_rng(0).integers(0, 3, 200_000)) % 64  # the next token is one of three
    tokens = tmp_path / "tokens.bin"
    walk.astype("<u2").tofile(tokens)
    done = _train([*TINY, *DECODER, f"data.files=[{tokens}]", f"run.output_dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stderr
    records = _records(tmp_path / "run", "DNI")
    assert 5.0 < records[0]["loss"] / np.log(2) < 7.0, "log2 of 64 tokens is 6 bits"
    assert records[-1]["val_bits"] < 4.0, "log2 of 3 is 1.6 bits"
    assert "bits per token" in done.stdout
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    _, ours = load_trained(tmp_path / "run")
    tokens_BT = torch.arange(32)[None]
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(theirs.float()(tokens_BT).logits, ours.float()(tokens_BT))


def test_the_model_of_a_run_writes_the_same_for_the_same_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    done = _train([*TINY, "run.steps=12", "run.trace_steps=[]", f"run.output_dir={run}"])
    assert done.returncode == 0, done.stderr
    command = ["generate", str(run), "--prompt", "def ", "--tokens", "24"]
    texts = []
    for arguments in (command, command, [*command, "--seed", "1"], [*command, "--schedule", "1F1B"]):
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ") and texts[0] != texts[2]
    # 12 steps: DNI still waits for true gradients, and has learned bit for bit what 1F1B has
    assert texts[0] == texts[1] == texts[3]
    for wrong, said in (
        ([str(tmp_path), "--prompt", "a"], "config.yaml"),
        ([str(run), "--prompt", ""], "--prompt is empty"),
        ([str(run), "--prompt", "a", "--tokens", "0"], "--tokens 0: it must be above 0"),
        ([str(run), "--prompt", "a", "--schedule", "GPipe"], "holds no checkpoint"),
    ):
        assert main(["generate", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "hf")]) == 2
    assert "makes no Hugging Face decoder" in capsys.readouterr().err and not (tmp_path / "hf").exists()
