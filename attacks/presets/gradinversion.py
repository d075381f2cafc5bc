"""GradInversion (See through Gradients): batches of ImageNet size, held together by BatchNorm statistics.

Labels of a batch without repetitions come first ('yin'). Then several starts ("seeds") run side by side on the squared
distance of gradients, the statistics every BatchNorm layer expects, total variation and the norm, with noise on every
step, and are drawn to their common mean. The paper registers the seeds by optical flow; here by the best circular
shift. It never published its weights: these are breaching's, and LeakPro's for the group (langevin 0.2 in the paper's
text). Where the client shares the statistics of its batch, the prior uses those.
Source: Yin et al., "See through Gradients: Image Batch Recovery via GradInversion", CVPR 2021.
"""

from attacks.matching import MatchingOptions, gradient_matching

gradinversion = gradient_matching(
    MatchingOptions(
        objective="euclidean",
        objective_weight=1e-4,
        batch_norm=0.1,
        tv=1e-4,
        tv_form="padded",
        mean_square=1e-6,
        group=0.01,
        restarts=4,
        labels="yin",
        schedule="cosine",
        warmup=50,
        lr=0.1,
        langevin=0.01,
        iterations=20000,
    ),
    name="gradinversion",
)
