"""The options of the four entry scripts: every default, its unit and its source, once.

`utils/commandline.py` reads them from YAML files and the command line. Only the entry scripts import this package; they
hand packages plain arguments. Names that select a part (Literal) equal the registries of the packages; a test holds it.
"""

from config.attacks import AttackConfig, PrivateTextConfig
from config.evaluation import ConsistencyConfig, EvalConfig, ShuffledConfig
from config.shared import DataConfig, DefenseName, MaskConfig, ModelName, RunConfig, TextConfig, TextModelName
from config.training import AugmentConfig, JigsawConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig

__all__ = [
    "AttackConfig",
    "AugmentConfig",
    "ConsistencyConfig",
    "DataConfig",
    "DefenseName",
    "EvalConfig",
    "JigsawConfig",
    "LogConfig",
    "MaskConfig",
    "ModelConfig",
    "ModelName",
    "OptimConfig",
    "PrivateTextConfig",
    "RunConfig",
    "ShuffledConfig",
    "TextConfig",
    "TextModelName",
    "TrainConfig",
]
