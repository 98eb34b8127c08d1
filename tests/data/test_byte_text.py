"""Bytes of text: the same batch on every rank, from the file it should come from, one byte apart."""

import sysconfig
from pathlib import Path

import pytest
import torch

from dnipipe.data import ByteCorpus, byte_corpus, stdlib_sources


def _files(tmp_path, texts):
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number:03}.py")
        paths[-1].write_bytes(text)
    return paths


def _numbers(num_train=200, num_validation=50):
    return ByteCorpus(torch.arange(num_train, dtype=torch.uint8), torch.arange(num_validation, dtype=torch.uint8))


def test_every_twentieth_file_is_validation_and_no_byte_is_lost(tmp_path):
    texts = [bytes([number]) * 3 for number in range(45)]
    corpus = byte_corpus(_files(tmp_path, texts), max_bytes=10**6)
    assert bytes(corpus.validation.tolist()) == texts[19] + texts[39]
    assert bytes(corpus.train.tolist()) == b"".join(texts[n] for n in range(45) if n not in (19, 39))


def test_empty_files_are_not_counted(tmp_path):
    texts = [b""] * 30 + [bytes([number]) for number in range(20)]
    corpus = byte_corpus(_files(tmp_path, texts), max_bytes=100)
    assert corpus.validation.tolist() == [19]


def test_max_bytes_counts_both_splits_and_cuts_the_last_file(tmp_path):
    corpus = byte_corpus(_files(tmp_path, [b"abc"] * 40), max_bytes=100)
    assert len(corpus.train) + len(corpus.validation) == 100
    assert corpus.train[-1] == ord("a")


def test_too_little_text_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match="read 9 bytes in 3 files.*give more text"):
        byte_corpus(_files(tmp_path, [b"abc"] * 3), max_bytes=100)
    with pytest.raises(ValueError, match="raise max_bytes"):
        byte_corpus(_files(tmp_path, [b"abc"] * 40), max_bytes=10)


def test_a_training_batch_is_windows_of_the_stream_and_the_target_is_one_byte_later():
    inputs, targets = _numbers().batch("train", step=3, batch_size=64, seq_len=9, seed=1)
    assert inputs.shape == targets.shape == (64, 9)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(9))
    assert torch.equal(targets, inputs + 1)


def test_training_windows_reach_both_ends_of_the_stream():
    inputs, targets = _numbers(12).batch("train", step=0, batch_size=500, seq_len=9, seed=0)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    assert targets.max() == 11


def test_a_batch_depends_on_seed_and_step_and_on_nothing_else():
    def draw(seed, step):
        return _numbers().batch("train", step=step, batch_size=8, seq_len=4, seed=seed)[0]

    first = draw(5, 2)
    torch.manual_seed(99)
    draw(1, 1)
    assert torch.equal(draw(5, 2), first)
    others = [draw(5, 3), draw(6, 2), draw(2, 5)]
    assert not any(torch.equal(other, first) for other in others)


def test_validation_windows_follow_one_another_and_begin_anew():
    corpus = _numbers(num_validation=50)  # 7 targets a window: windows 0..6 end at byte 49
    starts = []
    for step in range(3):
        inputs, targets = corpus.batch("validation", step=step, batch_size=3, seq_len=7, seed=step)
        assert torch.equal(targets, inputs + 1)
        starts += inputs[:, 0].tolist()
    assert starts == [0, 7, 14, 21, 28, 35, 42, 0, 7]


def test_a_split_shorter_than_one_window_is_refused_by_name():
    _numbers(num_validation=8).batch("validation", step=0, batch_size=1, seq_len=7, seed=0)
    with pytest.raises(ValueError, match="validation split has 7 bytes.*seq_len = 7 needs 8"):
        _numbers(num_validation=7).batch("validation", step=0, batch_size=1, seq_len=7, seed=0)


@pytest.mark.parametrize("bad", [{"step": -1}, {"seed": -1}, {"batch_size": 0}, {"seq_len": 0}])
def test_a_number_out_of_range_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        _numbers().batch("train", **{"step": 0, "seed": 0, "batch_size": 1, "seq_len": 1, **bad})


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        _numbers().batch("test", step=0, batch_size=1, seq_len=1, seed=0)


def test_the_standard_library_is_found_sorted_and_alone():
    paths = stdlib_sources()
    root = Path(sysconfig.get_paths()["stdlib"])
    assert root / "json" / "decoder.py" in paths
    assert paths == sorted(paths)
    assert not any("site-packages" in path.relative_to(root).parts for path in paths)


def test_the_standard_library_fills_a_corpus():
    corpus = byte_corpus(stdlib_sources(), max_bytes=2_000_000)
    assert len(corpus.train) > 1_000_000 and len(corpus.validation) > 10_000
