"""Published methods that leave the weights alone, each against a computation of its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agent.adapt.strategy import ZeroShot
from agent.bench.peers import tpt, vdp
from agent.bench.peers.crops import random_resized_crops
from agent.bench.peers.logit_centering import LogitCentering
from agent.bench.peers.single_prompt import SinglePrompt
from agent.bench.peers.tda import TDA
from agent.bench.peers.tfup import TFUP, TFUPConfig
from agent.bench.peers.tpt import TPT
from agent.bench.peers.vdp import VDP, VDPConfig
from agent.errors import ModelError
from agent.testing import ARCHITECTURES, LABELS, pictures, tiny_encoder, tiny_zero_shot

PEERS = (TPT, TDA, TFUP, VDP, LogitCentering, SinglePrompt)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def encoder(request):
    return tiny_encoder(request.param)


def transparent(size=1, weight=None):
    """An encoder whose features are the pixels, or a linear map of them."""

    def encode_image(pixels):
        flat = pixels.flatten(1)
        return F.normalize(flat if weight is None else flat @ weight, dim=-1)

    device = torch.device("cpu")
    preprocess = SimpleNamespace(size=size)
    return SimpleNamespace(encode_image=encode_image, device=device, preprocess=preprocess)


def unit(*shape, seed):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1
    ).float()


def zero_shot_of(text, scale):
    return ZeroShot(tuple(f"label {k}" for k in range(len(text))), text[None], scale)


def streamed(peer, features, batch=4):
    with torch.no_grad():
        batches = features[..., None, None].split(batch)
        return torch.cat([peer.predict(pixels) for pixels in batches]).numpy()


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# -- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PEERS)
def test_a_peer_answers_any_tower_and_repeats_exactly(encoder, method):
    batches = [pictures(5, seed=1), pictures(1, seed=2)]
    runs = []
    for _ in range(2):
        peer = method(encoder, tiny_zero_shot(encoder), seed=3)
        with torch.no_grad():
            runs.append([peer.predict(pixels) for pixels in batches])
    assert [len(logits) for logits in runs[0]] == [5, 1]
    for logits, again in zip(*runs, strict=True):
        assert logits.shape[1] == len(LABELS)
        assert torch.isfinite(logits).all()
        assert not logits.requires_grad
        assert torch.equal(logits, again)


@pytest.mark.parametrize("method", PEERS)
def test_a_peer_leaves_the_encoder_and_the_images_alone(encoder, method):
    before = {name: t.clone() for name, t in encoder._model.state_dict().items()}
    pixels = pictures(3, seed=1)
    with torch.no_grad():
        method(encoder, tiny_zero_shot(encoder)).predict(pixels)
    assert all(torch.equal(t, before[name]) for name, t in encoder._model.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder._model.parameters())
    assert not any(module.training for module in encoder._model.modules())
    assert torch.equal(pixels, pictures(3, seed=1))


def test_peers_have_names_of_their_own():
    names = {"tpt", "tda", "tfup", "vdp", "logit_centering", "single_prompt"}
    assert {peer.name for peer in PEERS} == names


# -- single_prompt ----------------------------------------------------------------------------


def test_a_single_prompt_is_the_cosine_with_a_photo_of_a_label(encoder):
    pixels = pictures(3, seed=1)
    zero_shot = tiny_zero_shot(encoder)
    found = SinglePrompt(encoder, zero_shot).predict(pixels)
    model, image = encoder._model, encoder.encode_image(pixels)
    for k, label in enumerate(zero_shot.labels):
        tokens = encoder._tokenizer([f"a photo of a {label}."])
        text = F.normalize(model.encode_text(tokens)[0], dim=-1)
        assert torch.allclose(found[:, k], zero_shot.scale * image @ text, atol=1e-4)


# -- crops ------------------------------------------------------------------------------------


def test_crops_are_boxes_of_allowed_area_and_shape_half_of_them_mirrored():
    ramp = torch.arange(64.0)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])  # x and y
    views = random_resized_crops(image, 200, 0.25, np.random.default_rng(0))
    low, high = views.amin(dim=(2, 3)), views.amax(dim=(2, 3))
    width, height = (high - low + 1).T
    assert views.shape == (200, 2, 64, 64)
    assert 0.24 < float((width * height / 64**2).min()) < 0.35  # a side is rounded
    assert 0.72 < float((width / height).min()) < float((width / height).max()) < 1.39
    mirrored = views[:, 0, 0, 0] > views[:, 0, 0, -1]
    assert 70 < int(mirrored.sum()) < 130


def test_a_crop_of_all_the_area_is_the_image_or_its_mirror():
    image = pictures(1, seed=0)[0]
    for view in random_resized_crops(image, 8, 1.0, np.random.default_rng(0)):
        close = [torch.allclose(view, same, atol=0.1) for same in (image, image.flip(-1))]
        assert any(close)


# -- logit centring ---------------------------------------------------------------------------


def test_centring_takes_the_running_mean_of_earlier_batches():
    text, features = unit(3, 6, seed=0), unit(12, 6, seed=1)
    logits = 20.0 * features.numpy() @ text.numpy().T
    centre, expected = np.zeros(3), []
    for batch in np.split(logits, 3):
        expected.append(batch - centre)
        centre = 0.9 * centre + 0.1 * batch.mean(axis=0)
    answered = streamed(LogitCentering(transparent(), zero_shot_of(text, 20.0)), features)
    assert np.allclose(answered, np.concatenate(expected), atol=1e-4)


# -- TDA --------------------------------------------------------------------------------------


def tda_by_hand(features, text, scale):
    """Sorted lists of (entropy, feature, mask), as the paper has them; and their lengths."""
    positive, negative, answers = {}, {}, []
    for f in features:
        logits = scale * f @ text.T
        p = softmax(logits)
        nats = -(p * np.log(p)).sum()
        caches = [(positive, 3)]
        if 0.2 < nats / np.log2(len(text)) < 0.5:
            caches.append((negative, 2))
        for cache, shots in caches:
            kept = [*cache.get(p.argmax(), []), (nats, f, (p > 0.03) & (p < 1.0))]
            cache[p.argmax()] = sorted(kept, key=lambda item: item[0])[:shots]
        for label, items in positive.items():
            logits[label] += 2.0 * sum(np.exp(-5.0 * (1 - f @ key)) for _, key, _ in items)
        for items in negative.values():
            logits -= 0.117 * sum(np.exp(-1.0 * (1 - f @ key)) * mask for _, key, mask in items)
        answers.append(logits)
    return np.stack(answers), [len(v) for v in positive.values()], sum(map(len, negative.values()))


def test_tda_is_the_published_pair_of_caches():
    text, features = unit(4, 6, seed=0), unit(60, 6, seed=1)
    expected, positives, negatives = tda_by_hand(features.numpy(), text.numpy(), 8.0)
    assert (max(positives), negatives > 4) == (3, True)  # both caches fill up in this case
    answered = streamed(TDA(transparent(), zero_shot_of(text, 8.0)), features)
    assert np.allclose(answered, expected, atol=1e-4)


def test_tda_sees_a_batch_one_image_at_a_time():
    text, features = unit(4, 6, seed=0), unit(24, 6, seed=1)
    one, all_of_them = (
        streamed(TDA(transparent(), zero_shot_of(text, 8.0)), features, batch) for batch in (1, 24)
    )
    assert np.allclose(one, all_of_them, atol=1e-5)


# -- TFUP -------------------------------------------------------------------------------------


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def tfup_cache_by_hand(seen, text, least, most):
    """Features and label of each cached image, selected from all images so far."""
    p = softmax(10.0 * seen @ text.T)
    shots = min(max(int(len(seen) * 0.3 / len(text)), least), most)
    cached = []
    for label in range(len(text)):
        confident = np.argsort(-p[:, label])[: 2 * shots]
        scores = [sum(kl(p[j], p[m]) for m in confident) for j in confident]
        cached += [(seen[confident[j]], label) for j in np.argsort(scores)[:shots]]
    return cached


def tfup_by_hand(f, cached, text, scale):
    p = softmax(10.0 * f @ text.T)
    distance = np.array([kl(p, softmax(10.0 * key @ text.T)) for key, _ in cached])
    normal = (distance - distance.mean()) / distance.std(ddof=1)
    similarity = 2 * (1 - (normal - normal.min()) / (normal.max() - normal.min()))
    logits = scale * f @ text.T
    for (key, label), s in zip(cached, similarity, strict=True):
        logits[label] += 0.3 * np.exp(-1.0 * (1 - s * (f @ key)))
    return logits


def test_tfup_is_the_cache_of_all_images_so_far():
    text, features = unit(3, 6, seed=0), unit(48, 6, seed=1)
    peer = TFUP(transparent(), zero_shot_of(text, 8.0), config=TFUPConfig(shots=(2, 4)))
    answered = streamed(peer, features, batch=12)
    f, w = features.double().numpy(), text.double().numpy()
    for i in range(48):
        cached = tfup_cache_by_hand(f[: 12 * (i // 12 + 1)], w, 2, 4)
        assert np.allclose(answered[i], tfup_by_hand(f[i], cached, w, 8.0), atol=1e-3)


def test_tfup_changes_no_answer_while_all_caches_are_alike():
    text, features = unit(4, 6, seed=0), unit(3, 6, seed=1)
    added = streamed(TFUP(transparent(), zero_shot_of(text, 8.0)), features, batch=1)
    added -= 8.0 * features.numpy() @ text.numpy().T
    assert np.allclose(added, added[:, :1], atol=1e-3)


# -- TPT --------------------------------------------------------------------------------------


def text_by_hand(model, tokens, context):
    """CLIP's text tower at its whole length, with the context in place of the prompt's words."""
    embedded = model.token_embedding(tokens)
    embedded = torch.cat(
        [embedded[:, :1], context.expand(len(tokens), -1, -1), embedded[:, 1 + len(context) :]], 1
    )
    x = model.transformer(embedded + model.positional_embedding, attn_mask=model.attn_mask)
    end = model.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(dim=1)]
    return F.normalize(end @ model.text_projection, dim=-1)


def tpt_by_hand(encoder, views, scale):
    model = encoder._model
    tokens = encoder._tokenizer([f"a photo of a {label}." for label in LABELS])
    context = model.token_embedding(tokens)[0, 1:5].detach().requires_grad_(True)
    features = F.normalize(model.encode_image((views - 0.5) / 0.5), dim=-1)
    p = (scale * features @ text_by_hand(model, tokens, context).T).softmax(dim=-1)
    surest = sorted(range(64), key=lambda v: float(-(p[v] * p[v].log()).sum().detach()))[:6]
    mean = sum(p[v] for v in surest) / 6
    (g,) = torch.autograd.grad(-(mean * mean.log()).sum(), context)
    # The first step of AdamW: both moments are the gradient's own, and weights decay by 0.01.
    tuned = context * (1 - 5e-3 * 0.01) - 5e-3 * g / (g.abs() + 1e-8)
    return tuned.detach(), (scale * features[0] @ text_by_hand(model, tokens, tuned).T).detach()


def test_tpt_is_one_step_on_the_confident_views_of_each_image(encoder, monkeypatch):
    monkeypatch.setattr(tpt, "_CHUNK", 3)  # four labels go in two chunks
    zero_shot, images, seen = tiny_zero_shot(encoder), pictures(2, seed=4), []
    peer = TPT(encoder, zero_shot, seed=1)
    encode = encoder.encode_image
    monkeypatch.setattr(encoder, "encode_image", lambda x: seen.append(x.clone()) or encode(x))
    with torch.no_grad():
        answered = peer.predict(images)
    for image, views, logits in zip(images, seen, answered, strict=True):
        assert len(views) == 64
        assert torch.equal(views[0], image)
        tuned, expected = tpt_by_hand(encoder, views, zero_shot.scale)
        assert torch.allclose(logits, expected, atol=1e-3)
        # The median, as Adam makes a whole step of a gradient that is all rounding.
        assert float((peer._tuned(encode(views)) - tuned).abs().median()) < 1e-7


def test_tpt_moves_the_prompt_and_forgets_it(encoder):
    zero_shot, image = tiny_zero_shot(encoder), pictures(1, seed=4)
    peer = TPT(encoder, zero_shot)
    with torch.no_grad():
        untuned = zero_shot.scale * encoder.encode_image(image) @ peer._source_KD.T
        assert float((peer.predict(image) - untuned).abs().max()) > 1e-2
        assert torch.equal(peer._text(peer._source_MW), peer._source_KD)


def test_tpt_refuses_a_text_tower_that_runs_from_sentences_only():
    with pytest.raises(ModelError, match="siglip only runs from whole sentences"):
        TPT(
            SimpleNamespace(tunes_prompts=False, name="siglip"), zero_shot_of(unit(2, 4, seed=0), 1)
        )


# -- VDP --------------------------------------------------------------------------------------


def adam_by_hand(x, g, moments, t):
    m = 0.9 * moments[0] + 0.1 * g
    v = 0.999 * moments[1] + 0.001 * g**2
    step = 1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return x - step, (m, v)


def vdp_by_hand(batches, weight, text, *, strength, jump):
    """The student sees mirrored images; answers, the teacher, and where a domain ended."""
    frame = torch.ones(4, 4, dtype=torch.float64)
    frame[1:3, 1:3] = 0
    blank = torch.zeros(3, 4, 4, dtype=torch.float64)
    specific, agnostic, teacher_s, teacher_a, anchor, credit, importance = [blank] * 7
    moments, answers, ends, before = [(blank, blank)] * 2, [], [], None

    def logits(x, prompt):
        return 10 * F.normalize((x + frame * prompt).flatten(1) @ weight, dim=-1) @ text.T

    for t, x in enumerate(batches, start=1):
        target = logits(x, teacher_s + teacher_a).softmax(dim=-1)
        confidence = float(target.max(dim=-1).values.mean())
        if before is not None and abs(confidence - before) > jump:
            importance = (importance + credit / ((agnostic - anchor) ** 2 + 1e-3)).clamp(min=0)
            anchor, credit = agnostic, blank
            ends.append(t)
        before = confidence
        s, a = (prompt.clone().requires_grad_(True) for prompt in (specific, agnostic))
        loss = -(target * logits(x.flip(-1), s + a).log_softmax(dim=-1)).sum(dim=-1).mean()
        held = strength * (importance * (a - anchor) ** 2).sum()
        (g_task,) = torch.autograd.grad(loss, a, retain_graph=True)
        g_s, g_a = torch.autograd.grad(loss + held, [s, a])
        specific, moments[0] = adam_by_hand(specific, g_s, moments[0], t)
        moved, moments[1] = adam_by_hand(agnostic, g_a, moments[1], t)
        credit = credit - g_task * (moved - agnostic)
        agnostic = moved
        teacher_s = 0.999 * teacher_s + 0.001 * specific
        teacher_a = 0.999 * teacher_a + 0.001 * agnostic
        answers.append(logits(x, specific + agnostic))
    return torch.stack(answers), teacher_s + teacher_a, ends


def test_vdp_is_the_teacher_the_step_and_the_homeostasis(monkeypatch):
    monkeypatch.setattr(vdp, "random_resized_crops", lambda image, *_: image[None].flip(-1))
    weight, text = unit(48, 6, seed=0), unit(3, 6, seed=1)
    batches = torch.rand(12, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    config = VDPConfig(frame=0.25, homeostasis=100.0, confidence_jump=0.05)
    peer = VDP(transparent(4, weight), zero_shot_of(text, 10.0), config=config)
    with torch.no_grad():
        answered = torch.stack([peer.predict(pixels) for pixels in batches]).double()
    case = (batches.double(), weight.double(), text.double())
    expected, teacher, ends = vdp_by_hand(*case, strength=100.0, jump=0.05)
    assert 1 < len(ends) < 8  # domains of more than one batch, in which the regulariser pulls
    assert torch.allclose(answered, expected, atol=1e-4)
    assert torch.allclose(peer._teacher_CHW.double(), teacher, atol=1e-7)
    unregularised = vdp_by_hand(*case, strength=0.0, jump=0.05)[0]
    assert float((unregularised - expected).abs().max()) > 1e-3


def test_vdp_holds_what_took_the_loss_down_and_nothing_else():
    held = vdp._Homeostasis(torch.zeros(2), damping=0.5)
    held.credit(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]))  # down by 2, up by 2
    held.consolidate(torch.tensor([2.0, 2.0]))
    pull = held.gradient(torch.tensor([3.0, 3.0]))
    assert torch.allclose(pull, torch.tensor([2 * 2 / (4 + 0.5), 0.0]))


def test_vdp_prompts_stay_in_the_frame(encoder):
    peer = VDP(encoder, tiny_zero_shot(encoder))
    with torch.no_grad():
        peer.predict(pictures(4, seed=0))
    width = round(32 * 30 / 224)
    for prompt in (peer._specific_CHW.detach(), peer._agnostic_CHW.detach()):
        assert float(prompt.abs().max()) > 0
        assert not prompt[:, width : 32 - width, width : 32 - width].any()


def test_vdp_ends_a_domain_only_where_confidence_jumps():
    peer = VDP(transparent(4, unit(48, 6, seed=0)), zero_shot_of(unit(3, 6, seed=1), 10.0))
    ends = []
    peer._homeostasis.consolidate = ends.append
    for confidence in (0.5, 0.55, 0.62, 0.8, 0.75, 0.6):
        peer._notice_domain(confidence)
    assert len(ends) == 2
