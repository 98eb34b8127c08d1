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

CLASSES, PIXELS, RECORD = 10, 3 * 32 * 32, 1 + 3 * 32 * 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--stages", type=int, default=2, help="pipeline stages; ranks / stages are replicas")
    parser.add_argument("-s", "--steps", type=int, default=200, help="batches to train")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's data_batch_*.bin; else pictures are made")
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


def pictures(folder: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) float32 about 0, and (N,) int64: CIFAR-10's training set, or a blurred pattern for each class."""
    if folder is not None:
        files = sorted(folder.rglob("data_batch_*.bin"))
        if not files:
            raise SystemExit(f"{folder} has no data_batch_*.bin: give the folder of CIFAR-10's binary files, or none")
        records = torch.cat([torch.frombuffer(bytearray(each.read_bytes()), dtype=torch.uint8) for each in files])
        records = records.view(-1, RECORD)
        return records[:, 1:].reshape(-1, 3, 32, 32).float() / 128 - 1, records[:, 0].long()
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    label = torch.randint(CLASSES, (4096,), generator=generator)
    return 0.3 * patterns[label] + torch.randn(len(label), 3, 32, 32, generator=generator), label


def microbatches(
    x: Tensor, label: Tensor, rows: int, replica: int, num_replicas: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless, in an order that the first and the last stage share; each replica has its own part."""
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
    data = microbatches(
        *pictures(args.data, args.seed),
        engine.train_micro_batch_size_per_gpu(),
        engine.grid.data_parallel_id,
        engine.grid.data_parallel_size,
    )
    losses = [float(engine.train_batch(data)) for _ in range(args.steps)]
    held_out = engine.eval_batch(data)
    if int(os.environ.get("RANK", "0")) == engine.grid.stage_to_global(args.stages - 1, data=0):
        last = losses[-20:]
        print(f"loss {losses[0]:.3f}, mean of the last {len(last)}: {sum(last) / len(last):.3f}; eval {held_out:.3f}")
        print(getattr(engine, "metrics", "plain DeepSpeed"), flush=True)


if __name__ == "__main__":
    main()
