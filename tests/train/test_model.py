"""The trained computation against the engine's: same rows where nothing is an answer, gradients where they belong."""

import pytest
import torch

from llava_mini_fast import checkpoint as checkpoints
from llava_mini_fast.engine import LlavaMini
from llava_mini_fast.preprocess.views import normalize, views
from llava_mini_fast.train.data import IGNORED
from llava_mini_fast.train.model import TrainableModel


@pytest.fixture(scope="module")
def trainable(checkpoint):
    """trainable(checkpoint name, stage) -> a model of its own."""

    def make(name, stage):
        directory = checkpoint(name)
        engine = LlavaMini(directory, checkpoints.read_config(directory), torch.device("cpu"), torch.float32)
        return TrainableModel(engine, stage)

    return make


def tensors(*lists):
    return [torch.tensor(one) for one in lists]


def pixels(model, *media):
    return torch.cat([normalize(views(one, model.front.config).pixels, torch.float32) for one in media])


def unlearned(ids):
    return [IGNORED] * len(ids)


@pytest.mark.parametrize(("name", "case"), [("llama31", "image"), ("llama31", "video"), ("llama31_hd", "hd")])
def test_rows_without_answers_are_the_published_ones(trainable, golden, name, case):
    model, row = trainable(name, 2), golden(case)
    ids, labels = tensors(row.prompt_ids, unlearned(row.prompt_ids))
    shown = pixels(model, row.media)
    with torch.no_grad():
        (rows,) = model.fused_rows([ids], [labels], [range(len(shown))], shown)
    assert (rows - row.fused).abs().max() < 1e-4
    assert not {"state", "vision"} & set(vars(model.front.cache))  # no memory for an image cache


def test_a_batch_gives_what_each_gives_alone_and_features_stand_for_pixels(trainable, golden):
    model, image, video = trainable("llama31", 2), golden("image"), golden("video")
    text = [1, 17, 40, 3]
    ids = tensors(image.prompt_ids, text, video.prompt_ids)
    labels = tensors(unlearned(image.prompt_ids), unlearned(text), unlearned(video.prompt_ids))
    shown = pixels(model, image.media, video.media)
    frames = [[0], [], range(1, len(shown))]
    with torch.no_grad():
        features = model.front.vision_tower(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
        first, second, third = model.fused_rows(ids, labels, frames, features=features)
        assert torch.equal(second, model.llm.get_input_embeddings()(ids[1]))
    assert (first - image.fused).abs().max() < 1e-4 and (third - video.fused).abs().max() < 1e-4


def test_examples_may_share_a_frame(trainable, golden):
    model, row, other = trainable("llama31", 2), golden("image"), golden("image_other_question")
    ids = tensors(row.prompt_ids, other.prompt_ids)
    labels = tensors(unlearned(row.prompt_ids), unlearned(other.prompt_ids))
    with torch.no_grad():
        one, two = model.fused_rows(ids, labels, [[0], [0]], pixels(model, row.media))
    assert (one - row.fused).abs().max() < 1e-4 and (two - other.fused).abs().max() < 1e-4


def test_answers_are_seen_by_nobody_and_stay_plain(trainable, golden):
    model, row = trainable("llama31", 2), golden("image")
    answer, other, rest = [50, 51, 52], [90, 91], [60, 61]
    shown = pixels(model, row.media)

    def fuse(said):
        ids = [*row.prompt_ids, *said, *rest]
        labels = [*unlearned(row.prompt_ids), *said, *unlearned(rest)]
        with torch.no_grad():
            return model.fused_rows(*map(lambda x: [torch.tensor(x)], (ids, labels)), [[0]], shown)[0]

    one, two, plain = fuse(answer), fuse(other), model.llm.get_input_embeddings()
    start = len(row.fused)
    assert (one[:start] - row.fused).abs().max() < 1e-4
    assert torch.equal(one[start : start + 3], plain(torch.tensor(answer)))
    assert (one[start + 3 :] - two[start + 2 :]).abs().max() < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_each_stage_learns_its_own_parts(trainable, golden, stage):
    model, row = trainable("llama31", stage), golden("image_short")
    ids = [*row.prompt_ids, 7, 8]
    labels = [*unlearned(row.prompt_ids), 7, 8]
    out = model(tensors(ids, [5, 6, 7]), tensors(labels, [IGNORED, 6, 7]), [[0], []], pixels(model, row.media))
    rows = len(ids) - 1 + (576 if stage == 1 else 1)
    assert out["logits"].shape[:2] == (2, rows) and out["loss"].isfinite()
    out["loss"].backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = ("mm_projector", "compressor", "prefusion_layers", "vision_tower")
    assert {part for part in parts if any(f"front.{part}" in name for name in learned)} == set(
        parts[: 1 if stage == 1 else 3]
    )
    assert any(name.startswith("llm.") for name in learned) == (stage == 2)
    assert "front.compressor.pos_embed" not in learned
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert stage == 1 or wanted - learned <= {"front.compressor.attn.in_proj_bias"}


def test_gradients_have_the_same_bits_every_time(trainable):
    """Many questions about one picture, and a clip of many frames: what they share gets many gradients."""
    model, questions = trainable("llama31", 2), 24
    torch.manual_seed(0)
    ids = [torch.cat([torch.tensor([-200]), torch.randint(1, 200, (40,))]) for _ in range(questions + 1)]
    frames = [*[[0]] * questions, [0, 1] * questions]
    features = torch.randn(2, 1, 576, model.front.config.mm_hidden_size)

    def gradients():
        model.zero_grad()
        rows = model.fused_rows(ids, [torch.full_like(one, IGNORED) for one in ids], frames, features=features)
        torch.cat(rows).pow(2).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first = gradients()
    for _ in range(4):
        again = gradients()
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_engine_has_learned(trainable, golden):
    model, row = trainable("llama31", 2), golden("image_short")
    answer = [33, 44, 55]
    ids, labels = [*row.prompt_ids, *answer], [*unlearned(row.prompt_ids), *answer]
    shown, optimizer = (
        pixels(model, row.media),
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3),
    )
    losses = []
    for _ in range(8):
        loss = model(*map(lambda x: [torch.tensor(x)], (ids, labels)), [[0]], shown)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    model.front.compressor.refold()
    rows = model.front.fuse([(row.prompt_ids, row.media)])[0]
    tokens = model.llm.generate(inputs_embeds=rows[None], max_new_tokens=3, do_sample=False)
    assert tokens[0].tolist() == answer


def test_refusals(trainable, model):
    with pytest.raises(ValueError, match="stage must be 1 or 2"):
        trainable("llama31", 3)
    packed = model("llama31")
    if packed.front.packed:
        with pytest.raises(ValueError, match="packed for inference"):
            TrainableModel(packed, 2)
