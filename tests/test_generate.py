"""The pipeline writes what the whole model would, and a terminal can show it."""

import torch
import torch.distributed as dist

from dnipipe.config import load_config
from dnipipe.data import byte_corpus, stdlib_sources
from dnipipe.generate import generate, generate_alone, printable
from dnipipe.trainer.model import make_model
from tests.ranks import run_ranks
from tests.trainer.test_trainer import QUICKSTART, TINY
from tests.trainer.workers import make_worker

PROMPT, NUM_TOKENS, SEQ_LEN = list(b"def "), 40, 32


def _generate(rank, world, name):
    config = load_config(QUICKSTART, TINY)
    worker = make_worker(config, name, byte_corpus(stdlib_sources(), max_bytes=10**6))
    worker.train_step(0)
    with torch.no_grad():
        for parameter in worker.module.parameters():  # else the next byte would hardly depend on those before it
            parameter += 0.3 * torch.randn_like(parameter)
    settings = {"num_tokens": NUM_TOKENS, "vocab_size": 256, "seq_len": SEQ_LEN, "temperature": 0.7, "seed": 3}
    text = generate(
        worker.schedule, PROMPT, batch_size=8, **settings, device=torch.device("cpu"), group=dist.group.WORLD
    )
    weights = {name: value.clone() for name, value in worker.module.state_dict().items()}
    worker.train_step(1)
    return text, weights


def test_the_pipeline_writes_what_the_whole_model_writes_token_by_token():
    """The reference has no batch and no filled-up window: the last tokens, alone, through the model in one process."""
    config = load_config(QUICKSTART, TINY)
    for name in ("DNI", "1F1B"):
        (text, first), (same, second) = run_ranks(2, _generate, name)
        model = make_model(config.model)
        model.load_state_dict(first | second)
        generator, expected = torch.Generator().manual_seed(3), list(PROMPT)
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                logits = model(torch.tensor([expected[-SEQ_LEN:]]))[0, -1]
            expected.append(torch.multinomial(torch.softmax(logits / 0.7, 0), 1, generator=generator).item())
        assert text == same == expected
        settings = {"vocab_size": None, "seq_len": SEQ_LEN, "temperature": 0.7, "seed": 3}
        assert generate_alone(model, PROMPT, num_tokens=NUM_TOKENS, **settings) == expected


def test_only_tokens_of_the_vocabulary_are_drawn():
    class Favourite(torch.nn.Module):
        def forward(self, input_BT):
            return torch.nn.functional.one_hot(torch.full_like(input_BT, 9), 10) * 100.0 + torch.arange(10.0)

    settings = {"num_tokens": 5, "seq_len": 4, "temperature": 0.1, "seed": 0}
    assert generate_alone(Favourite(), [0], vocab_size=None, **settings) == [0, 9, 9, 9, 9, 9]
    assert generate_alone(Favourite(), [0], vocab_size=4, **settings) == [0, 3, 3, 3, 3, 3]


def test_what_would_move_the_cursor_is_not_printed():
    assert printable("é\n\tx") == "é\n\tx"
    assert printable("a\x1b[2J\r\ufffdb") == "a\ufffd[2J\ufffd\ufffdb"
