"""The page is judged by eye; here what stands on it, what is left out, and that it is alone and harmless."""

import json
import re
from html.parser import HTMLParser

import pytest

from dnipipe.observe.trace import Span
from dnipipe.report import CONFIG, METRICS, PAGE, write_facts, write_page, write_traces

SPLIT = {
    "stage": 0,
    "layers": 4,
    "name": "0 Embedding to 3 Block",
    "parameters": 600,
    "forward_ms": 3.0,
    "backward_ms": 6.0,
}
FACTS = {
    "command": "torchrun launch/train.py",
    "started": "2026-11-24T17:02:11+00:00",
    "versions": {"torch": "2.13.0", "CUDA": None},
    "devices": ["H100", "H100", "CPU"],
    "parameters": 1234567,
    "flops_per_token": None,
    "peak_flops": 9.89e14,
    "split": [SPLIT, {**SPLIT, "stage": 1, "name": "4 Block to 5 Linear", "forward_ms": 1.0, "backward_ms": 2.0}],
    "startup_s": {"imports": 4.0, "first step": 2.5},
    "results": [
        {"schedule": "DNI", "steps": 300, "seconds": 10.0, "val_bits": 2.0, "unit": "token", "tokens_per_s": 5000.0,
         "mfu": 0.4, "peak_memory_mb": [100.0, 250.0, None], "bubble": [0.1, 0.3, None]},
        {"schedule": "1F1B", "steps": 200, "seconds": 10.0, "val_bits": 1.5, "unit": "token", "tokens_per_s": None},
    ],
}  # fmt: skip


class _Page(HTMLParser):
    """Tags, texts and the values of attributes that make a browser fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.text, self.headings = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data.strip())
            self.tags.append("")
        self.text += data


def _line(schedule, step, **more):
    lists = {"cosine_by_boundary": [0.5, 0.6], "r2_by_boundary": [-3.0, None], "wait_s_by_rank": [step / 99, None, 0.0]}
    lists |= {
        "bubble_by_rank": [0.1, 0.2, None],
        "peak_memory_mb_by_rank": [9.0, 8, 7],
        "grad_norm_by_stage": [1, 2, 0],
    }
    numbers = {"elapsed_s": step / 10, "loss": 3.0, "loss_step": step - 1, "tokens_per_s": 5e3, "learning_rate": 1e-3}
    return {"schedule": schedule, "step": step, **numbers, "mfu": 0.4, **lists, **more}


def _write(folder, lines, facts=None):
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"schedule": "DNI", "st')
    if facts is not None:
        write_facts(folder, facts)
    return _Page(write_page(folder).read_text(encoding="utf-8"))


@pytest.fixture
def full(tmp_path):
    lines = [_line(name, step) for name in ("DNI", "1F1B") for step in range(10, 101, 10)]
    (tmp_path / CONFIG).write_text("run:\n  output_dir: </pre><script>alert(1)</script>\n")
    write_traces(tmp_path, {"DNI": [Span("forward", 0, 0, 0, 0.0, 1.0)]}, 1)
    return _write(tmp_path, [*lines, _line("DNI", 100, val_bits=2.1)], FACTS)


def test_a_full_page_says_who_won_and_shows_every_section(full):
    assert "In this run 1F1B won, with 1.500 against 2.000 bits per token" in full.text
    assert full.headings == [
        "Loss", "Speed", "Where time and memory went", "Predicted gradients", "Optimizer", "How the model is split",
        "To do it again",
    ]  # fmt: skip
    assert full.tags.count("img") == 8
    for told in ("5,000", "40.0%", "250 MB", "20.0%", "1,234,567", "989 T", "2026-11-24 17:02:11 UTC", "ranks 0 to 1"):
        assert told in full.text
    assert "6.5 s from start to first step: imports 4.0 s, first step 2.5 s." in full.text
    assert "stage 0 the longest, 9.00 ms, 1.50 times the mean" in full.text
    assert "FLOPs per token" not in full.text and "CUDA" not in full.text and "saved for backward" not in full.text


def test_the_page_fetches_nothing(full):
    assert len(full.fetched) == 8
    assert all(value.startswith("data:image/") for value in full.fetched)
    assert not {"link", "script", "iframe", "object"} & set(full.tags)


def test_no_style_fetches_anything_either(full, tmp_path):
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", text)


def test_a_setting_that_looks_like_html_is_text(full):
    assert "output_dir: </pre><script>alert(1)</script>" in full.text


def test_names_that_look_like_html_are_text_too(tmp_path):
    bad = "<b>x</b>"
    split = [{**SPLIT, "name": bad}]
    facts = {"command": bad, "started": bad, "devices": [bad], "versions": {bad: bad}, "split": split}
    page = _write(tmp_path, [_line(bad, 10)], {**facts, "startup_s": {bad: 1.0}})
    assert page.text.count(bad) == 8  # the schedule in the table, and each of the others; both halves of a version


def test_sections_of_which_nothing_is_known_are_left_out(tmp_path):
    page = _write(tmp_path, [{"schedule": "DNI", "step": 10, "elapsed_s": 1.0, "loss": 3.0, "mfu": None}])
    assert page.headings == ["Loss"] and "DNI (so far)" in page.text and "MFU" not in page.text
    assert "No validation yet." in page.text


@pytest.mark.parametrize("value", [None, [], {}, "x", 5, [None]])
def test_facts_that_are_null_or_of_another_kind_are_as_good_as_missing(tmp_path, value):
    page = _write(tmp_path, [_line("DNI", 10, val_bits=2.0)], dict.fromkeys(FACTS, value))
    assert "DNI came to 2.000 bits per byte in 10 steps, 1.0 s of training so far." in page.text


def test_an_empty_folder_has_a_page(tmp_path):
    assert "Nothing has been trained yet." in _Page(write_page(tmp_path).read_text()).text


def test_one_schedule_at_its_end_and_one_under_way_are_not_compared(tmp_path):
    facts = {"results": FACTS["results"][:1]}
    page = _write(tmp_path, [_line("DNI", 300), _line("1F1B", 100, val_bits=1.0)], facts)
    assert "won" not in page.text and "DNI came to 2.000 bits per token in 300 steps" in page.text
    assert "1F1B came to 1.000 bits per token in 100 steps, 10.0 s of training so far." in page.text


@pytest.mark.parametrize("last_s, complains", [(17.5, False), (17.7, True)])
def test_a_start_of_more_than_20_s_is_flagged(tmp_path, last_s, complains):
    _write(tmp_path, [], {"startup_s": {"imports": 2.4, "data": None, "first step": last_s}})
    assert ('class="warning"' in (tmp_path / PAGE).read_text()) == complains


@pytest.mark.parametrize(
    "settings, unit", [("data: {kind: text}", "token"), ("data: {kind: bytes}", "byte"), ("{", "byte")]
)
def test_before_there_is_a_result_the_settings_say_what_is_counted(tmp_path, settings, unit):
    (tmp_path / CONFIG).write_text(settings)
    assert f"{unit}s / s" in _write(tmp_path, [_line("DNI", 10)]).text
