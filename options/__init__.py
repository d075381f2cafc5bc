"""The options of the entry scripts, composed of those of their parts.

Every default, with its unit and its source, stands once: in the `options.py` beside the code that uses it (`data/`,
`models/`, `training/`, `campaigns/`, `attacks/threat_model/`, `attacks/matching/`). `utils/commandline.py` reads them
from YAML files and the command line. Only the entry scripts import this package. No import here loads torch: names of
models, attacks and defences come from their registries; those of data sets (Literal) equal theirs, which a test holds.
"""

from options.attacks import AttackConfig
from options.audit import AuditConfig
from options.evaluation import ConsistencyConfig, EvalConfig, ShuffledConfig
from options.membership import MembershipConfig
from options.training import TrainConfig

__all__ = [
    "AttackConfig",
    "AuditConfig",
    "ConsistencyConfig",
    "EvalConfig",
    "MembershipConfig",
    "ShuffledConfig",
    "TrainConfig",
]
