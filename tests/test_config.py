"""Settings come back as they were written, and whatever is wrong is refused by its full name."""

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dnipipe.config import (
    SECTIONS,
    Config,
    DataConfig,
    ForwardUnlockedConfig,
    OptimConfig,
    PipelineConfig,
    RunConfig,
    explain,
    load_config,
)
from dnipipe.data import Kind, TokenDtype
from dnipipe.optim import OptimizerName, RateSchedule
from tests.config_file import load

QUICKSTART = Path(__file__).parents[1] / "launch" / "configs" / "quickstart.yaml"


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load(tmp_path, "") == Config()
    assert load(tmp_path, "run:\n# seed: 3\n") == Config()


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path):
    config = load(tmp_path, "pipeline: {schedule: 1F1B, unlock_after_steps: 7}\nrun: {seed: 3}")
    assert config == Config(pipeline=PipelineConfig(schedule="1F1B", unlock_after_steps=7), run=RunConfig(seed=3))


def test_an_override_beats_the_file_and_a_later_one_an_earlier(tmp_path):
    config = load(tmp_path, "run: {seed: 3, batch_size: 8}", "run.seed=4", "run.seed=5", "run.output_dir=a=b")
    assert (config.run.seed, config.run.batch_size, config.run.output_dir) == (5, 8, "a=b")


def test_an_override_reaches_one_entry_of_a_mapping(tmp_path):
    config = load(tmp_path, "model: {options: {depth: 8, width: 64}}", "model.options.depth=2", "model.options.x=[1]")
    assert config.model.options == {"depth": 2, "width": 64, "x": [1]}


def test_an_override_reaches_any_depth(tmp_path):
    text = "model: {options: {source: {n_layer: 8, n_head: 2}, untie: true}}"
    config = load(tmp_path, text, "model.options.source.n_layer=2", "model.options.new.deep.entry=1")
    assert config.model.options == {
        "source": {"n_layer": 2, "n_head": 2}, "untie": True, "new": {"deep": {"entry": 1}},
    }  # fmt: skip


def test_an_override_may_be_a_list_or_null(tmp_path):
    config = load(tmp_path, "", "run.compare_with=[1F1B, GPipe]", "pipeline.unlock_after_steps=null")
    assert config.run.compare_with == ["1F1B", "GPipe"]
    assert config.pipeline.unlock_after_steps is None


def test_the_predictors_rate_is_a_number_or_left_to_them(tmp_path):
    default = load(tmp_path, "").optim
    assert default.interface_learning_rate is None
    assert load(tmp_path, "optim: {interface_learning_rate: null}").optim == default
    given = load(tmp_path, "optim: {interface_learning_rate: 2e-2}")
    assert given.optim.interface_learning_rate == 0.02 and "interface_learning_rate: 0.02" in given.to_yaml()
    assert "interface_learning_rate: null" in Config().to_yaml()
    for wrong in ("0", "-1", "fast"):
        with pytest.raises(ValueError, match=f"optim.interface_learning_rate = .*{wrong}"):
            load(tmp_path, "", f"optim.interface_learning_rate={wrong}")


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3"])
def test_a_number_may_be_written_in_every_usual_way(tmp_path, text):
    assert load(tmp_path, f"optim: {{learning_rate: {text}}}").optim.learning_rate == 0.001


def test_a_whole_number_becomes_a_float_where_one_is_declared(tmp_path):
    assert isinstance(load(tmp_path, "data: {max_mb: 2}").data.max_mb, float)


