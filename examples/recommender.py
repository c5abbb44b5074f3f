"""Several interests for every user: MIND and ComiRec-DR against mean pooling, from clicks to retrieval.

    python examples/recommender.py            # 100,000 items: a minute on one core
    python examples/recommender.py --small    # some seconds

The clicks are generated, so that the truth is known. Every item belongs to a topic, and is clicked there as
often as its rank by Zipf's law says. Every user likes one to four topics and clicks in them at random. A model
learns item vectors and turns a history into user vectors; the items with the largest dot product with any of
them are retrieved. Two figures, over users who were not trained on:

- recall@20: how often the next click is among the 20 items retrieved,
- recovery: the share of a user's topics that are among the topics of those items,

each next to what a retriever that knows a user's topics and all items' popularity would reach.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capsroute.nn import LabelAwareAttention, MultiInterest

RETRIEVED = 20


class Sizes(NamedTuple):
    """How large everything is."""

    items: int = 100_000
    topics: int = 200
    users: int = 40_000
    test_users: int = 2_000
    clicks: int = 32  # in the longest history
    features: int = 16
    interests: int = 4
    batch: int = 512
    epochs: int = 12


SMALL = Sizes(items=4_000, topics=40, users=8_000, test_users=500, clicks=16, features=8, batch=128, epochs=8)


class World:
    """Items that belong to topics, and users who like some of them."""

    def __init__(self, sizes: Sizes, generator: torch.Generator):
        self.sizes, self.generator = sizes, generator
        self.per_topic = sizes.items // sizes.topics
        ranks = torch.arange(1, self.per_topic + 1, dtype=torch.float64)
        self.popularity = (1 / ranks) / (1 / ranks).sum()  # in a topic, by rank
        # item = items_of[topic, rank]
        order = torch.randperm(self.per_topic * sizes.topics, generator=generator)
        self.items_of = order.view(sizes.topics, self.per_topic)
        self.topic_of = torch.empty(order.numel(), dtype=torch.long)
        self.topic_of[self.items_of] = torch.arange(sizes.topics).unsqueeze(-1)

    def users(self, count: int) -> Clicks:
        """Users with their topics and histories; each has one more click than the longest history."""
        sizes, generator = self.sizes, self.generator
        topics = torch.rand(count, sizes.topics, generator=generator).topk(sizes.interests, -1).indices
        liked = torch.randint(1, sizes.interests + 1, (count, 1), generator=generator)
        which = (torch.rand(count, sizes.clicks + 1, generator=generator) * liked).long()
        rank = torch.multinomial(self.popularity, which.numel(), True, generator=generator).view_as(which)
        items = self.items_of[topics.gather(-1, which), rank]
        lengths = torch.randint(sizes.clicks // 4, sizes.clicks + 1, (count,), generator=generator)
        return Clicks(items, lengths, topics, liked.squeeze(-1))

    def best_recall(self, users: Clicks) -> float:
        """recall@20 of a retriever that knows each user's topics: the most popular items of all of them."""
        each = torch.div(RETRIEVED, users.liked, rounding_mode="floor")
        extra = RETRIEVED - each * users.liked
        share = self.popularity.cumsum(0)
        whole = share[each - 1]
        return (whole + extra / users.liked * self.popularity[each]).mean().item()


class Clicks(NamedTuple):
    """The clicks of users, U of them."""

    items: Tensor  # [U, clicks + 1]: any of them may be the next click, the others the history
    lengths: Tensor  # [U], of the histories
    topics: Tensor  # [U, interests], of which the first `liked` are the user's
    liked: Tensor  # [U]

    def __getitem__(self, index: Tensor) -> Clicks:
        return Clicks(*(x[index] for x in self))


class MeanPooling(nn.Module):
    """One vector for every user: a linear map of the mean of the items clicked."""

    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, u: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        real = torch.arange(u.shape[1]) < lengths.unsqueeze(-1)
        return self.linear(u.masked_fill(~real.unsqueeze(-1), 0).sum(1) / lengths.unsqueeze(-1)).unsqueeze(1)


