"""The layout of a pack: samples of any picture shape and caption length, end to end, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from dstrain.kernels.segments import Segments

Shape = tuple[int, int, int]  # (frames, height, width) of one picture, in tokens


@dataclass(frozen=True)
class PackLayout:
    """Where each sample's tokens lie. N samples, T text tokens, I image tokens, S = T + I.

    Each stream is stored sample after sample. The joint order, which attention works in, is per sample: its text,
    then its pictures. Build it with `PackLayout.build`.
    """

    image_shapes: tuple[tuple[Shape, ...], ...]  # per sample, each of its pictures
    image_lens: tuple[int, ...]
    text_lens: tuple[int, ...]
    image_sample: Tensor  # [I] int64, the sample that an image token belongs to
    text_sample: Tensor  # [T] int64
    first_image_token: Tensor  # [N] int64, row of each sample's first image token
    joint_index: Tensor  # [S] int64: row of cat([text, image]) at each place of the joint order
    joint_inverse: Tensor  # [S] int64: place in the joint order of each row of cat([text, image])
    positions: Tensor  # [S, 3] int64 (frame, y, x) for the rotary embedding, in joint order
    cu_seqlens: Tensor  # [N + 1] int32, edges of the samples in the joint order

    @staticmethod
    def build(
        image_shapes: Sequence[Sequence[Shape]], text_lens: Sequence[int], device: torch.device | str = "cpu"
    ) -> "PackLayout":
        """Lay out samples with the given picture shapes (in tokens) and text lengths; each must have tokens."""
        if len(image_shapes) != len(text_lens) or not text_lens:
            raise ValueError(f"a pack needs one text length a sample: {len(image_shapes)} and {len(text_lens)}")
        shapes = tuple(tuple((f, h, w) for f, h, w in pictures) for pictures in image_shapes)
        image_lens = tuple(sum(prod(shape) for shape in pictures) for pictures in shapes)
        if min(image_lens) < 1 or min(text_lens) < 1:
            raise ValueError(f"empty sample in a pack: image tokens {image_lens}, text tokens {tuple(text_lens)}")
        samples = torch.arange(len(text_lens))
        image_len, text_len = torch.tensor(image_lens), torch.tensor(tuple(text_lens))
        image_start, text_start = image_len.cumsum(0) - image_len, text_len.cumsum(0) - text_len
        total_text = int(text_len.sum())
        joint_index = torch.cat(
            [
                torch.cat([torch.arange(t0, t0 + t), torch.arange(i0, i0 + i) + total_text])
                for t0, t, i0, i in zip(text_start.tolist(), text_lens, image_start.tolist(), image_lens)
            ]
        )  # [S]
        positions = torch.cat([_positions(pictures, t) for pictures, t in zip(shapes, text_lens)])  # [S, 3]
        return PackLayout(
            image_shapes=shapes,
            image_lens=image_lens,
            text_lens=tuple(text_lens),
            image_sample=samples.repeat_interleave(image_len),
            text_sample=samples.repeat_interleave(text_len),
            first_image_token=image_start,
            joint_index=joint_index,
            joint_inverse=torch.argsort(joint_index),
            positions=positions,
            cu_seqlens=torch.nn.functional.pad((image_len + text_len).cumsum(0), (1, 0)).to(torch.int32),
        ).to(device)

    def to(self, device: torch.device | str) -> "PackLayout":
        """Return the layout with its tensors on `device`."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.text_lens)

    @property
    def tokens(self) -> int:
        """S, all tokens of the pack."""
        return sum(self.image_lens) + sum(self.text_lens)

    @property
    def joint_lens(self) -> tuple[int, ...]:
        """Tokens of each sample, text and image together."""
        return tuple(i + t for i, t in zip(self.image_lens, self.text_lens))

    @property
    def stream_rows(self) -> tuple[int, int]:
        """T and I."""
        return sum(self.text_lens), sum(self.image_lens)

    @cached_property
    def segments(self) -> Segments:
        """Of rows [S, ...], text in front of image: 2 N, the samples' texts and then their images."""
        return Segments((*self.text_lens, *self.image_lens), self.joint_index.device, streams=2)

    @cached_property
    def image_segments(self) -> Segments:
        """Of image rows [I, ...]: N, a sample each."""
        return Segments(self.image_lens, self.joint_index.device)

    @cached_property
    def length_groups(self) -> tuple[Tensor, ...]:
        """Joint places [n, L] of the n samples that have L tokens, one tensor for each distinct L."""
        starts = dict[int, list[int]]()
        start = 0
        for length in self.joint_lens:
            starts.setdefault(length, []).append(start)
            start += length
        device = self.joint_index.device
        return tuple(
            torch.tensor(rows, device=device)[:, None] + torch.arange(length, device=device)
            for length, rows in starts.items()
        )


def _positions(pictures: tuple[Shape, ...], text_len: int) -> Tensor:
    """Rotary positions [t + i, 3] of one sample: text on the diagonal, pictures centred on zero.

    A picture's k-th frame axis starts at its place among the sample's pictures, as in Qwen-Image's technical report
    (MSRoPE): text begins just past the largest half side.
    """
    diagonal = max(max(h // 2, w // 2) for _, h, w in pictures)
    text = (torch.arange(text_len) + diagonal)[:, None].expand(-1, 3)
    grids = [
        torch.cartesian_prod(torch.arange(f) + k, torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2))
        for k, (f, h, w) in enumerate(pictures)
    ]
    return torch.cat([text, *grids])