def test_yaml_and_back_is_the_same_config(tmp_path):
    config = load(tmp_path, QUICKSTART.read_text(), "optim.learning_rate=1e-5", "pipeline.unlock_after_steps=3")
    assert load(tmp_path, config.to_yaml()) == config
    assert load(tmp_path, Config().to_yaml()) == Config()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pipeline.num_microbatch", "did you mean pipeline.num_microbatches?"),
        ("run.learning_rate", "did you mean optim.learning_rate?"),
        ("Run.Seed", "did you mean run.seed?"),
        ("optim.qqqqqqqqqqqq", "there are " + ", ".join(f"optim.{each.name}" for each in fields(OptimConfig))),
        ("zzz.q", "there are model, data, pipeline, optim, run"),
        ("run.seed.x", "did you mean run.seed?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_that_exists(tmp_path, name, nearest):
    with pytest.raises(ValueError) as refusal:
        load(tmp_path, "", f"{name}=1")
    assert str(refusal.value) == f"there is no setting {name}; {nearest}"
    section, _, rest = name.partition(".")
    if "." not in rest:
        with pytest.raises(ValueError, match=f"no setting {name}"):
            load(tmp_path, f"{section}: {{{rest}: 1}}")


def test_an_unknown_schedule_is_refused_with_the_nearest_that_exists(tmp_path):
    with pytest.raises(ValueError, match="pipeline.schedule = 'dni'; did you mean DNI?"):
        load(tmp_path, "", "pipeline.schedule=dni")
    with pytest.raises(ValueError, match=r"run.compare_with\[1\] = '1F2B'; did you mean 1F1B?"):
        load(tmp_path, "", "run.compare_with=[GPipe, 1F2B]")


@pytest.mark.parametrize(
    "bad",
    [
        "model.factory=byte_gpt", "model.factory=a:b.c", "model.factory=3", "model.options=3", "model.dtype=float16",
        "data.kind=texts", "data.kind=null", "data.files=a.txt", "data.files=[3]", "data.files=['']",
        "data.tokenizer=a.json", "data.tokenizer=''", "data.token_dtype=int32", "data.token_dtype=uint32",
        "data.vocab_size=300", "data.vocab_size=0", "data.seq_len=0", "data.seq_len=1.5",
        "data.max_mb=0", "data.max_mb=x",
        "pipeline.num_microbatches=0", "pipeline.lag=0", "pipeline.lag=true", "pipeline.unlock_after_steps=-1",
        "pipeline.interface=lineer", "optim.learning_rate=0", "optim.learning_rate=.nan", "optim.learning_rate=true",
        "optim.weight_decay=-0.1", "optim.warmup_steps=-1", "optim.clip=-1", "optim.clip=.inf", "optim.clip=[1]",
        "optim.name=SGD", "optim.betas=0.9", "optim.betas=[0.9]", "optim.betas=[0.9, 1]", "optim.betas=[-0.1, 0.9]",
        "optim.betas=[0.9, x]", "optim.schedule=linear", "optim.final_fraction=-0.1", "optim.final_fraction=1.1",
        "run.seed=-1", "run.batch_size=0", "run.train_seconds=-1", "run.steps=-1", "run.eval_every_s=-1",
        "run.checkpoint_every_steps=-1", "run.keep_last=0", "run.resume=yes", 
        "run.eval_batches=0", "run.sample_tokens=-1", "run.output_dir=''", "run.output_dir=null",
        "run.compare_with=DNI", "run.trace_steps=[3]", "run.trace_steps=[4, 3]", "run.trace_steps=[-1, 3]",
        "run.batch_size=15",
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_its_full_name(tmp_path, bad):
    full_name = bad.partition("=")[0]
    with pytest.raises(ValueError, match=full_name.replace(".", r"\.")):
        load(tmp_path, "", bad)


def test_the_least_value_of_each_range_is_taken(tmp_path):
    overrides = ["data.seq_len=1", "pipeline.num_microbatches=1", "pipeline.lag=1", "pipeline.unlock_after_steps=0"]
    overrides += ["optim.weight_decay=0", "optim.warmup_steps=0", "optim.clip=0", "run.seed=0", "run.batch_size=1"]
    overrides += ["run.train_seconds=0", "run.steps=1", "run.eval_every_s=0", "run.eval_batches=1"]
    overrides += ["run.sample_tokens=0", "run.trace_steps=[0, 1]", "optim.betas=[0, 0]", "optim.final_fraction=0"]
    overrides += ["optim.schedule=cosine"]
    assert load(tmp_path, "", *overrides).run.steps == 1


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["kind=text", "files=[a]"], "data.tokenizer = None: it must be a path where data.kind is text"),
        (["kind=text", "tokenizer=t"], r"data.files = \[\]: it must be at least one path where data.kind is text"),
        (["kind=tokens"], r"data.files = \[\]: it must be at least one path where data.kind is tokens"),
        (["tokenizer=t"], "data.tokenizer = 't': it must be null where data.kind is bytes"),
        (["vocab_size=300"], "data.vocab_size = 300: it must be null where data.kind is bytes: there are 256 bytes"),
        (["kind=tokens", "files=[a]", "vocab_size=0"], "data.vocab_size = 0: it must be at least 1, or null"),
        (["kind=text", "files=[a]", "tokenizer=t", "token_dtype=uint32"], "'uint32': it must be left out where"),
    ],
)
def test_settings_of_one_kind_of_data_are_refused_for_another(tmp_path, overrides, refusal):
    with pytest.raises(ValueError, match=refusal):
        load(tmp_path, "", *(f"data.{each}" for each in overrides))


