"""The routings that the documentation composes of passes, against their own equations, written from the votes."""

import re
from pathlib import Path

import pytest
import recommenders
import torch
from recommenders import agreement, weighted_sum
from torch import nn
from torch.testing import assert_close

DOCS = Path(__file__).parent.parent / "docs"
BATCH, INPUTS, FEATURES, OUTPUTS, OUT = 4, 7, 5, 3, 6


def page(name: str) -> dict:
    """What the Python blocks of a page define, run in order."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    return names


@pytest.fixture(scope="module")
def variants() -> dict:
    return page("variants.md")


@pytest.fixture(scope="module")
def libraries() -> dict:
    return page("multi_interest.md")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(v, expected, leaves):
    """Values, and the gradients of leaves."""
    assert_close(v, expected, rtol=1e-7, atol=1e-9)
    g = torch.randn_like(v)
    grads = torch.autograd.grad(v, leaves, g, retain_graph=True)
    assert_close(grads, torch.autograd.grad(expected, leaves, g), rtol=1e-6, atol=1e-8)


@pytest.fixture
def pairs():
    """u [B, I, D], weight [I, J, O, D] and the votes."""
    u, weight = normal(BATCH, INPUTS, FEATURES), normal(INPUTS, OUTPUTS, OUT, FEATURES)
    return u, weight, (weight.unsqueeze(0) @ u[:, :, None, :, None]).squeeze(-1)


def test_inverted_attention(variants, pairs):
    """Tsai et al. 2020, section 3: a uniform first pass, then softmax over j of h . v / sqrt(O)."""
    u, weight, h = pairs
    norm = nn.LayerNorm(OUT, dtype=torch.float64)
    v = norm(h.sum(1) / OUTPUTS)
    for _ in range(2):
        v = norm(weighted_sum(torch.softmax(agreement(h, v) / OUT**0.5, 2), h))
    assert_same(variants["inverted_attention"](u, weight, norm, 2), v, [u, weight, norm.weight, norm.bias])


def test_self_attention_routing(variants, pairs):
    """Mazzia et al. 2021, section 3.2: A = U U^T / sqrt(d), summed over its columns, softmax over j, plus the prior."""
    u, weight, h = pairs
    prior = normal(INPUTS, OUTPUTS)
    A = torch.einsum("bijo,bkjo->bjik", h, h) / OUT**0.5
    c = torch.softmax(A.sum(3), 1).transpose(1, 2)  # [B, I, J]
    s = weighted_sum(c + prior, h)
    n = s.norm(dim=-1, keepdim=True)
    assert_same(variants["self_attention_routing"](u, weight, prior), (1 - 1 / n.exp()) * s / n, [u, weight, prior])


def test_slot_attention(variants):
    """Locatello et al. 2020, algorithm 1, without the 1e-8."""
    maps = {"query": (OUT, 8), "key": (FEATURES, 8), "value": (FEATURES, OUT)}
    query, key, value = (nn.Linear(*sizes, bias=False, dtype=torch.float64) for sizes in maps.values())
    cell = nn.GRUCell(OUT, OUT, dtype=torch.float64)

    def update(new, slots):
        return cell(new.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)

    x, start = normal(BATCH, INPUTS, FEATURES), normal(BATCH, OUTPUTS, OUT)
    slots = start
    for _ in range(3):
        attention = torch.softmax(key(x) @ query(slots).mT / 8**0.5, 2)  # [B, I, J]
        attention = attention / attention.sum(1, keepdim=True)
        slots = update(attention.mT @ value(x), slots)
    leaves = [x, start, query.weight, key.weight, value.weight, *cell.parameters()]
    assert_same(variants["slot_attention"](x, start, query, key, value, update, 3), slots, leaves)


@pytest.mark.parametrize("form", ["OD", "JOD", "IJOD"])
def test_torch_rechub_with_any_padding(libraries, form):
    shape = {"I": INPUTS, "J": OUTPUTS, "O": OUT, "D": FEATURES}
    u, weight = normal(BATCH, INPUTS, FEATURES), normal(*(shape[letter] for letter in form))
    h = torch.einsum(f"bid,{form.lower()}->bi{form.lower().strip('id')}", u, weight)
    h = h if h.dim() == 4 else h.unsqueeze(2).expand(-1, -1, OUTPUTS, -1)
    mask = torch.arange(INPUTS) < torch.tensor([7, 1, 0, 3]).unsqueeze(-1)
    logits = torch.randn(BATCH, INPUTS, OUTPUTS, dtype=torch.float64)
    expected = recommenders.torch_rechub(h, mask, logits)
    assert_same(libraries["torch_rechub"](u, weight, mask, logits), expected, [u, weight])


@pytest.fixture
def shared():
    """u, weight [O, D], its votes, and which inputs are real; no history is empty, and no coupling saturated."""
    u, weight = normal(BATCH, INPUTS, FEATURES), (torch.randn(OUT, FEATURES, dtype=torch.float64) / 5).requires_grad_()
    h = (u @ weight.T).unsqueeze(2).expand(-1, -1, OUTPUTS, -1)
    return u, weight, h, torch.arange(INPUTS) < torch.tensor([7, 1, 2, 4]).unsqueeze(-1)


def test_deepmatch(libraries, shared):
    u, weight, h, mask = shared
    logits = torch.randn(INPUTS, OUTPUTS, dtype=torch.float64)
    v, after = libraries["deepmatch"](u, weight, logits, mask)
    expected, expected_after = recommenders.deepmatch(h, mask, logits)
    assert_close(after, expected_after)
    assert_same(v, expected, [u, weight])


def test_torch_easyrec(libraries, shared):
    u, weight, h, mask = shared
    logits = torch.randn(BATCH, INPUTS, OUTPUTS, dtype=torch.float64)
    active = torch.arange(OUTPUTS) < torch.tensor([3, 1, 1, 2]).unsqueeze(-1)
    expected = recommenders.torch_easyrec(h, mask, logits, active, scale=3.0)
    forbidden = torch.where(active.unsqueeze(1), logits, -torch.inf)
    assert_same(libraries["torch_easyrec"](u, weight, forbidden, mask, scale=3.0), expected, [u, weight])


def test_interests_are_made_and_items_found(libraries):
    assert libraries["interests"].shape == (32, 4, 64)
    assert libraries["retrieved"].shape == (32, 20)
    assert libraries["loss"].isfinite()
    assert libraries["items"].weight.grad.isfinite().all()


def test_rows_of_the_table_have_all_their_cells():
    for name in ("variants.md", "multi_interest.md"):
        tables = re.findall(r"(?:^\|.*\n)+", (DOCS / name).read_text(), re.MULTILINE)
        assert tables
        for table in tables:
            assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_links_between_the_pages_exist():
    anchors = {
        path.name: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        }
        for path in DOCS.glob("*.md")
    }
    for path in DOCS.glob("*.md"):
        for file, anchor in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", path.read_text()):
            assert anchor in anchors[file or path.name], f"{path.name}: {file}#{anchor}"
