"""The example of recommenders: it finds what it generated, and its figures mean what it says."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "recommender.py"


@pytest.fixture(scope="module")
def recommender():
    spec = importlib.util.spec_from_file_location("recommender", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world(recommender):
    return recommender.World(recommender.SMALL, torch.Generator().manual_seed(1))


def test_several_interests_recover_more_topics_than_one(recommender, capsys, one_thread):
    results = recommender.run(recommender.SMALL)
    printed = capsys.readouterr().out
    assert list(results) == ["knowing the topics", "mean pooling", "MIND", "ComiRec-DR"]
    assert all(name in printed for name in results)
    (best, _), (mean_recall, mean_recovery), (mind_recall, mind_recovery), (comirec_recall, _) = results.values()
    assert mind_recovery > mean_recovery + 0.04
    assert mind_recall > mean_recall - 0.05
    assert 0.4 * best < comirec_recall < best
    assert mind_recall < best


def test_comirec_is_as_its_paper_has_it(recommender):
    comirec = recommender.encoders(recommender.SMALL)["ComiRec-DR"].routing
    assert (comirec.shared, comirec.prior, comirec.detach_coupling) == (None, "zero", True)


def test_clicks_are_on_the_users_topics(recommender, world):
    users = world.users(300)
    liked = torch.arange(users.topics.shape[1]) < users.liked.unsqueeze(-1)  # [U, interests]
    clicked = world.topic_of[users.items].unsqueeze(-1) == users.topics.unsqueeze(1)  # [U, clicks + 1, interests]
    assert (clicked & liked.unsqueeze(1)).any(-1).all()
    assert set(users.liked.tolist()) == set(range(1, recommender.SMALL.interests + 1))
    assert (users.lengths <= recommender.SMALL.clicks).all()


def test_best_recall_is_that_of_the_most_popular_items(recommender, world):
    users = world.users(20_000)
    hits = []
    for topics, liked, label in zip(users.topics, users.liked.tolist(), users.items[:, -1].tolist(), strict=True):
        ranks = torch.arange(recommender.RETRIEVED)
        best = world.items_of[topics[ranks % liked], ranks // liked]  # in turn from each topic, by popularity
        hits.append(label in best.tolist())
    assert sum(hits) / len(hits) == pytest.approx(world.best_recall(users), abs=0.01)


def test_retrieval_finds_the_best_of_all_interests(recommender):
    interests, items = torch.randn(70, 3, 8), torch.randn(500, 8)
    found = recommender.retrieve(interests, items, 20)
    scores = torch.tensor([[max(v @ item for v in user) for item in items] for user in interests[::30]])
    torch.testing.assert_close(found[::30], scores.topk(20).indices)