def test_each_kind_of_data_takes_its_own_settings(tmp_path):
    load(tmp_path, "data: {kind: text, files: [a], tokenizer: t, vocab_size: 300}")
    tokens = "data: {kind: tokens, files: [a], token_dtype: uint32, vocab_size: 70000}"
    data = load(tmp_path, tokens, "run.sample_tokens=0").data
    with pytest.raises(ValueError, match="run.sample_tokens = 200: data.tokenizer makes text of tokens"):
        load(tmp_path, tokens)
    assert (data.kind, data.token_dtype, data.vocab_size, data.tokenizer) == ("tokens", "uint32", 70000, None)


def test_the_kinds_of_data_that_may_be_set_are_those_that_can_be_opened():
    hints = get_type_hints(DataConfig)
    assert (get_args(hints["kind"]), get_args(hints["token_dtype"])) == (get_args(Kind), get_args(TokenDtype))


def test_a_run_ends_by_time_or_by_steps_but_not_by_both(tmp_path):
    for both in (["run.train_seconds=0"], ["run.train_seconds=5", "run.steps=5"]):
        with pytest.raises(ValueError, match="run.steps.*run.train_seconds"):
            load(tmp_path, "", *both)


@pytest.mark.parametrize("length", ["run.train_seconds=60", "run.steps=100"])
def test_a_cosine_needs_to_know_its_last_step_and_one_after_the_warmup(tmp_path, length):
    overrides = ["optim.schedule=cosine", "optim.warmup_steps=100", "run.train_seconds=0", length]
    with pytest.raises(ValueError, match="optim.schedule = 'cosine' with run.steps.*optim.warmup_steps.*constant"):
        load(tmp_path, "", *overrides)
    assert load(tmp_path, "", *overrides[:3], "run.steps=101").optim.schedule == "cosine"


def test_the_optimizers_and_schedules_that_may_be_set_are_those_that_there_are():
    hints = get_type_hints(OptimConfig)
    assert (hints["name"], hints["schedule"]) == (OptimizerName, RateSchedule)


def test_fields_made_in_python_are_checked_too():
    with pytest.raises(ValueError, match="data.seq_len"):
        DataConfig(seq_len=0)
    with pytest.raises(ValueError, match="optim.clip"):
        OptimConfig(clip="much")


@pytest.mark.parametrize("text", ["- a", "run: 3", "run: [seed]", "a: b: c"])
def test_a_file_of_another_form_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="must hold|no YAML"):
        load(tmp_path, text)


def test_an_override_of_another_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="section.field=value"):
        load(tmp_path, "", "run.seed")
    with pytest.raises(ValueError, match="no YAML"):
        load(tmp_path, "", "data.files=[a")


def test_every_field_says_below_itself_what_it_is():
    settings = explain()
    within = [f"{ForwardUnlockedConfig.section}.{each.name}" for each in fields(ForwardUnlockedConfig)]
    own = [f"{kind.section}.{each.name}" for kind in SECTIONS for each in fields(kind)]
    after = own.index(ForwardUnlockedConfig.section) + 1
    assert [each.name for each in settings] == own[:after] + within + own[after:]
    assert all(len(each.meaning) > 5 and each.type for each in settings)


def test_explain_tells_type_default_and_meaning_of_what_begins_so():
    clip, clip_by = explain("optim.clip")
    assert clip_by.default == "stage"
    assert (clip.type, clip.default) == ("float", "1.0")
    assert clip.meaning == "Largest gradient norm; at least 0, and 0 does not clip."
    assert {each.name.partition(".")[0] for each in explain("run")} == {"run"}
    (options,) = explain("model.options")
    assert options.default == "{}"
    with pytest.raises(ValueError, match="no setting begins with 'optik': sections are model, data, pipeline,"):
        explain("optik")


def test_the_quickstart_is_valid_and_its_model_takes_its_sequences():
    config = load_config(QUICKSTART)
    assert config.model.options["seq_len"] >= config.data.seq_len
