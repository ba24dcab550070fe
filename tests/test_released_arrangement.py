"""The as-released arrangement that the benchmark measures computes what the objective and the network compute."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks import released
from benchmarks.released_loader import Released
from crm.config import Config, Data
from crm.data.dataset import open_split
from crm.data.export import write_synthetic
from crm.data.transforms import augment, collate
from crm.model.segmenter import semantic_scores
from tests.test_objective import HIDDEN, IMAGE, LOSS, TARGETS, gradients, random, run, tiny
from tests.test_objective import one_thread as one_thread

AS_RELEASED = replace(LOSS, count_padding=True, count_ignored=True)


class Terms(dict):
    @property
    def total(self) -> torch.Tensor:
        return torch.stack(list(self.values())).sum()


def test_its_losses_and_gradients_are_ours():
    model = tiny().double()
    with torch.no_grad():  # at first samples lie on cell centres, where rounding chooses between two derivatives
        for layer in model.pixel_decoder.layers:
            layer.get_parameter("attention.offsets.bias").add_(0.3)
    ours = run(model, AS_RELEASED)
    theirs = Terms(
        released.losses(model, IMAGE.double(), HIDDEN, TARGETS, AS_RELEASED, random(3), lambda _: nullcontext())
    )
    assert ours.terms.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours.terms[name], value, rtol=1e-5, atol=1e-7)
    one, two = gradients(model, ours), gradients(model, theirs)
    for name, gradient in one.items():
        assert (gradient - two[name]).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_nothing_that_we_compute_in_another_way_is_in_it(monkeypatch):
    def ours(*given, **more):
        raise AssertionError("ours")

    model = tiny()
    run(model, AS_RELEASED)  # what is cached is cached
    for name in ("backbone.normed_linear", "backbone.window_attention", "backbone.feed_forward",
                 "pixel_decoder.feed_forward", "query_decoder.attend", "query_decoder.attention_mask",
                 "query_decoder.mask_product", "sampling._gathered"):  # fmt: skip
        monkeypatch.setattr(f"crm.model.{name}", ours)
    with pytest.raises(AssertionError, match="ours"):
        run(model, AS_RELEASED)
    released.losses(model, IMAGE, HIDDEN, TARGETS, AS_RELEASED, random(3), lambda _: nullcontext())
    released.predict(model, IMAGE)


def test_its_class_map_is_ours():
    model = tiny().eval()
    with torch.no_grad():
        ours = semantic_scores(model(IMAGE), (32, 64)).argmax(1)
    assert (released.predict(model, IMAGE) == ours).double().mean() > 0.999


def test_its_loader_gives_the_images_of_our_released_recipe(tmp_path):
    write_synthetic("mf", tmp_path / "mfnet", counts={"train": 3}, size=(96, 128))
    data = replace(Data(), size=(96, 128), crop=(40, 48), float_resize=True, float_jitter=True)
    made = Released(Config(data=data, batch=1), tmp_path / "mfnet")
    split = open_split("mf", "train", data_root=tmp_path, size=(96, 128))
    for i in range(len(made)):
        image, label = made[i]
        batch = collate([augment(split[i], data, torch.Generator().manual_seed(i))], split.spec)
        torch.testing.assert_close(image, batch.image[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(label, batch.label[0, :40, :48].long())
