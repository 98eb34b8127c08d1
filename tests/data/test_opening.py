"""One call opens any kind, and settings that do not belong together are refused before anything is read."""

import sys

import pytest

from dnipipe.data import ByteCorpus, open_corpus


def test_without_files_bytes_are_the_installed_pythons_own_sources():
    corpus = open_corpus("bytes", max_bytes=10**6)
    assert isinstance(corpus, ByteCorpus) and len(corpus.train) + len(corpus.validation) == 10**6
    assert (corpus.unit, corpus.vocab_size) == ("byte", 256)


def test_bytes_are_the_files_of_a_folder_in_order(tmp_path):
    for name, text in (("b", "2" * 40), ("a", "1" * 40), (".git", "3" * 40)):
        (tmp_path / name).write_text(text)
    corpus = open_corpus("bytes", [tmp_path], max_bytes=10**6)
    assert corpus.decode(corpus.train.tolist()) == "1" * 38 + "2" * 38
    assert corpus.decode(corpus.validation.tolist()) == "1122"


def test_bytes_of_a_text_come_back_and_half_a_character_is_replaced():
    corpus = open_corpus("bytes", max_bytes=10**5)
    assert corpus.decode(corpus.encode("é")) == "é"
    assert corpus.decode(corpus.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("kind", "files", "refusal"),
    [
        ("words", ["a"], 'kind = \'words\'; it must be "bytes", "text" or "tokens"'),
        ("text", [], 'files is empty; kind = "text" needs at least one'),
        ("tokens", [], 'files is empty; kind = "tokens" needs at least one'),
        ("text", ["a"], 'tokenizer is missing; kind = "text" needs a tokenizer.json'),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, files, refusal):
    with pytest.raises(ValueError, match=refusal):
        open_corpus(kind, files, max_bytes=100)


def test_without_the_package_a_tokenizer_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"tokenizers: pip install 'dnipipe\[hf\]'"):
        open_corpus("text", [tmp_path], max_bytes=100, tokenizer=tmp_path / "tokenizer.json")
