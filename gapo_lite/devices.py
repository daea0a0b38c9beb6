"""The machines that a plan is made for: cards by name, from their data sheets, or by their size.

    device_named("4090") is device_named("NVIDIA GeForce RTX 4090") is GPUS["4090"]
    device_named("24GB")        # a card of that memory, whose speed is assumed

Importing this does not import torch, so that the page can list them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gapo_lite.errors import ConfigError
from gapo_lite.memory import GIB


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan is made for.

    Attributes:
        name: for a person.
        memory: bytes that may be taken.
        flops: operations a second of a large matrix product (of a GPU: NVIDIA's dense rate of
            half precision with float32 sums).
        bandwidth: bytes a second of its memory.
        is_cpu: whether it is this machine's CPU.
        capability: compute capability of a GPU, by NVIDIA's count; says nothing of a CPU.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    is_cpu: bool = False
    capability: tuple[int, int] = (8, 0)

    @property
    def has_bfloat16(self) -> bool:
        """Whether a GPU computes in bfloat16: from Ampere on."""
        return self.capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """Whether PyTorch's FlashAttention kernel runs on a GPU: from Ampere on."""
        return self.capability >= (8, 0)


VISIBLE = 0.98
"""What PyTorch is told of the memory that a card is sold with: 23.6 of 24 GiB, 7.8 of 8."""


def _gpu(name: str, gib: float, tflops: float, gbps: float, capability: tuple[int, int]) -> Device:
    memory = gib * VISIBLE * GIB
    return Device(name, memory, tflops * 1e12, gbps * 1e9, capability=capability)


# fmt: off
GPUS = {
    "2060": _gpu("RTX 2060 6 GB", 6, 26, 336, (7, 5)),
    "2070": _gpu("RTX 2070 8 GB", 8, 30, 448, (7, 5)),
    "2080ti": _gpu("RTX 2080 Ti 11 GB", 11, 54, 616, (7, 5)),
    "3060": _gpu("RTX 3060 12 GB", 12, 25, 360, (8, 6)),
    "3060ti": _gpu("RTX 3060 Ti 8 GB", 8, 32, 448, (8, 6)),
    "3070": _gpu("RTX 3070 8 GB", 8, 41, 448, (8, 6)),
    "3070ti": _gpu("RTX 3070 Ti 8 GB", 8, 43, 608, (8, 6)),
    "3080": _gpu("RTX 3080 10 GB", 10, 60, 760, (8, 6)),
    "3080-12": _gpu("RTX 3080 12 GB", 12, 61, 912, (8, 6)),
    "3080ti": _gpu("RTX 3080 Ti 12 GB", 12, 68, 912, (8, 6)),
    "3090": _gpu("RTX 3090 24 GB", 24, 71, 936, (8, 6)),
    "3090ti": _gpu("RTX 3090 Ti 24 GB", 24, 80, 1008, (8, 6)),
    "4060": _gpu("RTX 4060 8 GB", 8, 30, 272, (8, 9)),
    "4060ti-8": _gpu("RTX 4060 Ti 8 GB", 8, 44, 288, (8, 9)),
    "4060ti": _gpu("RTX 4060 Ti 16 GB", 16, 44, 288, (8, 9)),
    "4070": _gpu("RTX 4070 12 GB", 12, 58, 504, (8, 9)),
    "4070super": _gpu("RTX 4070 Super 12 GB", 12, 71, 504, (8, 9)),
    "4070ti": _gpu("RTX 4070 Ti 12 GB", 12, 80, 504, (8, 9)),
    "4070tisuper": _gpu("RTX 4070 Ti Super 16 GB", 16, 88, 672, (8, 9)),
    "4080": _gpu("RTX 4080 16 GB", 16, 97, 717, (8, 9)),
    "4080super": _gpu("RTX 4080 Super 16 GB", 16, 104, 736, (8, 9)),
    "4090": _gpu("RTX 4090 24 GB", 24, 165, 1008, (8, 9)),
    "5060": _gpu("RTX 5060 8 GB", 8, 38, 448, (12, 0)),
    "5060ti-8": _gpu("RTX 5060 Ti 8 GB", 8, 47, 448, (12, 0)),
    "5060ti": _gpu("RTX 5060 Ti 16 GB", 16, 47, 448, (12, 0)),
    "5070": _gpu("RTX 5070 12 GB", 12, 62, 672, (12, 0)),
    "5070ti": _gpu("RTX 5070 Ti 16 GB", 16, 88, 896, (12, 0)),
    "5080": _gpu("RTX 5080 16 GB", 16, 113, 960, (12, 0)),
    "5090": _gpu("RTX 5090 32 GB", 32, 210, 1792, (12, 0)),
    "a4000": _gpu("RTX A4000 16 GB", 16, 77, 448, (8, 6)),
    "a5000": _gpu("RTX A5000 24 GB", 24, 111, 768, (8, 6)),
    "a6000": _gpu("RTX A6000 48 GB", 48, 155, 768, (8, 6)),
    "6000ada": _gpu("RTX 6000 Ada 48 GB", 48, 364, 960, (8, 9)),
    "pro6000": _gpu("RTX PRO 6000 96 GB", 95.6, 504, 1792, (12, 0)),
    "t4": _gpu("T4 16 GB", 15, 65, 320, (7, 5)),
    "a10": _gpu("A10 24 GB", 22.5, 125, 600, (8, 6)),
    "a10g": _gpu("A10G 24 GB", 22.5, 70, 600, (8, 6)),
    "a40": _gpu("A40 48 GB", 45, 150, 696, (8, 6)),
    # 72 W hold an L4 between the 47 TFLOP/s of its base clock and the 121 of its boost clock.
    "l4": _gpu("L4 24 GB", 22.5, 60, 300, (8, 9)),
    "l40s": _gpu("L40S 48 GB", 45, 362, 864, (8, 9)),
    "a100-40": _gpu("A100 40 GB", 40, 312, 1555, (8, 0)),
    "a100": _gpu("A100 80 GB", 80, 312, 2039, (8, 0)),
    "h100-pcie": _gpu("H100 PCIe 80 GB", 80, 756, 2000, (9, 0)),
    "h100": _gpu("H100 80 GB", 80, 989, 3350, (9, 0)),
    "h200": _gpu("H200 141 GB", 140, 989, 4800, (9, 0)),
    "b200": _gpu("B200 180 GB", 179, 2250, 8000, (10, 0)),
}
# fmt: on
"""Cards by the name that `--gpu` takes: memory in GiB, TFLOP/s, GB/s, compute capability.

From NVIDIA's data sheets and architecture papers; none before Turing, which builds of PyTorch for
CUDA 13 leave out. The rate is that of half precision without
sparsity and with float32 sums, which GeForce cards have at half of what they do with float16 sums.
Where error correction takes a sixteenth of the memory (T4, A10, A10G, A40, L4, L40S), it is what is
left: what nvidia-smi reports."""

