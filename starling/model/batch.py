"""One step's work for the model: the tokens of several requests, flattened, and where their keys and values live."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Tokens of `requests` requests, each a contiguous run at its own positions.

    All tensors lie on the model's device. A request's tokens are consecutive positions, the last one being
    context_lens - 1; attention sees every earlier position of the same request within the sliding window.
    """

    token_ids: torch.Tensor  # int64 [tokens]; below 0: -(1 + a row of `sampled`)
    positions: torch.Tensor  # int32 [tokens]
    slots: torch.Tensor  # int32 [tokens]: block * block_size + offset, where this token's key and value go
    query_starts: torch.Tensor  # int32 [requests + 1]: request r owns tokens query_starts[r]:query_starts[r + 1]
    context_lens: torch.Tensor  # int32 [requests]: positions in the cache once this step is written
    block_tables: torch.Tensor  # int32 [requests, blocks]: -1 where unused or passed by the window
    prompt_tokens: torch.Tensor  # bool [tokens]: part of the request's prompt (False: generated, or a draft)
    logit_rows: torch.Tensor  # int64 [rows]: the tokens whose logits are wanted, ascending, each once
    sampled: torch.Tensor | None = None  # int [rows of the previous step]: the ids it draws, perhaps not known yet
    decodes: bool = False  # no request has more tokens than one and its drafts, 16 at most: none computes a prompt

    def __post_init__(self) -> None:
        tokens, requests = self.token_ids.numel(), self.context_lens.numel()
        assert self.positions.numel() == self.slots.numel() == self.prompt_tokens.numel() == tokens
        assert self.query_starts.numel() == requests + 1
        assert self.block_tables.shape[0] == requests

    @property
    def wants_all(self) -> bool:
        """Whether every token's logits are wanted: `logit_rows` is then 0, 1, 2, … (or padding, which is not read)."""
        return self.logit_rows.numel() == self.token_ids.numel()
