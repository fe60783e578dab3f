"""Rates that GPUs reach, for the roofline: fitted to measured steps of one kind of GPU, scaled for others."""

from dataclasses import dataclass

from mixmae.trainer.planning.devices import Gpu


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s that a GPU reaches in bf16.

    Attributes:
        product: of a matrix product whose tiles fill the GPU.
        memory: of kernels that stream.
        processors: multiprocessors; None if unknown, then a product of few tiles is as fast as a large one.
        flash: of attention without a bias.
        efficient: of attention with a bias that learns (memory-efficient kernel).
        grouped: of attention in our own kernel.
    """

    product: float
    memory: float
    processors: int | None
    flash: float
    efficient: float
    grouped: float


# The H200's are fitted to profiles of its steps (benchmarks/results/kernels-nvidia-h200.txt). The others' follow from
# data sheets: attention by clock and multiprocessors, since its kernels are those of an A100 on all.
_KNOWN = {
    "H200": Rates(740e12, 4.0e12, 132, 200e12, 47e12, 118e12),
    "H100": Rates(680e12, 2.8e12, 132, 200e12, 47e12, 118e12),
    "A100": Rates(265e12, 1.7e12, 108, 110e12, 27e12, 68e12),
}


def rates(gpu: Gpu) -> Rates:
    """Those of a known GPU; of any other three quarters of its data sheet, with attention as on an A100."""
    if gpu.product in _KNOWN:
        return _KNOWN[gpu.product]
    peak, base = gpu.bf16, _KNOWN["A100"]
    ampere = 312e12
    attention = (base.flash / ampere * peak, base.efficient / ampere * peak, base.grouped / ampere * peak)
    return Rates(0.75 * peak, 0.83 * gpu.memory_rate, None, *attention)
