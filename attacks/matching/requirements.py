"""What gradient matching needs of a leak, of images and of sentences: the checks of its presets."""

from collections.abc import Mapping

import torch

from attacks.class_features import check_count
from attacks.label_recovery import ONE_GRADIENT, check_attributes, check_hypotheses, classifier_of
from attacks.label_rules import BIAS_RULES
from attacks.linear.closed_form import check_closed_form
from attacks.matching.likelihood import Likelihood
from attacks.matching.priors import BatchNormStatistics
from attacks.matching.problem import check_likelihood
from attacks.threat_model.checks import CROSS_ENTROPY, check_dropout, evaluating
from attacks.threat_model.leak import Leak, RefusalError
from attacks.threat_model.local_step import classes_of, multi_label
from attacks.threat_model.uses import LABELS, MJP, STATISTICS
from utils.errors import UserError


def check_matching(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the step can be repeated, and the leak has what objective, start, labels and priors of
    these options ask for."""
    check_step(leak, loss, attack)
    check_likelihood(leak, options["objective"])
    if options["objective"] == "likelihood":
        given = {key: options[key] for key in ("defense", "defense_options", "softness")}
        Likelihood(**given, batch_size=leak.batch_size)
    if options["init"] == "closed_form":
        check_closed_form(leak, {"underdetermined": True}, loss, attack)
    if attack != "dimitrov" and (options["epochs"] > 1 or options["epoch_order"]):
        raise UserError("epochs and epoch_order are options of the attack dimitrov, which has images for every epoch")
    if options["pos_embed_cosine"]:
        leak.gradient("pos_embed", attack)
    if options["image_prior"] and not options["image_prior_checkpoint"]:
        raise UserError("the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint, or image_prior 0")
    if options["batch_norm"]:
        with BatchNormStatistics(leak.model) as seen:
            if not seen.layers:
                raise UserError("the batch_norm prior needs a victim with BatchNorm layers: set batch_norm to 0")
    rule = options["labels"]
    if leak.labels is None and rule != "joint" and multi_label(leak.model):
        check_attributes(leak)
    elif leak.labels is None and rule == "exhaustive":
        check_hypotheses(leak.batch_size, classes_of(leak.model, leak.image_shape), options["restarts"])
    elif leak.labels is None and rule != "joint":
        _check_labels(leak, rule)
    if options["features"]:
        layer = classifier_of(leak.model, leak.image_shape)
        if any(f"{layer}.{part}" not in leak.gradients for part in ("weight", "bias")):
            raise UserError("the feature prior needs the gradients of the classifier's weight and bias: leave it out")


def check_step(leak: Leak, loss: str, attack: str) -> None:
    """Raise UserError unless something is shared and the client's step can be repeated: its loss, and what its dropout
    drew."""
    if not leak.gradients:
        raise RefusalError("gradient matching needs at least one gradient: everything is withheld from this leak")
    own = getattr(leak.model, "loss", CROSS_ENTROPY)
    if loss != own:
        what = "mean cross-entropy" if own == CROSS_ENTROPY else f"the model's loss '{own}'"
        raise RefusalError(f"attack '{attack}' repeats the step with {what}, and the client's loss is '{loss}'")
    check_dropout(leak, attack, seed_helps=True)
    if getattr(leak.model, "spec", None) is not None:  # a network from outside
        _check_differentiable(leak, attack)


def _check_differentiable(leak: Leak, attack: str) -> None:
    """Raise UserError where no gradient reaches the images: matching would return its start, and that looks private."""
    like = next(leak.model.parameters())
    own = torch.Generator().manual_seed(0)
    images = torch.rand(1, *leak.image_shape, generator=own).to(like).requires_grad_()
    try:
        with evaluating(leak.model), torch.enable_grad():
            total = leak.model(images.clone()).sum()
            reached = total.requires_grad and torch.autograd.grad(total, images, allow_unused=True)[0] is not None
    except Exception:  # the rehearsal of the client's step says what is wrong
        return
    if not reached:
        raise RefusalError(
            f"attack '{attack}' follows gradients back to the images, and this network does not carry them that far: a "
            f"part of it runs under torch.no_grad() or is detached; to freeze it use requires_grad_(False) instead"
        )


def matching_uses(options: Mapping) -> tuple[str, ...]:
    """Return the knowledge that gradient matching on images uses with these options."""
    return (LABELS, MJP, STATISTICS) if options["batch_norm"] else (LABELS, MJP)


def _check_labels(leak: Leak, rule: str) -> None:
    if rule == "idlg" and leak.batch_size > 1:
        raise RefusalError(
            f"label rule 'idlg' reads one label, the batch has {leak.batch_size}: use bias_corrected, or yin if unique"
        )
    if rule == "dimitrov" and leak.local is None:
        raise RefusalError(ONE_GRADIENT)
    layer = classifier_of(leak.model, leak.image_shape)
    if rule == "class_features":
        leak.gradient(f"{layer}.bias" if layer else "bias", f"label rule {rule}")
        check_count(leak.batch_size, *leak.model.get_submodule(layer).weight.shape)
    leak.gradient(f"{layer}.{'bias' if rule in BIAS_RULES else 'weight'}" if layer else "weight", f"label rule {rule}")
