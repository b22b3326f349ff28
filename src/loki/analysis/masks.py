"""What branches may see: the prefix as the last position sees it, and themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class BranchMasks:
    """Widens what a model passes to its layers for one query at position T to all branches under way.

    A model builds mask and bias for the one query itself, whatever its windows, padding or ALiBi are. Branches
    get that row for the prefix, its last entry for their own key, and nothing of each other.

    Shapes: N prompts (or 1), H heads (or 1), T positions, B branches.
    """

    num_prefix: int
    """T − 1."""
    num_branches: int
    """The most branches that are under way at once."""
    _widened: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)

    def widen(self, arguments: dict[str, Any], hidden_NBD: torch.Tensor) -> None:
        """Put masks and biases for the branches in `hidden_NBD` in place of those in a layer's arguments."""
        num_branches = hidden_NBD.shape[1]
        mask_NHBK = self._full_mask(arguments.get("attention_mask"), hidden_NBD)
        arguments["attention_mask"] = mask_NHBK[:, :, :num_branches, : self.num_prefix + num_branches]
        alibi_K = arguments.get("alibi")
        if alibi_K is not None:
            own_K = alibi_K[..., -1:].expand(*alibi_K.shape[:-1], num_branches)
            arguments["alibi"] = torch.cat([alibi_K[..., :-1], own_K], dim=-1)

    def _full_mask(self, row_NH1T: torch.Tensor | None, hidden_NBD: torch.Tensor) -> torch.Tensor:
        """Additive mask (N, H, B, T-1+B); models share one row among many layers, so it is made once for each."""
        if id(row_NH1T) not in self._widened:
            self._widened[id(row_NH1T)] = (row_NH1T, self._build(row_NH1T, hidden_NBD))  # keeps the row, and its id
        return self._widened[id(row_NH1T)][1].to(hidden_NBD.device)

    def _build(self, row_NH1T: torch.Tensor | None, hidden_NBD: torch.Tensor) -> torch.Tensor:
        dtype, device = hidden_NBD.dtype, hidden_NBD.device
        lowest = torch.finfo(dtype).min
        if row_NH1T is None:
            row_NH1T = torch.zeros(1, 1, 1, self.num_prefix + 1, dtype=dtype, device=device)
        elif row_NH1T.dtype == torch.bool:
            row_NH1T = torch.zeros_like(row_NH1T, dtype=dtype).masked_fill(~row_NH1T, lowest)
        assert row_NH1T.shape[-2:] == (1, self.num_prefix + 1), f"mask of shape {tuple(row_NH1T.shape)}"
        prefix_NHBT = row_NH1T[..., :-1].expand(-1, -1, self.num_branches, -1)
        others_BB = torch.full((self.num_branches, self.num_branches), lowest, dtype=dtype, device=device)
        alone_BB = torch.eye(self.num_branches, dtype=torch.bool, device=device)
        own_NHBB = torch.where(alone_BB, row_NH1T[..., -1:], others_BB)
        return torch.cat([prefix_NHBT, own_NHBB], dim=-1)
