"""Token files are mapped and not read, divided as text is, and whatever is wrong with one is said with its place."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dnipipe.data import open_corpus

MIB = 1 << 20


def _open(*files, **settings):
    return open_corpus("tokens", files, max_bytes=1, **settings)


def _stream(corpus, split):
    """All tokens of a split, one by one."""
    stream = getattr(corpus, split)
    return stream.windows(np.array([0]), len(stream))[0].tolist()


def _write(path, tokens, dtype="<u2"):
    np.array(tokens, dtype=dtype).tofile(path)
    return path


def test_every_twentieth_file_is_validation_and_no_token_is_lost(tmp_path):
    for number in range(45):
        _write(tmp_path / f"{number:02}.bin", [number] * 3)
    corpus = _open(tmp_path)
    assert _stream(corpus, "validation") == [19] * 3 + [39] * 3
    assert _stream(corpus, "train") == [n for n in range(45) if n not in (19, 39) for _ in range(3)]


def test_of_few_files_the_last_twentieth_of_each_is_validation(tmp_path):
    _write(tmp_path / "a.bin", range(40))
    _write(tmp_path / "b.bin", [])
    _write(tmp_path / "c.bin", range(100, 119))  # shorter than 20: all of it is for training
    _write(tmp_path / "d.bin", range(200, 260))
    corpus = _open(tmp_path)
    assert _stream(corpus, "train") == [*range(38), *range(100, 119), *range(200, 257)]
    assert _stream(corpus, "validation") == [38, 39, 257, 258, 259]


def test_a_window_goes_on_in_the_next_file(tmp_path):
    for number, (first, last) in enumerate([(0, 10), (10, 11), (11, 13), (13, 400)]):
        _write(tmp_path / f"{number}.bin", range(first, last))
    inputs, targets = _open(tmp_path).batch("train", step=0, batch_size=10_000, seq_len=9, seed=0)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(9)) and torch.equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == set(range(381 - 9))  # 381 for training, and none of them left out


def test_a_folder_is_its_token_files_sorted_and_a_file_comes_where_it_is_given(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    first = _write(tmp_path / "z.bin", [1] * 20)
    _write(folder / "c.bin", [4] * 20)
    np.save(folder / "b" / "x.npy", np.full(20, 3))
    _write(folder / "a.bin", [2] * 20)
    _write(folder / ".hidden" / "d.bin", [9] * 20)
    _write(folder / ".e.bin", [9] * 20)
    (folder / "readme.txt").write_text("no tokens")
    assert _stream(_open(first, folder), "validation") == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_raw_file_is_little_endian_of_the_width_that_is_given(tmp_path, dtype):
    width = np.dtype(dtype).itemsize
    largest = 256**width - 1
    tokens = [1, 256, largest] * 20
    (tmp_path / "a.bin").write_bytes(b"".join(token.to_bytes(width, "little") for token in tokens))
    corpus = _open(tmp_path, token_dtype=dtype)
    assert _stream(corpus, "train") + _stream(corpus, "validation") == tokens


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u4", "int32", "int64"])
def test_a_numpy_file_says_its_own_width(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=dtype))
    assert _stream(_open(tmp_path), "train") == list(range(95))


def _resident_mib(kind):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc/self/status")
@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_a_file_is_mapped_and_only_what_a_batch_touches_becomes_resident(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with open(path, "wb") as file:
        if suffix == "npy":
            header = {"descr": "<u2", "fortran_order": False, "shape": (100 * MIB,)}
            np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 200 * MIB)
    before = _resident_mib("VmRSS")
    corpus = _open(path, vocab_size=10)
    for step in range(10):
        corpus.batch("train", step=step, batch_size=8, seq_len=1024, seed=0)
    assert len(corpus.train) == 95 * MIB
    assert _resident_mib("VmRSS") - before < 40


def test_a_token_outside_of_the_vocabulary_is_refused_with_its_place(tmp_path):
    _write(tmp_path / "a.bin", [5] * 100)
    path = _write(tmp_path / "b.bin", [5] * 97 + [50257] + [5] * 2)
    corpus = _open(tmp_path, vocab_size=50257)
    settings = {"step": 0, "batch_size": 2, "seq_len": 4, "seed": 0}
    corpus.batch("train", **settings)
    with pytest.raises(ValueError) as refusal:
        corpus.batch("validation", **settings)
    assert f"{path}, token 97 is 50257, but vocab_size = 50257 allows 0 to 50256: raise" in str(refusal.value)
    _open(tmp_path, vocab_size=50258).batch("validation", **settings)
    _open(tmp_path).batch("validation", **settings)


def test_a_negative_token_is_refused_where_there_is_a_vocabulary(tmp_path):
    np.save(tmp_path / "a.npy", np.array([-1] * 60))
    with pytest.raises(ValueError, match="a.npy, token .* is -1"):
        _open(tmp_path, vocab_size=7).batch("train", step=0, batch_size=1, seq_len=3, seed=0)


def test_tokens_without_a_tokenizer_are_no_text(tmp_path):
    corpus = _open(_write(tmp_path / "a.bin", [5] * 100))
    for call in (lambda: corpus.encode("a"), lambda: corpus.decode([5])):
        with pytest.raises(ValueError, match="there is no tokenizer between these tokens and text"):
            call()


def _odd(path):
    path.write_bytes(b"abc")


def _square(path):
    np.save(path, np.zeros((20, 20), dtype=int))


def _floats(path):
    np.save(path, np.zeros(200))


def _pickled(path):
    np.save(path, np.array([{}] * 100), allow_pickle=True)


def _cut(path):
    np.save(path, np.zeros(200, dtype=int))
    path.write_bytes(path.read_bytes()[:-800])


def _nothing(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "write", "refusal"),
    [
        ("a.bin", _odd, "has 3 bytes: it must be a multiple of 2, a token of uint16; check token_dtype"),
        ("a.bin", _nothing, "0 tokens in 1 files; one token in 20 is for validation: give more"),
        ("a.npy", _square, "is int64 of shape (20, 20): tokens must be integers in one row"),
        ("a.npy", _floats, "is float64 of shape (200,): tokens must be integers in one row"),
        ("a.npy", _pickled, "is no whole .npy of numbers"),
        ("a.npy", _cut, "is no whole .npy of numbers"),
        ("a.npy", _nothing, "is no whole .npy of numbers"),
        ("a.txt", _odd, "its name must end in .bin or .npy"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path, name, write, refusal):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=re.escape(refusal)) as error:
        _open(path)
    assert str(path) in str(error.value) or write is _nothing


def test_a_path_without_files_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=f"the folder {tmp_path} holds no .bin or .npy file"):
        _open(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file or folder {tmp_path / 'b'}"):
        _open(tmp_path / "b")
