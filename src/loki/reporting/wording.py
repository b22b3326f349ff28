"""What a page calls the scores of a log, and what may be said of them: each score means something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loki.choices import ScoreName


@dataclass(frozen=True)
class Wording:
    """The words for one score."""

    noun: str
    """As in `the highest attribution`."""
    title: str
    """Of the page of a log; `{model}` stands for the model."""
    definition: str
    """What the score of a row is, after `scores each row by its`; empty for attribution, which needs no such words."""
    file_stem: str
    """Begins the name of the file with the figure of its spread."""
    entry: str = "window"
    """What has one score for every row: a prompt, or a window of text."""
    argues: bool = False
    """Whether the sign says which way a row pushes the answer."""

    @property
    def entries(self) -> str:
        """More than one of them."""
        return f"{self.entry}s"

    @property
    def subject_measure(self) -> str:
        """What is averaged over the prompts of a subject, whatever the score's sign."""
        return f"magnitude of {self.noun}" if self.argues else self.noun


KVA = Wording("attribution", "Where {model} keeps what it knows", "", "attribution", entry="prompt", argues=True)
OF_A_CHANGE = "What a change of each row would cost {model}"
WORDINGS: Mapping[ScoreName, Wording] = MappingProxyType(
    dict[ScoreName, Wording](
        {
            "kva": KVA,
            "damage": Wording(
                "damage",
                OF_A_CHANGE,
                "damage: how much a random change of it, drawn anew at every position of a text, would move the "
                "model’s predictions, to second order",
                "damage",
            ),
            "fisher": Wording(
                "Fisher information",
                OF_A_CHANGE,
                "Fisher information: how much a random change of it would move the model’s predictions on a text, to "
                "second order",
                "fisher",
            ),
            "first_order": Wording(
                "first-order importance",
                "How much the loss of {model} leans on each row",
                "first-order importance: how steeply the loss on a text changes as the row’s weights are scaled down",
                "first_order",
            ),
            "activation_norm": Wording(
                "activation norm",
                "How large the output of each row of {model} is",
                "activation norm: the mean square of its output over the positions of a text",
                "activation_norm",
            ),
        }
    )
)
UNKNOWN = Wording("score", "The score of each row of {model}", "score, which this version does not know", "score")


def wording_of(score: str) -> Wording:
    """The words for a score by its name, such as `damage`; plain ones for a name from elsewhere."""
    return next((wording for name, wording in WORDINGS.items() if name == score), UNKNOWN)
