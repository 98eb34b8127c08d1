"""A DeepSpeed pipeline job without a bubble: an AlexNet-like network on CIFAR-10, or on pictures made here.

    deepspeed --num_gpus 2 launch/deepspeed/train.py --deepspeed_config launch/deepspeed/ds_config.json
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 launch/deepspeed/train.py \
        --deepspeed_config launch/deepspeed/ds_config.json --steps 200

The only dnipipe in it are the import and the "dnipipe" block of the config; remove the block for plain DeepSpeed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from deepspeed.pipe import PipelineModule  # noqa: E402

import dnipipe.deepspeed as deepspeed  # noqa: E402

CLASSES, RECORD = 10, 1 + 3 * 32 * 32
Pictures = tuple[Tensor, Tensor]
"""(N, 3, 32, 32) float32 about 0, and their classes, (N,) int64."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--stages", type=int, default=2, help="pipeline stages; ranks / stages are replicas")
    parser.add_argument("-s", "--steps", type=int, default=200, help="batches to train")
    parser.add_argument("--eval-steps", type=int, default=16, help="batches of held-out pictures at the end")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's *_batch*.bin; else pictures are made")
    parser.add_argument("--seed", type=int, default=0, help="of weights, and of pictures that are made")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def layers() -> list[nn.Module]:
    """Five convolutions and three linear layers, after Krizhevsky et al. 2012, in the proportions of 32 x 32 pixels."""
    return [
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
        nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, CLASSES),
    ]  # fmt: skip


def pictures(folder: Path | None, seed: int) -> tuple[Pictures, Pictures]:
    """To train with, and held out: CIFAR-10 in its binary version, or a pattern for each class under noise."""
    if folder is not None:
        return _records(folder, "data_batch_*.bin"), _records(folder, "test_batch.bin")
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    label = torch.randint(CLASSES, (5120,), generator=generator)
    x = 0.3 * patterns[label] + torch.randn(len(label), 3, 32, 32, generator=generator)
    return (x[:4096], label[:4096]), (x[4096:], label[4096:])


def _records(folder: Path, name: str) -> Pictures:
    files = sorted(folder.rglob(name))
    if not files:
        raise SystemExit(f"{folder} has no {name}: give the folder of CIFAR-10's binary files, or none")
    records = torch.cat([torch.frombuffer(bytearray(each.read_bytes()), dtype=torch.uint8) for each in files])
    records = records.view(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).float() / 128 - 1, records[:, 0].long()


def microbatches(pictures: Pictures, rows: int, replica: int, num_replicas: int) -> Iterator[Pictures]:
    """Endless, in an order that the first and the last stage share; each replica has its own part."""
    x, label = pictures
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(x), generator=generator)[replica::num_replicas]
        for start in range(0, len(order) - rows + 1, rows):
            chosen = order[start : start + rows]
            yield x[chosen], label[chosen]


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    deepspeed.init_distributed()
    model = PipelineModule(
        layers(), num_stages=args.stages, loss_fn=nn.CrossEntropyLoss(), partition_method="parameters"
    )
    engine, *_ = deepspeed.initialize(args=args, model=model)
    sizes = engine.train_micro_batch_size_per_gpu(), engine.grid.data_parallel_id, engine.grid.data_parallel_size
    train, held_out = (microbatches(each, *sizes) for each in pictures(args.data, args.seed))
    losses = [float(engine.train_batch(train)) for _ in range(args.steps)]
    tests = [float(engine.eval_batch(held_out)) for _ in range(args.eval_steps)]
    if int(os.environ.get("RANK", "0")) == engine.grid.stage_to_global(args.stages - 1, data=0):
        last = losses[-100:]
        held = f", held out: {sum(tests) / len(tests):.4f}" if tests else ""
        print(f"loss {losses[0]:.4f}, mean of the last {len(last)}: {sum(last) / len(last):.4f}{held}")
        print(getattr(engine, "metrics", "plain DeepSpeed"), flush=True)


if __name__ == "__main__":
    main()
