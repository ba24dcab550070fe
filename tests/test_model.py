import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crm.config import Model
from crm.model.fusion import FUSIONS
from crm.model.pixel_decoder import exact_linears, softmax_of_few
from crm.model.query_decoder import attend, attention_mask, mask_product
from crm.model.sampling import deformable_sample
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.model.window_attention import shift_mask

TINY = {
    "embed": 8,
    "depths": (1, 1, 2, 1),
    "heads": (1, 2, 2, 4),
    "drop_path": 0.0,
    "width": 32,
    "queries": 5,
    "encoder_layers": 1,
    "encoder_ffn": 16,
    "decoder_layers": 2,
    "decoder_ffn": 16,
    "decoder_heads": 4,
}


def tiny(**changes) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(Model(**{**TINY, **changes}), num_classes=3)


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return tiny().eval()


def image(height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (224, 32)])
def test_all_outputs_have_the_promised_shapes_at_any_multiple_of_32(model, height, width):
    features = model.features(image(height, width))
    for maps in features:
        for i, level in enumerate(maps):
            assert level.shape == (2, 8 * 2**i, height // 2 ** (i + 2), width // 2 ** (i + 2))
        prediction = model.head(maps)
        assert len(prediction.class_logits) == len(prediction.mask_logits) == 3
        assert prediction.class_logits[-1].shape == (2, 5, 4)
        assert prediction.mask_logits[0].shape == (2, 5, height // 4, width // 4)
    assert semantic_scores(prediction, (height, width)).shape == (2, 3, height, width)


@torch.no_grad()
def test_the_cheaper_heads_equal_the_full_one(model):
    maps = model.features(image()).fused
    full, last, some = model.head(maps), model.head(maps, deep=False), model.head(maps, with_masks=1)
    torch.testing.assert_close(last.class_logits[-1], full.class_logits[-1])
    torch.testing.assert_close(last.mask_logits[-1], full.mask_logits[-1])
    torch.testing.assert_close(some.mask_logits, full.mask_logits[:, :1])
    torch.testing.assert_close(model.class_logits(maps), full.class_logits[-1])
    torch.testing.assert_close(model(image()).mask_logits[-1], full.mask_logits[-1])


@torch.no_grad()
def test_an_image_gives_the_same_alone_and_in_a_batch(model):
    torch.testing.assert_close(model(image()).mask_logits[:, :1], model(image()[:1]).mask_logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("index", "modality"), [(0, "rgb"), (1, "thermal")])
def test_a_wholly_hidden_modality_is_the_mask_token_everywhere(model, index, modality):
    hidden = torch.zeros(2, 2, 16, 24, dtype=torch.bool)
    hidden[:, index] = True
    features, other = model.features(image(), hidden), model.features(torch.zeros(2, 4, 64, 96), hidden)
    clean = model.features(image())
    for name in ("rgb", "thermal"):
        same = torch.equal(getattr(features, name)[0], getattr(other, name)[0])
        assert same == (name == modality)
        assert torch.equal(getattr(features, name)[0], getattr(clean, name)[0]) != (name == modality)


@torch.no_grad()
def test_branches_fused_by_hand_are_the_fused_features(model):
    rgb, thermal = model.branch("rgb", image()), model.branch("thermal", image())
    for ours, theirs in zip(model.fuse(rgb, thermal), model.features(image()).fused, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_passes_a_gradient_to_both_modalities(fusion):
    model, pixels = tiny(fusion=fusion), image().requires_grad_()
    prediction = model(pixels)
    (prediction.mask_logits[-1].square().sum() + prediction.class_logits[-1].square().sum()).backward()
    assert (pixels.grad.abs().sum((0, 2, 3)) > 0).all()


def test_batch_norm_is_updated_by_the_fused_path_alone():
    model = tiny()
    model.head(model.branch("rgb", image()))
    assert model.backbone.fusion_norms[0].num_batches_tracked == 0
    model(image())
    assert model.backbone.fusion_norms[0].num_batches_tracked == 1


def count(model: Segmenter) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("share_from", range(5))
def test_shared_stages_are_the_same_parameters_and_the_rest_is_not(share_from):
    model = tiny(share_from=share_from)
    rgb, thermal = model.backbone.rgb, model.backbone.thermal
    same = [a is b for a, b in zip(rgb.stages, thermal.stages, strict=True)]
    assert same == [stage >= share_from for stage in range(4)]
    assert rgb.norms[0] is not thermal.norms[0]


@pytest.mark.parametrize(("share_from", "millions"), [(0, 47.41), (2, 48.90), (4, 74.92)])
def test_swin_tiny_has_as_many_parameters_as_the_released_one(share_from, millions):
    with torch.device("meta"):
        model = build_segmenter(Model(share_from=share_from), num_classes=9)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005)


def test_an_unknown_fusion_names_those_that_exist():
    with pytest.raises(ValueError, match="no fusion 'mean'"):
        tiny(fusion="mean")


def test_the_shift_mask_separates_what_the_roll_brought_together():
    mask = shift_mask(4, 4, 2, 1, torch.device("cpu"))[:, 0]
    assert (mask[0] == 0).all()
    assert mask[3].isinf().sum() == 12  # the last window joins four corners: every token sees itself alone
    assert (mask.diagonal(dim1=1, dim2=2) == 0).all()


def test_a_query_whose_mask_is_empty_looks_everywhere():
    features = torch.tensor([[[1.0, -1.0]]])
    allowed = attention_mask(torch.tensor([[[1.0]]]), features)
    assert allowed.flatten().tolist() == [True, False]
    assert attention_mask(torch.tensor([[[1.0]]]), -features.abs()).all()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_masks_without_a_gradient_are_left_out_of_the_product_and_change_nothing(kind):
    torch.manual_seed(0)
    embed = torch.randn(2, 7, 5, dtype=kind, requires_grad=True)
    features = torch.randn(2, 5, 11, dtype=kind, requires_grad=True)
    ours, theirs = mask_product(embed, features), embed @ features
    assert torch.equal(ours, theirs)
    grad = torch.randn(2, 7, 11, dtype=kind)
    grad[0, [0, 3]] = 0
    grad[1] = 0
    given = (embed, features)
    for one, two in zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, given, grad), strict=True):
        torch.testing.assert_close(one, two)


