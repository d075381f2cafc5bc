"""From the agreed model to what clients receive and what they train of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attacks.malicious import SERVERS
from attacks.malicious.server import Knowledge, Server
from attacks.threat_model.sharing import SHARES
from models.partial import All
from utils.commandline import options


def build_server(server: str, given: Mapping) -> Server:
    """Return a server by name with the options `given`, checked by name, type and range: UserError in one line."""
    kind = SERVERS[server]
    return kind(**options(dict(given), kind, "server_options"))


def build_share(share: str, given: Mapping) -> All:
    """Return what clients share, by name with the options `given`, checked by name and type."""
    kind = SHARES[share]
    return kind(**options(dict(given), kind, "share_options"))


def sent_model(
    model: nn.Module,
    *,
    server: str,
    server_options: Mapping,
    share: str,
    share_options: Mapping,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    public: Tensor | None,
) -> tuple[nn.Module, dict[str, str]]:
    """Return (the model as clients train it, the rows of a threat model that say so).

    mean, std: of the input's normalisation; public (M, C, H, W): the server's own pictures, normalised. The part that
    clients train is agreed first, and the server then changes what it sends. Raises UserError where one does not fit.
    """
    sender, part = build_server(server, server_options), build_share(share, share_options)
    training = model.training
    model = part.apply(model, seed)
    side = model.arguments["image_size"] if server != "honest" else 0
    knowledge = Knowledge((3, side, side), tuple(mean), tuple(std), public)
    like = next(model.parameters()).device
    model = sender.tamper(model, knowledge, generator=torch.Generator().manual_seed(seed)).to(like).train(training)
    rows = {"attacker": sender.threat_text()} if sender.power != "honest" else {}
    if sender.power != "honest":
        rows["public pictures"] = f"the server has {len(public)}" if public is not None else "the server has none"
    return model, rows | ({"trained and shared": part.says} if part.says else {})
