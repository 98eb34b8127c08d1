"""How fast a run is, and what share that makes of what its devices could do (MFU).

Source: Chowdhery et al. 2022 (PaLM), appendix B: model FLOPs utilisation; peaks are NVIDIA's data sheets, dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..boundary import where_am_i
from ..config import Config

PEAK_TFLOPS = {
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "H200": {"bfloat16": 989.0, "float32": 67.0},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.0},
    "H100 NVL": {"bfloat16": 835.0, "float32": 60.0},
    "H100": {"bfloat16": 989.0, "float32": 67.0},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
}
"""By what is in the name of the GPU, the first that fits; float32 as torch computes it unless told to use TF32."""


@dataclass(frozen=True)
class Speed:
    """tokens_per_step: in all replicas. flops_per_token: to train. peak_flops: of all devices a second; or None."""

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None

    def of(self, step_s: float) -> dict[str, float | None]:
        """tokens_per_s and mfu (0 to 1) of steps that take so long; 0 s: of none."""
        tokens_per_s = self.tokens_per_step / step_s if step_s else 0.0
        mfu = tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None
        return {"tokens_per_s": tokens_per_s, "mfu": mfu}


def measure_by(config: Config, flops_per_token: float, device: torch.device, group: dist.ProcessGroup) -> Speed:
    """What the speed of a run is measured by. Every rank must call it."""
    devices = [None] * dist.get_world_size()
    # several ranks may share a GPU, which counts once
    dist.all_gather_object(devices, where_am_i(device) if device.type == "cuda" else dist.get_rank(), group=group)
    peak = _peak_tflops(config, device)
    return Speed(
        config.run.batch_size * config.data.seq_len,
        flops_per_token,
        None if peak is None else peak * 1e12 * len(set(devices)),
    )


def _peak_tflops(config: Config, device: torch.device) -> float | None:
    if config.run.peak_tflops is not None or device.type != "cuda":
        return config.run.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peaks[config.model.dtype] for known, peaks in PEAK_TFLOPS.items() if known in name), None)
