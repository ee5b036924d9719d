"""The AWQ format, version GEMM: how 4-bit weights and zero points are packed into int32 words, and what they mean.

Source: AutoAWQ `awq/utils/packing_utils.py`, checked bit for bit against AutoAWQ's own packer.
"""

from dataclasses import dataclass

import torch

# Column 8c + j of a row sits in bits 4 * NIBBLE_OF_COLUMN[j] .. + 3 of word c.
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
# The inverse: nibble i of word c holds column 8c + COLUMN_OF_NIBBLE[i].
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqWeight:
    """One linear layer as the checkpoint stores it.

    y[n] = sum over k of x[k] * (q[k, n] - z[k // group, n]) * s[k // group, n]
    """

    qweight: torch.Tensor  # int32 [in, out / 8]
    qzeros: torch.Tensor  # int32 [in / group, out / 8]
    scales: torch.Tensor  # fp16 [in / group, out]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix of an nn.Linear, [out, in]."""
        q = unpack(self.qweight).view(-1, self.group_size, self.out_features)
        z = unpack(self.qzeros).unsqueeze(1)
        w = (q - z).to(torch.float32) * self.scales.to(torch.float32).unsqueeze(1)
        return w.view(self.in_features, self.out_features).t().contiguous().to(dtype)


def concatenate(weights: list[AwqWeight]) -> AwqWeight:
    """Merge layers that read the same input into one, their outputs side by side."""
    return AwqWeight(
        torch.cat([w.qweight for w in weights], dim=1),
        torch.cat([w.qzeros for w in weights], dim=1),
        torch.cat([w.scales for w in weights], dim=1),
    )


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8] → uint4 values as int8 [rows, columns]."""
    shifts = torch.tensor([4 * n for n in NIBBLE_OF_COLUMN], dtype=torch.int32, device=words.device)
    values = (words.unsqueeze(-1) >> shifts) & 0xF
    return values.to(torch.int8).view(words.shape[0], -1)


def pack(values: torch.Tensor) -> torch.Tensor:
    """uint4 values as any integer dtype [rows, columns] → int32 [rows, columns / 8]."""
    rows, columns = values.shape
    assert columns % 8 == 0
    grouped = values.to(torch.int32).view(rows, columns // 8, 8)
    words = torch.zeros(rows, columns // 8, dtype=torch.int32, device=values.device)
    for column, nibble in enumerate(NIBBLE_OF_COLUMN):
        words |= (grouped[..., column] & 0xF) << (4 * nibble)
    return words


def quantize(matrix: torch.Tensor, group_size: int) -> AwqWeight:
    """Round an nn.Linear matrix [out, in] to 4 bits with zero points, group by group along `in`.

    Asymmetric min-max rounding as in AutoAWQ's `pseudo_quantize_tensor`: scale = (max - min) / 15,
    zero = round(-min / scale).
    """
    out_features, in_features = matrix.shape
    assert in_features % group_size == 0 and out_features % 8 == 0
    w = matrix.to(torch.float32).t().reshape(in_features // group_size, group_size, out_features)
    low, high = w.amin(dim=1).clamp(max=0), w.amax(dim=1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / 15).to(torch.float16)
    s = scales.to(torch.float32)
    zeros = (-low / s).round().clamp(0, 15)
    q = (w / s.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 15)
    return AwqWeight(pack(q.view(in_features, out_features)), pack(zeros), scales)
