"""The first client of accelerate: torch-rechub's CapsuleNetwork, by itself and in its own models."""

import copy

import pytest
import torch
from foreign import MASKS, rechub, results
from torch import nn
from torch.testing import assert_close
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.matching import MIND, ComirecDR
from torch_rechub.trainers import MatchTrainer

import capsroute


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, *({"routing_times": n} for n in (1, 2, 5)), {"relu_layer": True}], ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_rechub_gives_the_same_for_the_same_parameters_and_generator(kind, options, mask):
    layer = rechub(kind, **options)
    item_eb = torch.randn(3, 9, 8)  # padding is not zero: it keeps a share of the coupling
    expected = results(layer, item_eb, MASKS[mask])
    assert capsroute.accelerate(layer, quiet=True).entries[0].swapped
    found = results(layer, item_eb, MASKS[mask])
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(found[name], want, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", [0, 2])
def test_rechub_compiles_in_one_graph(kind):
    torch._dynamo.reset()
    layer, item_eb = rechub(kind), torch.randn(3, 9, 8)
    capsroute.accelerate(layer, quiet=True)
    expected = results(layer, item_eb, MASKS["some"])
    found = results(torch.compile(layer, backend="aot_eager", fullgraph=True), item_eb, MASKS["some"])
    assert_close(found["out"], expected["out"])
    assert_close(found["input"], expected["input"])


def test_rechub_padding_does_keep_its_share():
    """The option is needed: with the mask before the softmax the interests would be others."""
    layer, item_eb = rechub(2), torch.randn(3, 9, 8)
    weight = capsroute.nn.from_layout(layer.w, "[1, I, J*O, D]", J=3)
    plain = capsroute.capsule_linear(item_eb, weight, mask=MASKS["some"].bool(), coupling="in", detach_coupling=True)
    assert not torch.allclose(plain, layer(item_eb, MASKS["some"]), rtol=0.1)


def features():
    sequence = SequenceFeature("hist_item_id", vocab_size=50, embed_dim=8, pooling="concat", shared_with="item_id")
    negatives = SequenceFeature("neg_items", vocab_size=50, embed_dim=8, pooling="concat", shared_with="item_id")
    user = [SparseFeature("user_id", vocab_size=20, embed_dim=8)]
    return user, [sequence], [SparseFeature("item_id", vocab_size=50, embed_dim=8)], [negatives]


def batches(count: int = 4) -> list:
    generator = torch.Generator().manual_seed(1)

    def ids(top: int, *shape: int):
        return torch.randint(1, top, shape, generator=generator)

    def batch():
        history = ids(50, 8, 9)
        lengths = torch.randint(1, 10, (8, 1), generator=generator)
        history[torch.arange(9) >= lengths] = 0
        columns = {"user_id": ids(20, 8), "item_id": ids(50, 8), "hist_item_id": history, "neg_items": ids(50, 8, 3)}
        return columns, torch.zeros(8, dtype=torch.long)

    return [batch() for _ in range(count)]


@pytest.mark.parametrize(("model", "options"), [(MIND, {}), (MIND, {"dynamic_interest": True}), (ComirecDR, {})])
def test_rechub_models_train_an_epoch_to_the_same_parameters(model, options, tmp_path, capsys):
    trained = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        net = model(*features(), max_length=9, interest_num=3, **options)
        if model is ComirecDR:
            nn.init.normal_(net.capsule.w, std=0.3)
        if accelerated:
            report = capsroute.accelerate(net)
            assert [(entry.name, entry.swapped) for entry in report.entries] == [("capsule", True)]
        before = copy.deepcopy(net.state_dict())
        torch.manual_seed(1)
        trainer = MatchTrainer(
            net,
            mode=2,
            optimizer_fn=torch.optim.SGD,  # Adam would turn the rounding of a gradient near 0 into a step
            optimizer_params={"lr": 0.1},
            n_epoch=1,
            model_path=str(tmp_path),
        )
        trainer.fit(batches())
        trained.append(net.state_dict())
        assert any(not torch.equal(before[name], x) for name, x in trained[-1].items() if "capsule" in name)
    assert trained[0].keys() == trained[1].keys()
    for name, expected in trained[0].items():
        assert_close(trained[1][name], expected, rtol=1e-4, atol=1e-6)
