"""Workers for tests that need no trainer around them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dnipipe.config import Config, ScheduleName
from dnipipe.data import Corpus
from dnipipe.partition import split_sequential
from dnipipe.trainer.groups import Groups
from dnipipe.trainer.model import make_model
from dnipipe.trainer.worker import Worker


def make_worker(config: Config, name: ScheduleName, corpus: Corpus) -> Worker:
    """This rank's worker on the CPU, of a model balanced by parameters. Every rank must call it."""
    groups = Groups.make(dist.get_world_size() // config.pipeline.num_replicas)
    torch.manual_seed(config.run.seed)
    model = make_model(config.model)
    lengths = [len(stage) for stage in split_sequential(model, groups.layout.num_stages)]
    return Worker(config, name, corpus, torch.device("cpu"), groups, lengths, model)
