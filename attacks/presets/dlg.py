"""Deep Leakage from Gradients (DLG) and its improvement iDLG.

DLG searches image and label at once: L-BFGS without line search on the plain squared distance of all gradients, from
N(0, 1), no prior, no bounds. Its 300 calls of torch's optimizer are 20 gradients each, 6000 iterations here. Meant for
smooth activations: ReLU leaves L-BFGS without curvature. About one start in five diverges: give it restarts.
Source: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019.

iDLG reads the label of a single image off the sign of the last layer's gradient and searches the image only.
Source: Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020.
"""

from dataclasses import replace

from attacks.matching import MatchingOptions, gradient_matching

DLG = MatchingOptions(
    objective="l2", labels="joint", optimizer="lbfgs", lr=1.0, iterations=6000, boxed=False, init="randn"
)
dlg = gradient_matching(DLG, name="dlg")
idlg = gradient_matching(replace(DLG, labels="idlg", stop_below=1e-6), name="idlg")