def test_deformable_sampling_without_offsets_reads_the_own_cell():
    value = torch.randn(2, 4 + 4 + 4, 1, 3)
    weights = torch.zeros(2, 12, 1, 3, 4)
    for level in range(3):
        weights[:, 4 * level : 4 * level + 4, :, level, 0] = 1
    sampled = deformable_sample(value, torch.zeros(2, 12, 1, 3, 4, 2), weights, ((2, 2),) * 3)
    torch.testing.assert_close(sampled, value)


def test_the_pixel_decoder_stays_in_float32_under_autocast(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, levels = model.pixel_decoder(model.features(image()).fused)
    assert {tensor.dtype for tensor in (features, *levels)} == {torch.float32}


def test_masks_cached_in_evaluation_serve_in_training():
    model = tiny()
    with torch.inference_mode():
        model(image(96, 32))
    model(image(96, 32)).mask_logits.sum().backward()


@torch.no_grad()
def test_the_pixel_decoder_stays_in_float32_under_autocast_unless_it_is_told_otherwise():
    model = tiny().eval()
    maps = model.features(image()).fused
    exact = model.pixel_decoder(maps)
    found = {}
    for half in (False, True):
        model.half_precision(half)
        with torch.autocast("cpu", torch.bfloat16):
            found[half] = model.pixel_decoder(maps)
    for (features, levels), equal in ((found[False], True), (found[True], False)):
        for one, two in zip((features, *levels), (exact[0], *exact[1]), strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, two) == equal
            assert (one - two).norm() <= 0.01 * two.norm()  # bfloat16 has steps of 0.4 to 0.8 per cent


def test_softmax_of_few_numbers_is_softmax():
    given = torch.randn(3, 5, 12, dtype=torch.float64) * 30
    x, y = (given.clone().requires_grad_() for _ in range(2))
    ours, theirs = softmax_of_few(x), y.softmax(dim=-1)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(out, of, grad)[0] for out, of in ((ours, x), (theirs, y))))


def test_linear_layers_of_one_input_are_exact_under_autocast_and_their_gradients_those_of_autocast():
    layers = nn.ModuleList([nn.Linear(16, 6), nn.Linear(16, 3)])
    x, grad = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 9)
    plain = torch.cat([layer(x) for layer in layers], dim=2)
    exact = torch.autograd.grad(plain, [x, *layers.parameters()], grad)
    for half, rounding in ((False, 1e-5), (True, 2e-2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = torch.cat(exact_linears(x, list(layers)), dim=2)
        torch.testing.assert_close(found, plain)
        for one, two in zip(torch.autograd.grad(found, [x, *layers.parameters()], grad), exact, strict=True):
            torch.testing.assert_close(one, two, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_pytorchs(masked):
    allowed = torch.rand(2, 1, 5, 11) > 0.5 if masked else None
    if allowed is not None:
        allowed[..., 0] = True
    ours = [torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 11, 11)]
    theirs = [one.clone() for one in ours]
    for one in (*ours, *theirs):
        one.requires_grad_()
    q, k, v = ours
    found, expected = attend(q, k, v, allowed), F.scaled_dot_product_attention(*theirs, attn_mask=allowed)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for one, two in zip(
        torch.autograd.grad(found, ours, grad), torch.autograd.grad(expected, theirs, grad), strict=True
    ):
        torch.testing.assert_close(one, two)