UNKNOWN_FLOPS, UNKNOWN_BANDWIDTH = 60e12, 500e9
"""FLOP/s and bytes/s of a card of which only the memory is known: an RTX 3080 or 4070, about."""

_LARGEST_GIB = 1024
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?g(?:i?b)?")
_UNIT = re.compile(r"(?<!\d)(\d{1,3}) ?gi?b\b")
_MAKER = re.compile(r"nvidia|geforce|tesla|rtx|blackwell|generation|(?:workstation|server) edition")
_FORM = re.compile(r"sxm\d?|pcie|hbm\d\w?")


def device_named(gpu: str) -> Device:
    """A card of the table by any of its names, or one of a given size.

    Args:
        gpu: a key of GPUS; a card's name, as a person or the driver writes it; or a memory in GiB,
            such as "24GB".

    Raises:
        ConfigError: it is none of these.
    """
    card = known_card(gpu) or _of_size(gpu)
    if card is None:
        raise ConfigError(
            f"no card {gpu!r} is known. There are: {', '.join(GPUS)}. A size of memory does as "
            f"well, such as 24GB (1 to {_LARGEST_GIB})."
        )
    return card


def known_card(name: str) -> Device | None:
    """The card of the table that a name means, None if there is none.

    A name that fits several, such as the driver's for an RTX 4060 Ti, means the one whose key it
    is.
    """
    plain = _FORM.sub("", name.lower())
    return _SPELLINGS.get(_spelling(name)) or _SPELLINGS.get(_spelling(plain))


def _of_size(size: str) -> Device | None:
    """A card of so many GiB, of unknown speed."""
    found = _SIZE.fullmatch(size.strip().lower())
    if not found or not 1 <= float(found[1]) <= _LARGEST_GIB:
        return None
    gib = float(found[1])
    assumed = f"{UNKNOWN_FLOPS / 1e12:.0f} TFLOP/s and {UNKNOWN_BANDWIDTH / 1e9:.0f} GB/s"
    name = f"a {gib:g} GB card (speed unknown: assumed {assumed})"
    return Device(name, gib * VISIBLE * GIB, UNKNOWN_FLOPS, UNKNOWN_BANDWIDTH)


def _spelling(name: str) -> str:
    """A card's name without what does not tell it from others: maker, unit, spaces and dashes."""
    return re.sub(r"[\s_-]", "", _MAKER.sub("", _UNIT.sub(r"\1", name.lower())))


_SPELLINGS = {_spelling(name): card for key, card in GPUS.items() for name in (key, card.name)}
