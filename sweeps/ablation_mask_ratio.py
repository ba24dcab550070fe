"""How much can be hidden before training breaks?

Hypothesis: with complementary masks there is a plateau around one half, since what one modality loses the other shows;
with individual masks, which hide some places in both, the score falls earlier.

With complementary masks `ratio` is what RGB loses and thermal loses the rest, so 0 and 1 are the same thing for the
other modality, not "no masks". With individual masks both lose `ratio`, and 0 hides nothing.

Feeds the ratio table and its curve with the estimated breaking point and its interval, for both types. Cost: 15 rows of
3 seeds, 45 runs. `mask_ratio_by_backbone` asks whether the breaking point moves with capacity.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config

KINDS = {"random_complementary": [n / 10 for n in range(10)], "individual": [0.0, 0.3, 0.5, 0.7, 0.9]}

ROWS = {
    f"{kind.replace('_', ' ')}, {ratio:g}": {"masking.kind": kind, "masking.ratio": ratio}
    for kind, ratios in KINDS.items()
    for ratio in ratios
}
# the published ratio comes first in its group: gains are measured against it
GROUPS = {
    kind: sorted((row for row in ROWS if row.startswith(kind)), key=lambda row: not row.endswith(" 0.5"))
    for kind in ("random complementary", "individual")
}

sweep = Sweep(
    title="How much can be hidden before training breaks?",
    base=config,
    variants=ROWS,
    seeds=(0, 1, 2),
    groups=GROUPS,
    dose="masking.ratio",
)
