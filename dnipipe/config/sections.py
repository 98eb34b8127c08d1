"""Every setting of a run. Below each field stand meaning, unit and range, as `dnipipe config --explain` prints them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import yaml

from ..plan.late_weights import foretold_distance
from ..plan.phases import AUTO, parse_phases
from .section import Section
from .unlocked import ForwardUnlockedConfig

ScheduleName: TypeAlias = Literal["DNI", "1F1B", "GPipe"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """What is trained."""

    section: ClassVar[str] = "model"

    factory: str = "gpt:byte_gpt"
    """A function that makes an nn.Sequential, as "module:function"; the module may lie beside the script that runs."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, activations and gradients; with bfloat16 the optimizer steps on a float32 copy of the weights."""

    recompute: bool = False
    """Whether each layer runs forward again in its backward, instead of keeping its activations: less memory, and about
    a third more time."""
    compile: bool = False
    """Whether torch.compile makes kernels of each layer: a slower start for faster steps; needs a compiler."""

    def _check(self) -> None:
        module, colon, function = self.factory.partition(":")
        names = [*module.split("."), function]
        self._require("factory", bool(colon) and all(n.isidentifier() for n in names), 'of the form "module:function"')


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What it is trained on: bytes of text, tokens of text, or tokens that are there already."""

    section: ClassVar[str] = "data"

    kind: Literal["bytes", "text", "tokens"] = "bytes"
    """What is learned: bytes of text files, text as data.tokenizer divides it, or files of tokens, .bin or .npy."""
    files: list[str] = field(default_factory=list)
    """Files, or folders for all that fit in them; every 20th is for validation, of fewer than 20 the last twentieth of
    each. Empty, for bytes alone: the installed Python's own sources."""
    tokenizer: str | None = None
    """Path of a tokenizer.json of Hugging Face's tokenizers: text needs one, tokens may have one for samples."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """What a token in a .bin file is, little-endian; a .npy file says it itself."""
    vocab_size: int | None = None
    """Tokens that the model knows: a larger one is refused; at least 1, null checks none. For text and tokens."""
    seq_len: int = 128
    """Bytes or tokens in a sequence; at least 1."""
    max_mb: float = 8.0
    """Millions of bytes of text to read at most, of both splits together; above 0. Of token files all is used."""

    def _check(self) -> None:
        is_bytes, needs = self.kind == "bytes", f"where data.kind is {self.kind}"
        self._require("files", is_bytes or self.files != [], f"at least one path {needs}")
        self._require("files", "" not in self.files, "paths, none of them empty")
        self._require("tokenizer", self.tokenizer != "", "a path, or null")
        self._require("tokenizer", self.kind != "text" or self.tokenizer is not None, f"a path {needs}")
        self._require("tokenizer", not is_bytes or self.tokenizer is None, f"null {needs}")
        self._require("token_dtype", self.kind == "tokens" or self.token_dtype == "uint16", f"left out {needs}")
        self._require("vocab_size", self.vocab_size is None or self.vocab_size >= 1, "at least 1, or null")
        self._require("vocab_size", not is_bytes or self.vocab_size is None, f"null {needs}: there are 256 bytes")
        self._require("seq_len", self.seq_len >= 1, "at least 1")
        self._require("max_mb", self.max_mb > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Section):
    """How the stages work together. From policy on they matter to the schedule DNI alone."""

    section: ClassVar[str] = "pipeline"

    schedule: ScheduleName = "DNI"
    """DNI, 1F1B or GPipe."""
    num_replicas: int = 1
    """Copies of the whole pipeline, each on its share of a batch; at least 1, a divisor of the number of processes:
    there are processes / num_replicas stages."""
    num_microbatches: int = 4
    """Micro-batches in a pass of the schedule; at least 1, and for 1F1B at least the number of stages."""
    accumulate: int = 1
    """Passes of the schedule, over as many microbatches each, for one optimizer step; at least 1."""
    split: Literal["measured", "parameters"] = "measured"
    """What the stages are balanced by: the time that each layer takes here, or its parameters, which is the same each
    time. Cut once per run: kept in run.output_dir for when it goes on."""
    layers_per_stage: list[int] = field(default_factory=list)
    """The cut itself, instead: one number, at least 1, for each stage. Empty: balanced."""
    max_stage_gb: float | None = None
    """Weights, gradients, optimizer and activations that a stage may have, in GB; above 0. null: what its GPU has for
    it, and no limit on a CPU."""
    policy: str = "auto"
    """Which gradient a stage uses: auto, wait, synthetic, stale or corrected, or one after the other, each but the last
    with its optimizer steps, as in wait:200,synthetic:800,stale. See dnipipe/schedule/policy.py."""
    interface: Literal[
        "auto", "linear", "mlp", "conv", "local_head", "scaled_head", "sampled_head", "transformer", "potential"
    ] = "auto"
    """What predicts it; auto chooses by the activation's layout: see dnipipe/interface/choose.py."""
    lag: int = 2
    """Micro-batches from an activation to the true gradient that travels beside it; at least 1."""
    in_flight: int | list[int] | Literal["auto"] | None = None
    """Micro-batches that stages hold under stale and corrected: of the first of S, from S to 2 S - 1, or of each but
    the last, falling, stage i's from S - i to 2 (S - i) - 1. null: S - i. auto: by transfers measured at the start."""
    late_weights: str = AUTO
    """Of a backward in a later step than its forward, under stale and corrected: predicted, foretold at the forward for
    the step of the backward (predicted*2: twice as far; predicted@3: all microbatches by weights three updates ahead,
    late or not); old, copies of those of the forward; new, those of the backward, which meet old activations; or auto:
    predicted@3 with AdamW, predicted with Muon."""
    unlock_after_steps: int | None = None
    """Optimizer steps under `wait` before a policy of one name; at least 0, null for none, or for what auto chooses."""
    forward_unlocked: ForwardUnlockedConfig | None = None
    """Whether a stage may start from a synthetic input while the real one is late, under synthetic: {} by the defaults
    of what it holds, null not at all."""
    transport: Literal["auto", "group", "direct"] = "auto"
    """What carries DNI's exchanges: NCCL or gloo, or direct copies between GPUs of one host; auto takes these where all
    stages share one GPU."""

    def _check(self) -> None:
        for name in ("num_replicas", "num_microbatches", "accumulate", "lag"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("layers_per_stage", all(each >= 1 for each in self.layers_per_stage), "numbers of at least 1")
        self._require("max_stage_gb", self.max_stage_gb is None or self.max_stage_gb > 0, "above 0, or null")
        unlock = self.unlock_after_steps
        self._require("unlock_after_steps", unlock is None or unlock >= 0, "at least 0, or null")
        self._require("unlock_after_steps", unlock is None or "," not in self.policy, "null beside several phases")
        if self.policy != AUTO:
            try:
                parse_phases(self.policy)
            except ValueError as error:
                raise ValueError(f"pipeline.policy = {self.policy!r}: {error}") from None
        try:
            if self.late_weights != AUTO:
                foretold_distance(self.late_weights)
        except ValueError as error:
            raise ValueError(f"pipeline.late_weights = {self.late_weights!r}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """How weights move: one optimizer for every stage by itself, and Adam for its predictor. See dnipipe/optim.py."""

    section: ClassVar[str] = "optim"

    name: Literal["AdamW", "Muon"] = "AdamW"
    """AdamW; or Muon for the matrices of hidden layers, and AdamW for the rest, at the same learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay per step of its means of gradients and of their squares; two numbers from 0 to below 1."""
    learning_rate: float = 1e-3
    """Step size after the warm-up; above 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling along a cosine until run.steps, which it then needs."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a share of learning_rate; from 0 to 1."""
    interface_learning_rate: float | None = None
    """Step size of the predictors, which have no warm-up; above 0. null: each kind of interface names its own."""
    weight_decay: float = 0.1
    """Decoupled decay per unit of learning rate; at least 0."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0; at least 0."""
    clip: float = 1.0
    """Largest gradient norm; at least 0, and 0 does not clip."""
    clip_by: Literal["stage", "travelling"] = "stage"
    """Whose norm: of each stage by itself, or of all stages, where the others' is one step old, so that none waits
    until it is a whole step ahead."""

    def _check(self) -> None:
        decays = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._require("betas", decays, "two numbers from 0 to below 1")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1")
        rate = self.interface_learning_rate
        self._require("interface_learning_rate", rate is None or rate > 0, "above 0, or null")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("warmup_steps", self.warmup_steps >= 0, "at least 0")
        self._require("clip", self.clip >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """How long, how often it is measured, and where its files go."""

    section: ClassVar[str] = "run"

    seed: int = 0
    """Of weights and batches; at least 0."""
    batch_size: int = 16
    """Sequences in an optimizer step, over all replicas, passes and microbatches, and a multiple of their product."""
    train_seconds: float = 60.0
    """Seconds of training, evaluation not counted; at least 0, and 0 trains for run.steps instead."""
    steps: int = 0
    """Optimizer steps, if run.train_seconds is 0; then at least 1, else 0."""
    eval_every_s: float = 10.0
    """Seconds of training between two evaluations; at least 0, and 0 evaluates only at the end."""
    eval_batches: int = 8
    """Validation batches of run.batch_size sequences in an evaluation; at least 1."""
    log_every_steps: int = 20
    """Steps between two lines of metrics; also how often all ranks learn how much time is left; at least 1."""
    sample_tokens: int = 200
    """Bytes or tokens of text to write at the end; at least 0, and 0 where data.kind is tokens without a tokenizer."""
    sample_prompt: str = "\n"
    """What that text goes on from; at least one character."""
    sample_temperature: float = 0.8
    """Above 0; the lower, the more often the likeliest byte is drawn."""
    output_dir: str = "runs/latest"
    """The folder of the run's files, relative to where it was started; made if missing."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints, written beside the training; at least 0, and 0 makes one only at the end."""
    keep_last: int = 2
    """Checkpoints to keep of each schedule, the newest; at least 1."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in run.output_dir, if there is one; it refuses one made with other
    settings (of run.* only seed and batch_size count). never begins anew each time, in a cleared folder."""
    compare_with: list[ScheduleName] = field(default_factory=list)
    """Schedules that train the same model on the same batches after pipeline.schedule, each for as long."""
    trace_steps: list[int] = field(default_factory=list)
    """Two numbers: the first step to trace, and the first no longer to trace. Empty traces none."""
    report: bool = True
    """Whether rank 0 ends with run.output_dir/report.html, which takes it a few seconds."""
    tensorboard: bool = False
    """Whether metrics also go to run.output_dir/tensorboard, for tensorboard --logdir; needs dnipipe[tensorboard]."""
    peak_tflops: float | None = None
    """What one device could do at model.dtype, in 10^12 floating-point operations a second, for the share that is made
    of it (MFU); above 0. null: what is known of the GPU, and no MFU on a CPU."""
    share_gpus: bool = False
    """Whether processes may share a GPU where there are too few; launch/one_card.sh gives each its part."""

    def _check(self) -> None:
        for name in ("seed", "train_seconds", "steps", "eval_every_s", "sample_tokens", "checkpoint_every_steps"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("batch_size", "eval_batches", "log_every_steps", "keep_last"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("sample_prompt", self.sample_prompt != "", "at least one character")
        self._require("sample_temperature", self.sample_temperature > 0, "above 0")
        self._require("steps", self.train_seconds > 0 or self.steps > 0, "at least 1 where run.train_seconds is 0")
        self._require(
            "steps",
            self.train_seconds == 0 or self.steps == 0,
            "0, or run.train_seconds 0, for one of them ends the run",
        )
        self._require("output_dir", self.output_dir != "", "a folder")
        self._require("peak_tflops", self.peak_tflops is None or self.peak_tflops > 0, "above 0, or null")
        window = self.trace_steps
        in_order = window == [] or (len(window) == 2 and 0 <= window[0] < window[1])
        self._require("trace_steps", in_order, "empty or two growing numbers from 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; Config() is the embedded example."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        pipeline = self.pipeline
        parts = pipeline.num_replicas * pipeline.accumulate * pipeline.num_microbatches
        if self.run.batch_size % parts:
            raise ValueError(
                f"run.batch_size = {self.run.batch_size}: it must be a multiple of pipeline.num_replicas x accumulate "
                f"x num_microbatches = {pipeline.num_replicas} x {pipeline.accumulate} x {pipeline.num_microbatches}"
            )
        if self.run.sample_tokens and self.data.kind == "tokens" and self.data.tokenizer is None:
            raise ValueError(
                f"run.sample_tokens = {self.run.sample_tokens}: data.tokenizer makes text of tokens; give it, or take 0"
            )
        if self.optim.schedule == "cosine" and self.run.steps <= self.optim.warmup_steps:
            raise ValueError(
                f"optim.schedule = 'cosine' with run.steps = {self.run.steps}: it falls from optim.warmup_steps = "
                f"{self.optim.warmup_steps} to run.steps, which must be more (train_seconds: 0), or take constant"
            )

    @property
    def microbatch_size(self) -> int:
        """Sequences in a microbatch."""
        pipeline = self.pipeline
        return self.run.batch_size // (pipeline.num_replicas * pipeline.accumulate * pipeline.num_microbatches)

    def to_yaml(self) -> str:
        """Every setting, given or default, as load_config() reads it back."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


SECTIONS: tuple[type[Section], ...] = (ModelConfig, DataConfig, PipelineConfig, OptimConfig, RunConfig)
