"""Trains a pipeline: torchrun --nproc-per-node STAGES launch/train.py CONFIG.yaml [section.field=value ...] [--dry-run]

One process is one stage. Settings are checked before the processes join: a wrong one ends them with exit code 2. With
--max-restarts torchrun starts all of them again when one is lost, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from dnipipe.config import load_config
from dnipipe.dry_run import dry_run
from dnipipe.trainer import Trainer
from dnipipe.trainer.startup import Startup

PATIENCE_S = 10.0
DRY_RUN = "--dry-run"  # checks, measures and prints what a run would be, and trains nothing


def choose_device(local_rank: int, local_world_size: int, share_gpus: bool) -> torch.device:
    """A GPU of its own for every process of this machine, or a share of one, or the CPU for all of them."""
    num_gpus = torch.cuda.device_count()
    if num_gpus >= local_world_size or (num_gpus > 0 and share_gpus):
        if num_gpus < local_world_size:
            # NCCL refuses two ranks on one GPU unless it takes them for two hosts, which talk over sockets
            os.environ |= {"NCCL_HOSTID": f"{platform.node()}-{local_rank}"}
            if int(os.environ["GROUP_WORLD_SIZE"]) == 1:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        device = torch.device("cuda", local_rank % num_gpus)
        torch.cuda.set_device(device)
        return device
    if num_gpus and local_rank == 0:
        print(
            f"{local_world_size} processes, {num_gpus} GPUs: each needs its own, so all run on the CPU; to let them "
            "share GPUs, set run.share_gpus=true"
        )
    return torch.device("cpu")


def join(backend: str) -> None:
    """Makes the process group, among the processes of this attempt alone."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it starts the processes again, and with it the addresses of those that are gone.
        # On several nodes the attempts are counted apart; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store.
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


@record  # so that torchrun's summary shows the error of the rank that failed first
def main(arguments: list[str]) -> None:
    sys.path.append(os.getcwd())  # so that model.factory is also found where the user stands
    startup = Startup()
    startup.done("imports")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            raise ValueError(str(__doc__))
        dry = DRY_RUN in arguments
        config = load_config(arguments[0], [each for each in arguments[1:] if each != DRY_RUN])
        if dry:
            if rank == 0:
                dry_run(config, world_size, choose_device(0, 1, False), Console(highlight=False))
            return
        trainer = Trainer(config, world_size, startup)
        if "RANK" not in os.environ:
            raise ValueError("no ranks: start this with torchrun --nproc-per-node STAGES launch/train.py CONFIG.yaml")
    except (ValueError, OSError) as error:
        if rank:  # rank 0 says the same, and torchrun ends all when it has; what is wrong here alone is said here
            time.sleep(PATIENCE_S)
        print(f"dnipipe: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = choose_device(local_rank, local_world_size, config.run.share_gpus)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if rank == 0:
        copies = f" in {config.pipeline.num_replicas} copies" if config.pipeline.num_replicas > 1 else ""
        print(
            f"{world_size} processes, one stage of the model each{copies}, on {device.type} over {backend}", flush=True
        )
    join(backend)
    try:
        trainer.run(device)
    except BaseException:
        print(f"dnipipe: rank {rank} of {world_size} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
