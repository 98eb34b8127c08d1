"""A batch follows from the seed and the step, whoever asks: another process, or several replicas a part each."""

import numpy as np
import pytest
import torch

from dnipipe.data import open_corpus
from tests.ranks import run_ranks


@pytest.fixture
def corpora(tmp_path):
    numbers = np.random.default_rng(0).integers(256, size=6000)
    (tmp_path / "a.txt").write_bytes(numbers.astype(np.uint8).tobytes())
    np.save(tmp_path / "a.npy", numbers)
    numbers.astype("<u2").tofile(tmp_path / "a.bin")
    return [
        open_corpus("bytes", [tmp_path / "a.txt"], max_bytes=10**6),
        open_corpus("tokens", [tmp_path / "a.npy"], max_bytes=1),
        open_corpus("tokens", [tmp_path / "a.bin"], max_bytes=1),
    ]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
def test_the_parts_of_all_replicas_are_the_batch_of_one(corpora, split, num_replicas):
    for corpus in corpora:
        for step in range(3):
            whole = corpus.batch(split, step=step, batch_size=8, seq_len=16, seed=3)
            parts = [
                corpus.batch(
                    split, step=step, batch_size=8 // num_replicas, seq_len=16, seed=3,
                    replica=replica, num_replicas=num_replicas,
                )
                for replica in range(num_replicas)
            ]  # fmt: skip
            for tensor, shares in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(torch.cat(shares), tensor)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_kind_cuts_the_same_stream_into_the_same_batches(corpora, split):
    batches = [corpus.batch(split, step=7, batch_size=4, seq_len=16, seed=2) for corpus in corpora]
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (4, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(inputs, batches[0][0]) and torch.equal(targets, batches[0][1])


@pytest.mark.parametrize(
    ("bad", "refusal"),
    [
        ({"replica": -1}, "replica = -1; it must be at least 0"),
        ({"replica": 2, "num_replicas": 2}, "replica = 2; it must be below num_replicas = 2"),
        ({"num_replicas": 0}, "num_replicas = 0; it must be at least 1"),
    ],
)
def test_a_replica_that_there_is_not_is_refused(corpora, bad, refusal):
    for corpus in corpora:
        with pytest.raises(ValueError, match=refusal):
            corpus.batch("train", step=0, batch_size=1, seq_len=1, seed=0, **bad)


def test_a_split_shorter_than_one_window_is_refused_in_its_own_unit(corpora):
    for corpus, unit in zip(corpora, ("bytes", "tokens", "tokens"), strict=True):
        with pytest.raises(ValueError, match=f"validation split has 300 {unit}, but seq_len = 300 needs 301"):
            corpus.batch("validation", step=0, batch_size=1, seq_len=300, seed=0)


def _batches(corpus):
    return [corpus.batch("train", step=step, batch_size=4, seq_len=16, seed=5)[1] for step in (9, 3)]


def _batches_of(rank, world, path):
    return _batches(open_corpus("tokens", [path], max_bytes=1))


def test_other_processes_see_the_same_batches(corpora, tmp_path):
    ours = torch.stack(_batches(corpora[2]))
    for theirs in run_ranks(2, _batches_of, tmp_path / "a.bin"):
        assert torch.equal(torch.stack(theirs), ours)