class Interests(nn.Module):
    """Several vectors for every user."""

    def __init__(self, routing: MultiInterest):
        super().__init__()
        self.routing = routing

    def forward(self, u: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        return self.routing(u, lengths=lengths, generator=generator)


class Recommender(nn.Module):
    """Item vectors, and users' vectors [B, J, O] made from those of the items in their histories."""

    def __init__(self, sizes: Sizes, encoder: nn.Module, frequency: Tensor):
        super().__init__()
        self.items = nn.Embedding(sizes.items, sizes.features)
        nn.init.normal_(self.items.weight, std=1 / math.sqrt(sizes.features))
        self.encoder = encoder
        self.attention = LabelAwareAttention(math.inf)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # dot products are of vectors shorter than 1
        self.register_buffer("log_frequency", frequency.log())

    def forward(self, history: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        return self.encoder(self.items(history), lengths, generator)

    def loss(self, history: Tensor, lengths: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Softmax over the labels of the batch, each corrected by how often it comes as a negative."""
        positive = self.items(label)  # [B, O]
        user = self.attention(self(history, lengths, generator), positive)  # [B, O]
        logits = self.log_scale.exp() * user @ positive.t() - self.log_frequency[label]  # [B, B]
        same = label.unsqueeze(0) == label.unsqueeze(1)
        same.fill_diagonal_(False)
        return F.cross_entropy(logits.masked_fill(same, -math.inf), torch.arange(len(label)))


def train(model: Recommender, users: Clicks, sizes: Sizes, generator: torch.Generator) -> None:
    """Every click of a user is the next one in some epoch: order means nothing in these histories."""
    items = {"params": [model.items.weight], "lr": 0.03}
    rest = {"params": [x for name, x in model.named_parameters() if name != "items.weight"], "lr": 0.02}
    optimizer = torch.optim.Adam([items, rest], fused=True)
    for epoch in range(sizes.epochs):
        for index in torch.randperm(len(users.items), generator=generator).split(sizes.batch):
            batch = users[index]
            clicks = batch.items.roll(epoch, 1)
            loss = model.loss(clicks[:, :-1], batch.lengths, clicks[:, -1], generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def retrieve(interests: Tensor, items: Tensor, count: int) -> Tensor:
    """The `count` items [B, count] with the largest dot product with any of a user's interests [B, J, O].

    Exact, by products with all items, some users at a time. With an index as faiss makes them: one query for each
    interest, and the best of all that they find.
    """
    parts = [(part @ items.t()).amax(1).topk(count).indices for part in interests.split(64)]  # of [64, J, items]
    return torch.cat(parts)


@torch.inference_mode()
def evaluate(model: Recommender, world: World, users: Clicks, generator: torch.Generator) -> tuple[float, float]:
    """recall@20 and recovery."""
    model.eval()
    interests = model(users.items[:, :-1], users.lengths, generator)
    found = retrieve(interests, model.items.weight, RETRIEVED)  # [U, 20]
    recall = (found == users.items[:, -1:]).any(-1).double().mean().item()
    topics = world.topic_of[found]  # [U, 20]
    liked = torch.arange(users.topics.shape[1]) < users.liked.unsqueeze(-1)
    hit = (users.topics.unsqueeze(-1) == topics.unsqueeze(1)).any(-1) & liked
    return recall, (hit.sum(-1) / users.liked).double().mean().item()


def encoders(sizes: Sizes) -> dict[str, nn.Module]:
    """What makes users' vectors, by name."""
    shape = sizes.clicks, sizes.features, sizes.interests, sizes.features
    return {
        "mean pooling": MeanPooling(sizes.features),
        "MIND": Interests(MultiInterest(*shape)),
        "ComiRec-DR": Interests(MultiInterest(*shape, shared=None, prior="zero", detach_coupling=True)),
    }


def run(sizes: Sizes, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Train and evaluate each model; prints a line for each."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    world = World(sizes, generator)
    users, test_users = world.users(sizes.users), world.users(sizes.test_users)
    frequency = torch.bincount(users.items.flatten(), minlength=sizes.items).clamp_min(1) / users.items.numel()
    results = {"knowing the topics": (world.best_recall(test_users), 1.0)}
    print(f"{'':20}  recall@20  recovery   seconds", flush=True)
    print(f"{'knowing the topics':20}  {results['knowing the topics'][0]:9.3f}  {1:8.3f}", flush=True)
    for name, encoder in encoders(sizes).items():
        start = time.perf_counter()
        model = Recommender(sizes, encoder, frequency)
        train(model, users, sizes, generator)
        results[name] = evaluate(model, world, test_users, generator)
        recall, recovery = results[name]
        print(f"{name:20}  {recall:9.3f}  {recovery:8.3f}  {time.perf_counter() - start:8.1f}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="few items and users: some seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(SMALL if arguments.small else Sizes(), arguments.seed)
