"""The options of the entry scripts: every default, its unit and its source, once.

`utils/commandline.py` reads them from YAML files and the command line. Only the entry scripts import this package; they
hand packages plain arguments. No import here loads torch: names of attacks and defences come from their registries, and
names of models and data sets (Literal) equal theirs; a test holds it.
"""

from options.attacks import AttackConfig, PrivateTextConfig
from options.audit import AuditConfig
from options.evaluation import ConsistencyConfig, EvalConfig, ShuffledConfig
from options.shared import DataConfig, DefenseName, MaskConfig, ModelName, RunConfig, TextConfig, TextModelName
from options.training import AugmentConfig, JigsawConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig

__all__ = [
    "AttackConfig",
    "AuditConfig",
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
