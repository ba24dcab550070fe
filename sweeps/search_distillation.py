"""Which weights of the self-distillation losses are best?

Four weights of the objective against the supervision of the clean fused features, which stays 1: modality-wise
supervision (both modalities alike), both self-distillation terms, masked supervision. Each on a logarithmic scale from
a thirtieth to thirty times the published weight, or off. The first trial is the published choice, 1 for all. Sought is
what is left on the validation split when a modality is missing; `--objective clean` seeks the clean score,
`--objective clean,worst` the front between both.

`crm tune promote distillation` writes a sweep which shows, with fresh seeds and on test, whether the gain holds.
"""

from crm.search import Search, Weight
from experiments.mf_swin_t import config

search = Search(
    config,
    {
        "modality-wise": Weight(1 / 30, 30, sets=("loss.rgb", "loss.thermal")),
        "loss.masked": Weight(1 / 30, 30),
        "loss.complementary": Weight(1 / 30, 30),
        "loss.non_local": Weight(1 / 30, 30),
    },
    "missing",
    title="Which weights of the self-distillation losses are best?",
    trials=40,
)
