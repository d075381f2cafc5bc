"""What a client's round is like, and what its server is told of it: the one list of these options."""

from collections.abc import Sequence
from dataclasses import dataclass

from attacks.threat_model.leak import LocalSteps


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms of a round; most are fields of `Leak`, which says what they mean to the attacker.

    reveal_labels: the server is told the targets of the step. mean, std: of the model's inputs, by channel. local: the
    steps before anything is shared (FedAvg), also as a tuple; None shares a gradient. training: the model is in
    training mode, its dropout fixed by dropout_seed. statistics: those of the BatchNorm layers are shared, of the whole
    batch before the first step. withhold: patterns of parameter names whose gradients stay on the device.
    attacker_knowledge: of MJP (attacks/threat_model/uses.py).
    """

    reveal_labels: bool = True
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    local: LocalSteps | None = None
    training: bool = False
    dropout_seed: int | None = None
    statistics: bool = False
    withhold: Sequence[str] = ()
    attacker_knowledge: str = "method"

    def __post_init__(self):
        if isinstance(self.local, tuple):
            object.__setattr__(self, "local", LocalSteps(*self.local))

    @property
    def scale(self) -> dict[str, Sequence[float]]:
        """Mean and standard deviation of the model's inputs."""
        return {"mean": self.mean, "std": self.std}
