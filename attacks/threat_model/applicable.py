"""Which attacks apply to what a server has, and why the others do not: said before any of them works.

Asked is the check that each attack is declared with (attacks/threat_model/checks.py), which it also refuses by. It
takes a Leak and the options the attack will run with, and looks at names, shapes and modules alone: a preview, see
`expected`, has no gradients yet.
"""

from fnmatch import fnmatch

from torch import nn

from attacks import ATTACKS, SENTENCES
from attacks.threat_model.checks import CROSS_ENTROPY
from attacks.threat_model.leak import Aggregate, Leak
from attacks.threat_model.terms import Terms
from attacks.threat_model.uses import defaults
from utils.channels import channels_of
from utils.errors import UserError


def preview_leak(
    model: nn.Module,
    batch_size: int,
    *,
    aggregate: Aggregate | None = None,
    **terms,
) -> Leak:
    """Return a preview of the leaks of simulated clients: parameters stand in for gradients, of which only names and
    shapes mean anything. terms: fields of `Terms`."""
    told = Terms(**terms)
    shared = {
        name: value.detach()
        for name, value in model.named_parameters()
        if value.requires_grad
        and not any(fnmatch(name, pattern) for pattern in told.withhold)
        and not name.startswith("localization.")
    }
    side = model.arguments["image_size"]
    labels = next(model.parameters()).new_zeros(batch_size).long() if told.reveal_labels else None
    known = {key: getattr(told, key) for key in ("local", "training", "dropout_seed", "attacker_knowledge")}
    shape = (channels_of(model), side, side)
    return Leak(model, shared, shape, batch_size, labels, aggregate=aggregate, **known)


def applicable(leak: Leak, loss: str | None = None) -> dict[str, str]:
    """Return by name of every attack on images: why it does not apply to this leak with its default options, empty if
    it does. Those on sentences have no place in such a list."""
    return {name: unmet_requirement(name, leak, {}, loss) for name in ATTACKS if name not in SENTENCES}


def unmet_requirement(name: str, leak: Leak, options: dict, loss: str | None = None) -> str:
    """Return why the attack does not apply with these options, empty if it does; see `require`."""
    try:
        require(name, leak, options, loss)
    except UserError as error:
        return str(error)
    return ""


def require(name: str, leak: Leak, options: dict, loss: str | None = None) -> None:
    """Raise what the attack would raise for this leak: RefusalError where it cannot read it, another UserError for its
    options. loss: the client's, as leak files name it; default the model's own."""
    attack = ATTACKS[name]
    check = getattr(attack, "check", None)  # an attack without one says nothing before it works
    if check is not None:
        loss = loss or getattr(leak.model, "loss", CROSS_ENTROPY)
        check(leak, defaults(attack) | options, loss, name)


def applicable_text(verdicts: dict[str, str]) -> str:
    """Return the result of `applicable` as lines of text."""
    fitting = [name for name, why in verdicts.items() if not why]
    lines = [f"attacks that apply: {', '.join(fitting) or 'none'}"]
    lines += [f"  {name:<20} no: {reason(name, why)}" for name, why in verdicts.items() if why]
    return "\n".join(lines)


def reason(name: str, why: str) -> str:
    """Return an unmet requirement without the name of its attack, for tables that have it in another column."""
    return why.removeprefix(f"attack '{name}' ")
