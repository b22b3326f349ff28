"""SFTTrainer that scores completions only, on the CPU too.

TRL projects only the labelled positions to the vocabulary where it has Triton, and every position elsewhere. On a
CPU the prompt's positions are then two fifths of a training step of a small model, for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from trl import SFTTrainer

from loki.heads import inputs_only, plain_head
from loki.training.chunked_loss import chunked_loss
from loki.training.encoding import IGNORED


class CompletionTrainer(SFTTrainer):
    """As SFTTrainer; on a CPU, logits are computed from the batch's first labelled position on.

    Of packed examples, which come as one sequence with `position_ids`, at the labelled positions only.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the labelled tokens' losses over `num_items_in_batch` (or their number), as in TRL."""
        labels_NT = inputs["labels"]
        labelled = (labels_NT != IGNORED).any(dim=0).nonzero()
        if return_outputs or labels_NT.device.type != "cpu" or len(labelled) == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The token at a labelled position is predicted one position before it.
        if "position_ids" in inputs:
            columns = labelled.flatten()
            name, to_keep, targets_NT = "position_ids", columns - 1, labels_NT[:, columns]
        else:
            first = int(labelled[0])
            name, to_keep, targets_NT = "attention_mask", labels_NT.shape[1] - first + 1, labels_NT[:, first:]
        head = plain_head(self.accelerator.unwrap_model(model))
        if head is None:
            scores_NTV = self._logits(model, inputs, name, to_keep)[:, : targets_NT.shape[1]]
            loss = F.cross_entropy(
                scores_NTV.float().flatten(0, 1), targets_NT.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        else:
            with inputs_only(head) as inputs_of_head:
                self._logits(model, inputs, name, to_keep)
            hidden_NTD = inputs_of_head[0][:, : targets_NT.shape[1]]
            is_target_NT = targets_NT != IGNORED
            loss = chunked_loss(hidden_NTD[is_target_NT], head.weight, targets_NT[is_target_NT])
        if num_items_in_batch is None:
            return loss / (targets_NT != IGNORED).sum()
        if self.args.average_tokens_across_devices:
            # Items are counted over all processes, and gradients averaged over them.
            loss = loss * self.accelerator.num_processes
        return loss / num_items_in_batch

    def _logits(
        self, model: torch.nn.Module, inputs: dict[str, Any], name: str, to_keep: int | torch.Tensor
    ) -> torch.Tensor:
        """Logits of the last `to_keep` positions, or at given ones, of inputs with an `attention_mask` or positions."""
        logits: torch.Tensor = model(
            input_ids=inputs["input_ids"], **{name: inputs[name]}, logits_to_keep=to_keep, use_cache=False
        ).logits
        return logits
