"""Text through a tokenizer comes back as it was, is tokenized once per content, and nobody reads half a cache."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dnipipe.data import open_corpus, tokenizer
from tests.ranks import run_ranks

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers comes with pip install 'dnipipe[hf]'")

TEXTS = [f"def name_{n}(übergabe):\n    return übergabe + {n}\n" * 20 for n in range(25)]


def train_tokenizer(path, vocab_size=300):
    """A tiny byte-level BPE with marks around a text, whose file also asks for short and filled-up inputs."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    bpe.enable_truncation(8)
    bpe.enable_padding(length=50)
    bpe.save(str(path))
    return path


@pytest.fixture
def source(tmp_path):
    """A folder of texts, the tokenizer beside it, and where the cache shall be."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    train_tokenizer(tmp_path / "tokenizer.json")
    return folder


def _open(folder, **settings):
    beside = {"tokenizer": folder.parent / "tokenizer.json", "cache": folder.parent / "cache"}
    return open_corpus("text", [folder], **{"max_bytes": 10**6, **beside, **settings})


def _stream(corpus, split):
    stream = getattr(corpus, split)
    return stream.windows(np.array([0]), len(stream))[0].tolist()


def _entries(folder):
    return sorted(path.name for path in (folder.parent / "cache").iterdir())


@pytest.fixture
def tokenized(monkeypatch):
    """The texts that were tokenized, in order."""
    texts, encode = [], tokenizer.Tokenizer.encode

    def watched(self, text, **settings):
        texts.append(text)
        return encode(self, text, **settings)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode", watched)
    return texts


def test_text_comes_back_whole_with_a_mark_around_each_file_and_every_20th_is_validation(source):
    corpus = _open(source)
    assert corpus.decode(_stream(corpus, "validation")) == f"<s>{TEXTS[19]}</s>"
    train = [text for number, text in enumerate(TEXTS) if number != 19]
    assert corpus.decode(_stream(corpus, "train")) == "".join(f"<s>{text}</s>" for text in train)
    assert len(corpus.train) < sum(len(text.encode()) for text in train) / 2  # else they would be bytes
    assert corpus.vocab_size == 300
    inputs, targets = corpus.batch("train", step=1, batch_size=4, seq_len=8, seed=0)
    assert inputs.shape == (4, 8) and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_prompt_has_no_marks_and_comes_back(source):
    corpus = _open(source)
    prompt = "def übergabe, and what was in no text: \N{SNOWMAN}"
    assert corpus.decode(corpus.encode(prompt)) == prompt


def test_what_was_tokenized_once_is_mapped_from_then_on(source, tokenized):
    first = _open(source)
    assert len(tokenized) == 25
    again = _open(source)
    assert len(tokenized) == 25
    assert _stream(again, "train") == _stream(first, "train")


def test_the_cache_goes_by_content_and_not_by_name(source, tokenized):
    _open(source)
    entries = _entries(source)
    moved = source.rename(source.parent / "moved")
    (moved / "03.txt").touch()
    _open(moved)
    assert _entries(moved) == entries and len(tokenized) == 25
    (moved / "03.txt").write_text(TEXTS[3].replace("return", "assert"), encoding="utf-8")
    changed = _open(moved)
    assert len(_entries(moved)) == 2 and len(tokenized) == 50
    assert "assert" in changed.decode(_stream(changed, "train"))
    train_tokenizer(moved.parent / "tokenizer.json", vocab_size=280)
    assert _open(moved).vocab_size == 280 and len(_entries(moved)) == 3
    _open(moved, max_bytes=5000)
    assert len(_entries(moved)) == 4


def test_where_one_text_ends_and_the_next_begins_is_content_too(source):
    def split_at(place):
        folder = source.parent / f"at{place}"
        folder.mkdir()
        for name, text in (("a", TEXTS[0][:place]), ("b", TEXTS[0][place:])):
            (folder / name).write_text(text, encoding="utf-8")
        return len(_open(folder).train)

    split_at(100)
    split_at(200)
    assert len(_entries(source)) == 2


def test_who_breaks_off_leaves_nothing_behind(source):
    (source / "20.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="20.txt is no UTF-8 text: invalid start byte at byte 2; convert it"):
        _open(source)
    assert _entries(source) == []


def test_while_one_fills_another_that_is_faster_is_not_hindered_and_its_tokens_are_taken(source, monkeypatch):
    """The faster one does all of its work while the slower one is at its third text."""
    encode, at_work, fast = tokenizer.Tokenizer.encode, [], []

    def slow(self, text, **settings):
        at_work.append(text)
        if len(at_work) == 3:
            unfinished = _entries(source)
            fast.append(_open(source))
            assert len(unfinished) == 1 and len(_entries(source)) == 2 and unfinished[0] in _entries(source)
        return encode(self, text, **settings)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode", slow)
    corpus = _open(source)
    assert len(at_work) == 50
    assert _stream(corpus, "train") == _stream(fast[0], "train")
    (entry,) = _entries(source)
    assert len(entry) == 64  # the key alone, and not the name under which it was filled


def _open_at_once(rank, world, source):
    dist.barrier()
    corpus = _open(source)
    return corpus.batch("train", step=3, batch_size=8, seq_len=32, seed=1)


def test_processes_that_start_at_once_agree_and_leave_one_cache(source):
    batches = run_ranks(3, _open_at_once, source)
    inputs, targets = _open(source).batch("train", step=3, batch_size=8, seq_len=32, seed=1)
    assert all(torch.equal(theirs[0], inputs) and torch.equal(theirs[1], targets) for theirs in batches)
    assert len(_entries(source)) == 1


def test_a_limit_may_cut_through_a_character(source):
    place = TEXTS[0].encode().rindex("ü".encode()) + 1
    cut = TEXTS[0][: TEXTS[0].rindex("ü")]
    corpus = _open(source, max_bytes=place)
    assert corpus.decode(_stream(corpus, "train") + _stream(corpus, "validation")) == f"<s>{cut}</s>"


def test_more_tokens_than_16_bits_hold_are_written_with_32(source):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "return": 70000}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(source.parent / "tokenizer.json"))
    corpus = _open(source)
    assert corpus.vocab_size == 70001 == max(_stream(corpus, "train")) + 1
    (cached,) = (source.parent / "cache").iterdir()
    assert (cached / "tokens.bin").stat().st_size == 4 * (len(corpus.train) + len(corpus.validation))


def test_a_damaged_cache_is_named_with_the_cure(source):
    _open(source)
    (entry,) = (source.parent / "cache").iterdir()
    with open(entry / "tokens.bin", "ab") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=f"{entry} holds 50 tokens, but it was made with .*: delete it"):
        _open(source)


def test_a_smaller_vocabulary_than_the_tokenizers_is_refused(source):
    assert _open(source, vocab_size=512).vocab_size == 300
    with pytest.raises(ValueError, match="vocab_size = 299, but .*json has tokens up to 299: raise it to 300"):
        _open(source, vocab_size=299)


def test_a_file_that_is_no_tokenizer_is_refused_by_name(source):
    with pytest.raises(ValueError, match="00.txt is no tokenizer that tokenizers .* reads: .*; give a tokenizer.json"):
        _open(source, tokenizer=source / "00.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        _open(source, tokenizer=source / "nowhere.json")


def test_tokens_may_have_a_tokenizer_for_text_in_and_out(source):
    np.save(source.parent / "a.npy", np.arange(200))
    beside = {"tokenizer": source.parent / "tokenizer.json"}
    corpus = open_corpus("tokens", [source.parent / "a.npy"], max_bytes=1, **beside)
    assert corpus.decode(corpus.encode("übergabe")) == "übergabe"


def test_the_cache_is_the_users_own_unless_another_is_given(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "home"))
    _open(source, cache=None)
    assert len(list((source.parent / "home" / "dnipipe" / "tokens").iterdir())) == 1
