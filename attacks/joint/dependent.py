"""How far a solved token can be off where tokens are not told apart: what fits every equation can be a mixture of them.

The equations of a block tell tokens apart that are linearly independent, by more than rounding. Patches of one colour
each, ramps, or a few patches that come back at many places are not: of s independent patches at R kinds of places at
most s + R - 1 tokens are independent, of the hidden ones of one masked image s. Layers behind the attention and the
activations show more of them. Nearly equal tokens drown. In both precisions mixtures of dependent tokens were solved
whose error was predicted far too small; in double precision none is claimed unless attention confirms all images
(`joint`).
"""

import math

import torch

from attacks.exactness import MIXED, OFF
from attacks.joint.block import Block, Places
from attacks.joint.bounds import masked_alone
from attacks.linear.row_spaces import Rows
from attacks.threat_model.leak import Leak

# Times its predicted error, how far a token may be off in single precision, where it is not MIXED. Furthest seen: 20
# where all tokens are told apart, 57 where all of one masked image are counted and some drown.
APART, DROWNED = 2 * OFF, 10 * OFF
BLOCKS = 3  # the first ones, whose layers are counted


def off(leak: Leak, span: Rows, places: Places | None, tokens: int, above: int) -> float:
    """Return how many times its predicted error a token can be off, infinite where the gradients show more tokens than
    can be independent.

    Args:
        span: The row space of the patches.
        tokens: How many different ones were told apart.
        above: How many tokens, prefix tokens among them, the first block's MLP shows above rounding.
    """
    each = leak.model.grid[0] * leak.model.grid[1]
    number, alone = leak.batch_size * each, masked_alone(leak)
    prefix, patches = leak.batch_size * leak.model.num_prefix_tokens, len(span.basis)
    if span.clean:
        # Prefix tokens of images that are equal are one token too: as many differ as it takes images for these tokens.
        differ = min(leak.batch_size, math.ceil(tokens / each)) * leak.model.num_prefix_tokens
        hidden = not alone and patches < number and _shown(leak, number + prefix) - differ > tokens
        return torch.inf if hidden else OFF
    if patches == number and above >= number + prefix:
        return APART
    if alone and tokens == number:  # visible patches come from equations of their own
        return DROWNED
    own = not alone and tokens == patches and above >= tokens + min(1, prefix)  # each a patch: an image is there twice
    kinds = 1 if places is None else len(places.rows)
    most = tokens if alone or own else patches + kinds - 1
    if _shown(leak, number + prefix) - prefix > most:
        return torch.inf
    return APART if own else MIXED


def _shown(leak: Leak, limit: int) -> int:
    """Return the largest number of different tokens, `limit` at most, that a layer of the first blocks shows."""
    count = min(BLOCKS, len(leak.model.blocks) - 1)  # of the last block, patches have no gradient
    blocks = [Block(leak, number, limit, limit, faint=True) for number in range(count)]
    return max(rows.above for block in blocks for rows in (block.passed, block.active))
