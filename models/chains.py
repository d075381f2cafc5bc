"""Chains of layers that linear systems can take apart, as tables: models/convnets.py builds them."""

from typing import NamedTuple


class Target(NamedTuple):
    """A chain without pooling, normalisation or shortcut. layers: (channels, kernel, stride, padding) of a convolution,
    or the width of a linear layer; acts: a letter of LETTERS for each, and one for the classifier behind them."""

    layers: list[tuple[int, int, int, int] | int]
    acts: str
    conv_bias: bool = False


WIDE3, NARROW3, WIDE4, LENET = (6, 3, 1, 0), (1, 3, 1, 0), (6, 4, 2, 0), [(12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2)]
CNN6 = [(36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]

# cnn2 to cnn4, lenet2, cnn6d: Chen and Campbell, "Analysing Training-Data Leakage from Gradients through Linear Systems
# and Gradient Matching", BMVC 2022, named as in their code (whose cnn3_c5 does not run: its classifier is too small).
# lenet_leaky is their LeNet; lenet is DLG's. cnn6, fcn3: Zhu and Blaschko, "R-GAP", ICLR 2021, for many classes.
TARGETS = {
    "cnn2_c0": Target([(1, 3, 2, 0)], "TT"),
    "cnn2_c1": Target([WIDE3], "TI"),
    "cnn2_c2": Target([WIDE4], "TI"),
    "cnn2_c4": Target([NARROW3], "TT"),
    "cnn2_c5": Target([(3, 3, 1, 1)], "TT"),
    "cnn2_c6": Target([(12, 5, 2, 0)], "TI"),
    "cnn2_c11": Target([WIDE3], "LS"),
    "cnn2_c21": Target([WIDE4], "LS"),
    "cnn2_c41": Target([NARROW3], "LS"),
    "cnn3_c1": Target([WIDE3, (3, 4, 2, 0)], "TTI"),
    "cnn3_c2": Target([WIDE4, (3, 3, 2, 0)], "TTI"),
    "cnn3_c3": Target([WIDE3, (9, 3, 1, 0)], "TTI"),
    "cnn3_c4": Target([NARROW3, WIDE3], "TTI"),
    "cnn3_c5": Target([(12, 5, 1, 1), (12, 5, 2, 2)], "TTI"),
    "cnn3_c6": Target([WIDE3, (3, 4, 2, 0)], "LLT"),
    "cnn3_c7": Target([WIDE3, (3, 4, 2, 0)], "TLT"),
    "cnn3_c8": Target([(9, 3, 1, 0), (3, 4, 2, 0)], "TTT"),
    "cnn3_c9": Target([(5, 3, 1, 0), (7, 3, 1, 0)], "TTT"),
    "cnn3_c11": Target([WIDE3, (3, 4, 2, 0)], "LLS"),
    "cnn3_c12": Target([WIDE3, (3, 4, 2, 0)], "PPS"),
    "cnn3_c13": Target([WIDE3, (3, 4, 2, 0)], "TTS"),
    "cnn3_c14": Target([WIDE3, (3, 4, 2, 0)], "IIS"),
    "cnn3_c15": Target([WIDE3, (3, 4, 2, 0)], "IIT"),
    "cnn3_c21": Target([WIDE4, (3, 3, 2, 0)], "LLS"),
    "cnn3_c22": Target([WIDE4, (3, 3, 2, 0)], "PPS"),
    "cnn3_c31": Target([WIDE3, (9, 3, 1, 0)], "LLS"),
    "cnn3_c32": Target([WIDE3, (9, 3, 1, 0)], "PPS"),
    "cnn3_c41": Target([NARROW3, WIDE3], "LLS"),
    "cnn3_c42": Target([NARROW3, WIDE3], "PPS"),
    "cnn4_c1": Target([WIDE3, (5, 4, 2, 0), (3, 4, 1, 0)], "TTTI"),
    "cnn4_c2": Target([(16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2)], "TTTI"),
    "cnn4_c3": Target([(6, 5, 1, 0), (16, 5, 2, 0), (16, 5, 1, 2)], "TTTI"),
    "lenet_leaky": Target(LENET, "LLLI", conv_bias=True),
    "lenet2": Target([(12, 3, 2, 1), *LENET[1:]], "TTTI"),
    "cnn6": Target([(12, 4, 2, 2), *CNN6], "RRRRRRI"),
    "cnn6d": Target([(12, 4, 2, 2), (20, 3, 2, 1), *CNN6[1:]], "RRRRRRI"),
    "fcn3": Target([1000, 100], "RRI"),
}
